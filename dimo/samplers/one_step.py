"""One-step sampling of a distilled student: x_init -> every token at once."""

__all__ = ["TokenInitialization", "initial_state", "sample_one_step"]

from dataclasses import dataclass

from torch import Tensor

from dimo import rng
from dimo.masking import initialize_tokens
from dimo.models import MaskedModel
from dimo.samplers.types import Samples


@dataclass(frozen=True)
class TokenInitialization:
    """x_init: tokens [B, L] int64, and the embedding noise float32 [B, L, D] or None."""

    tokens: Tensor
    noise: Tensor | None


def initial_state(
    model: MaskedModel,
    seed: int,
    index: Tensor,
    purpose: str,
    *,
    init_mask_ratio: float,
    embedding_noise: float,
) -> TokenInitialization:
    """Draws x_init for images `index` [B] (sec. 3.3): the same law in training and sampling."""
    length = model.num_tokens
    tokens = initialize_tokens(
        rng.integers(seed, index, f"{purpose}/init_tokens", (length,), model.codebook_size),
        rng.random_ranks(seed, index, f"{purpose}/init_mask", length),
        init_mask_ratio=init_mask_ratio,
        mask_token_id=model.mask_token_id,
    )
    noise = None
    if embedding_noise > 0:
        noise = rng.normal(seed, index, f"{purpose}/init_noise", (length, model.hidden_dim))
    return TokenInitialization(tokens, noise)


def sample_one_step(
    student: MaskedModel,
    labels: Tensor,
    *,
    seed: int,
    index: Tensor,
    init_mask_ratio: float,
    embedding_noise: float,
    temperature: float = 1.0,
) -> Samples:
    """Tokens of a one-step student; one forward an image.

    Args:
        student: The generator.
        labels: [B] int64.
        seed: The run's seed.
        index: [B] image indices; image i is the same in any batch.
        init_mask_ratio: r of its training.
        embedding_noise: sigma of its training.
        temperature: Divides the logits; 1 = as trained.
    """
    initial = initial_state(
        student,
        seed,
        index,
        "sample",
        init_mask_ratio=init_mask_ratio,
        embedding_noise=embedding_noise,
    )
    logits = student(initial.tokens, labels, embedding_noise=embedding_noise, noise=initial.noise)[
        ..., : student.codebook_size
    ]
    noise = rng.gumbel(seed, index, "sample/tokens", (student.num_tokens, student.codebook_size))
    tokens = (logits.double() / temperature + noise).argmax(-1)
    return Samples(tokens=tokens, nfe=1, token_counts=[student.num_tokens])
