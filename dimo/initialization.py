"""The student's input x_init (sec. 3.3): its tokens, and the perturbation of their embeddings.

Training and sampling use the same law.
"""

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

# Share of the final sigma after x of the warm-up steps, x >= 0; see `embedding_noise_at`.
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
    - "masked": the mask token everywhere, as a multi-step sampler starts.
    - "random": random tokens everywhere, none masked.
    - "fixed": as "mixed" with token 0 in place of every random one.

    Args:
        model: The student.
        noise: Per-image random streams.
        purpose: Prefix of the streams' names.
        init_mask_ratio: r; unused by "masked" and "random".
        embedding_noise: sigma; 0 draws no noise.
        token_initialization: One of `TOKEN_INITIALIZATIONS`.

    Raises:
        DimoError: Unknown token initialization.
    """
    if token_initialization not in TOKEN_INITIALIZATIONS:
        raise unknown_name("token initialization", token_initialization, TOKEN_INITIALIZATIONS)
    length = model.num_tokens
    tokens = noise.integers(f"{purpose}/init_tokens", (length,), model.codebook_size)
    if token_initialization == "fixed":
        tokens = torch.zeros_like(tokens)
    if token_initialization == "masked":
        tokens = torch.full_like(tokens, model.mask_token_id)
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
    """r of one training step, the same for all its images: fixed, or uniform between bounds."""
    if bounds is None:
        return init_mask_ratio
    low, high = bounds
    u = float(rng.uniform(seed, torch.tensor([step]), "init_mask_ratio", ()))
    return low + (high - low) * u


def embedding_noise_at(step: int, *, final: float, warmup: str, warmup_steps: int) -> float:
    """sigma of one training step: `final`, or a ramp from 0 towards it over N warm-up steps.

    With x = step / N: "linear" is min(x, 1), "cos" is (1 - cos(pi min(x, 1))) / 2, "exp" is
    1 - exp(-x), which reaches 63 percent after N steps. The official ramps go to
    `final` = 1. These depend on the global step, so they continue after a resume.

    Args:
        step: From 0.
        final: sigma.
        warmup: A key of `EMBEDDING_NOISE_WARMUPS`.
        warmup_steps: N; unused by "none".

    Raises:
        DimoError: Unknown warm-up.
    """
    if warmup not in EMBEDDING_NOISE_WARMUPS:
        raise unknown_name("embedding noise warm-up", warmup, EMBEDDING_NOISE_WARMUPS)
    return final * EMBEDDING_NOISE_WARMUPS[warmup](step / max(1, warmup_steps))
