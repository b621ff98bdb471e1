"""The random numbers of a Di[M]O update (x_init, sample, re-mask) and its intermediate state."""

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
    fully_masked: float = 0.0  # fraction of the states, whatever schedule and range say
    mask_ratio_range: tuple[float, float] = (0.0, 1.0)

    def ratio(self, purpose: str, u: Tensor) -> Tensor:
        """Masked fraction [B] for uniform u [B]."""
        schedule = self.mask_schedule
        if purpose != "student" and self.auxiliary_mask_schedule is not None:
            schedule = self.auxiliary_mask_schedule
        full = self.fully_masked
        rest = ((u - full) / (1 - full)).clamp_min(0)
        return mask_ratio(schedule, rest).clamp(*self.mask_ratio_range).masked_fill(u < full, 1.0)


@dataclass(frozen=True)
class Draws:
    """Every random number of one update."""

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
    seed: int,
    index: Tensor,
    purpose: str,
    step: int,
    classes: int,
) -> Draws:
    """The draws of images `index` [B] for "student" or "auxiliary/N", which share r and sigma."""
    law, length = initialization, model.num_tokens
    sigma = embedding_noise_at(
        step,
        final=law.embedding_noise,
        warmup=law.embedding_noise_warmup,
        warmup_steps=law.embedding_noise_warmup_steps,
    )
    initial = initial_state(
        model,
        rng.ImageNoise(seed, index),
        purpose,
        init_mask_ratio=init_mask_ratio_at(
            seed, step, init_mask_ratio=law.init_mask_ratio, bounds=law.init_mask_ratio_range
        ),
        embedding_noise=sigma,
        token_initialization=law.token_initialization,
    )
    ratio = masking.ratio(purpose, rng.uniform(seed, index, f"{purpose}/mask_ratio", ()))
    ranks = rng.random_ranks(seed, index, f"{purpose}/mask", length)
    return Draws(
        labels=rng.integers(seed, index, f"{purpose}/label", (), model.num_classes),
        initial=initial,
        embedding_noise=sigma,
        gumbel=rng.gumbel(seed, index, f"{purpose}/sample", (length, classes), torch.float32),
        mask_ratio=ratio,
        mask=random_mask(ranks, mask_count(ratio, length)),
    )


@dataclass(frozen=True)
class MaskedState:
    """x~_t, and the K positions that a model is asked for: every re-masked one is among them."""

    tokens: Tensor  # x~_t [B, L]
    labels: Tensor  # [B]
    positions: Tensor | None  # [B, K], None = all L
    mask: Tensor  # [B, K] bool, True = re-masked

    @classmethod
    def of(cls, model: MaskedModel, tokens: Tensor, mask: Tensor, labels: Tensor) -> "MaskedState":
        """The state of tokens x [B, L] under the mask [B, L]."""
        positions: Tensor | None = masked_positions(mask)
        if positions is not None and positions.shape == mask.shape:
            positions = None
        kept = gather_positions(mask[..., None], positions)[..., 0]
        return cls(tokens.masked_fill(mask, model.mask_token_id), labels, positions, kept)

    def gather(self, values: Tensor) -> Tensor:
        """[B, L, V] -> [B, K, V]."""
        return gather_positions(values, self.positions)

    def scatter(self, values: Tensor) -> Tensor:
        """[B, K, V] -> [B, L, V], zero where nothing is re-masked."""
        values = values.masked_fill(~self.mask[..., None], 0.0)
        if self.positions is None:
            return values
        whole = values.new_zeros(*self.tokens.shape, values.shape[-1])
        return whole.scatter_(1, self.positions[..., None].expand_as(values), values)
