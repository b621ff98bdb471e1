"""The student's input x_init (sec. 3.3), in training and sampling: tokens and embedding noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dimo import rng
from dimo.errors import unknown_name
from dimo.masking import initialize_tokens
from dimo.models import MaskedModel
from dimo.rng import ImageNoise

# "mixed" is the paper's; the others are ablations, see `initial_state`.
TOKEN_INITIALIZATIONS = ("mixed", "masked", "random", "fixed")

# Fraction of the final sigma after a fraction x >= 0 of the warm-up steps; the official ramps go
# to sigma = 1, and "exp" reaches 63 percent at x = 1.
EMBEDDING_NOISE_WARMUPS: dict[str, Callable[[float], float]] = {
    "none": lambda x: 1.0,
    "linear": lambda x: min(x, 1.0),
    "cos": lambda x: (1 - math.cos(math.pi * min(x, 1.0))) / 2,
    "exp": lambda x: 1 - math.exp(-x),
}


@dataclass(frozen=True)
class TokenInitialization:
    """A student's input: tokens [B, L] int64, and the embedding noise float32 [B, L, D] or None."""

    tokens: Tensor
    noise: Tensor | None


def initial_state(
    model: MaskedModel,
    noise: ImageNoise,
    purpose: str,
    *,
    init_mask_ratio: float,
    embedding_noise: float,
    token_initialization: str = "mixed",
) -> TokenInitialization:
    """Draws x_init (sec. 3.3).

    - "mixed": random tokens of the codebook, round(r L) of them masked.
    - "masked": all masked, as a multi-step sampler starts.
    - "random": random tokens, none masked.
    - "fixed": as "mixed" with token 0 in place of every random one.

    `init_mask_ratio` is r, `embedding_noise` is sigma. `purpose` is the prefix of the names of the
    random streams.

    Raises:
        DimoError: Unknown token initialization.
    """
    if token_initialization not in TOKEN_INITIALIZATIONS:
        raise unknown_name("token initialization", token_initialization, TOKEN_INITIALIZATIONS)
    length = model.num_tokens
    tokens = noise.integers(f"{purpose}/init_tokens", (length,), model.codebook_size)
    if token_initialization == "masked":
        tokens = torch.full_like(tokens, model.mask_token_id)
    if token_initialization == "fixed":
        tokens = torch.zeros_like(tokens)
    if token_initialization in ("mixed", "fixed"):
        tokens = initialize_tokens(
            tokens,
            noise.random_ranks(f"{purpose}/init_mask", length),
            init_mask_ratio=init_mask_ratio,
            mask_token_id=model.mask_token_id,
        )
    perturbation = None
    if embedding_noise > 0:
        perturbation = noise.normal(f"{purpose}/init_noise", (length, model.hidden_dim))
    return TokenInitialization(tokens, perturbation)


def init_mask_ratio_at(
    seed: int, step: int, *, init_mask_ratio: float, bounds: tuple[float, float] | None
) -> float:
    """r for all images of one training step: fixed, or drawn uniformly between bounds."""
    if bounds is None:
        return init_mask_ratio
    low, high = bounds
    return low + (high - low) * float(
        rng.uniform(seed, torch.tensor([step]), "init_mask_ratio", ())
    )


def embedding_noise_at(step: int, *, final: float, warmup: str, warmup_steps: int) -> float:
    """sigma of global training step `step` (from 0), warmed up by `EMBEDDING_NOISE_WARMUPS`.

    Raises:
        DimoError: Unknown warm-up.
    """
    if warmup not in EMBEDDING_NOISE_WARMUPS:
        raise unknown_name("embedding noise warm-up", warmup, EMBEDDING_NOISE_WARMUPS)
    return final * EMBEDDING_NOISE_WARMUPS[warmup](step / max(1, warmup_steps))
