"""One Di[M]O update's random numbers (x_init, the sample, the re-mask) and intermediate state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dimo import rng
from dimo.initialization import (
    TokenInitialization,
    embedding_noise_at,
    init_mask_ratio_at,
    initial_state,
)
from dimo.masking import mask_count, mask_ratio, random_mask
from dimo.models import MaskedModel
from dimo.models.layers import gather_positions
from dimo.samplers.base import masked_positions


@dataclass(frozen=True)
class Initialization:
    """The law of x_init; the fields are recipe keys."""

    token_initialization: str = "mixed"
    init_mask_ratio: float = 0.6  # r
    init_mask_ratio_range: tuple[float, float] | None = None
    embedding_noise: float = 0.1  # sigma
    embedding_noise_warmup: str = "none"
    embedding_noise_warmup_steps: int = 0


@dataclass(frozen=True)
class Masking:
    """The law of the intermediate state x~_t; the fields are recipe keys."""

    mask_schedule: str = "arccos"  # gamma
    auxiliary_mask_schedule: str | None = None
    mask_ratio_range: tuple[float, float] = (0.0, 1.0)

    def ratio(self, purpose: str, u: Tensor) -> Tensor:
        """Masked fraction [B] for uniform u [B]."""
        schedule = self.mask_schedule
        if purpose != "student" and self.auxiliary_mask_schedule is not None:
            schedule = self.auxiliary_mask_schedule
        return mask_ratio(schedule, u).clamp(*self.mask_ratio_range)


@dataclass(frozen=True)
class Draws:
    """Every random number of one update, so that the update is a function of its inputs."""

    labels: Tensor  # [B] int64, uniform over the classes
    initial: TokenInitialization  # x_init and the noise of its embedding
    embedding_noise: float  # sigma of this step
    gumbel: Tensor  # [B, L, V] float32, chooses the student's tokens
    mask_ratio: Tensor  # [B] float64, the fraction to re-mask
    mask: Tensor  # [B, L] bool, True = re-masked in the intermediate state


def draw(
    initialization: Initialization,
    masking: Masking,
    model: MaskedModel,
    *,
    seed: int,
    index: Tensor,
    purpose: str,
    step: int,
    vocabulary: int,
) -> Draws:
    """Draws for images `index` [B] and one purpose, "student" or "auxiliary/N".

    r and sigma depend on `seed` and `step` only, so both purposes share them.
    """
    length = model.num_tokens
    sigma = embedding_noise_at(
        step,
        final=initialization.embedding_noise,
        warmup=initialization.embedding_noise_warmup,
        warmup_steps=initialization.embedding_noise_warmup_steps,
    )
    r = init_mask_ratio_at(
        seed,
        step,
        init_mask_ratio=initialization.init_mask_ratio,
        bounds=initialization.init_mask_ratio_range,
    )
    initial = initial_state(
        model,
        rng.ImageNoise(seed, index),
        purpose,
        init_mask_ratio=r,
        embedding_noise=sigma,
        token_initialization=initialization.token_initialization,
    )
    ratio = masking.ratio(purpose, rng.uniform(seed, index, f"{purpose}/mask_ratio", ()))
    ranks = rng.random_ranks(seed, index, f"{purpose}/mask", length)
    shape = (length, vocabulary)
    return Draws(
        labels=rng.integers(seed, index, f"{purpose}/label", (), model.num_classes),
        initial=initial,
        embedding_noise=sigma,
        gumbel=rng.gumbel(seed, index, f"{purpose}/sample", shape, dtype=torch.float32),
        mask_ratio=ratio,
        mask=random_mask(ranks, mask_count(ratio, length)),
    )


def intermediate_state(
    model: MaskedModel, tokens: Tensor, mask: Tensor, labels: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """(x~_t [B, L], labels, positions) to ask a model for, and which positions are masked.

    Positions [B, K] hold every masked one, None stands for all L; the second is [B, K] bool.
    """
    positions: Tensor | None = masked_positions(mask)
    if positions is not None and positions.shape == mask.shape:
        positions = None
    state = (tokens.masked_fill(mask, model.mask_token_id), labels, positions)
    return state, gather_positions(mask[..., None], positions)[..., 0]


def scatter_positions(values: Tensor, positions: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of `gather_positions`: values [B, K, V] in a [B, L, V] that is zero elsewhere."""
    if positions is None:
        return values
    whole = values.new_zeros(like.shape)
    return whole.scatter_(1, positions[..., None].expand_as(values), values)
