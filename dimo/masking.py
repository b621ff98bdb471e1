"""Mask schedules, forward masking and token initialization: pure functions on token grids.

One family of schedules gamma(u) serves training (how many tokens are re-masked), teacher training
and decoding (how many are revealed at each step).
"""

__all__ = [
    "MASK_SCHEDULES",
    "initialize_tokens",
    "mask_count",
    "mask_ratio",
    "random_mask",
    "tokens_per_step",
]

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dimo.errors import DimoError, unknown_name

# gamma: u in [0, 1] -> share of masked tokens, float64. In the convention of Maskgit-pytorch v1.0
# and Di[M]O; `linear` and `square` grow with u there, and fall in later code bases.
MASK_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda u: torch.arccos(u) / (math.pi / 2),
    "cosine": lambda u: torch.cos(u * (math.pi / 2)),
    "linear": lambda u: u,
    "square": lambda u: u**2,
}


def mask_ratio(schedule: str, u: Tensor) -> Tensor:
    """Share of masked tokens gamma(u) for uniform u.

    Args:
        schedule: A key of `MASK_SCHEDULES`.
        u: [B] in [0, 1].

    Raises:
        DimoError: Unknown schedule.
    """
    if schedule not in MASK_SCHEDULES:
        raise unknown_name("mask schedule", schedule, MASK_SCHEDULES)
    return MASK_SCHEDULES[schedule](u)


def mask_count(ratio: Tensor, num_tokens: int) -> Tensor:
    """Exact number of masked tokens, round(ratio * L) and at least one: int64 [B]."""
    return (ratio * num_tokens).round().to(torch.int64).clamp_min(1)


def random_mask(ranks: Tensor, count: Tensor | int) -> Tensor:
    """Masks exactly `count` positions of each image: bool [B, L], True = masked.

    Args:
        ranks: [B, L] a random permutation of 0..L-1 for each image.
        count: [B] or one number for all.
    """
    return ranks < (count[:, None] if isinstance(count, Tensor) else count)


def initialize_tokens(
    random_tokens: Tensor, ranks: Tensor, *, init_mask_ratio: float, mask_token_id: int
) -> Tensor:
    """Token initialization x_init (sec. 3.3): random tokens, round(r * L) of them masked.

    Args:
        random_tokens: [B, L] uniform over the codebook.
        ranks: [B, L] random permutations.
        init_mask_ratio: r in [0, 1].
        mask_token_id: What a masked position holds.
    """
    count = max(1, round(random_tokens.shape[1] * init_mask_ratio))
    return random_tokens.masked_fill(random_mask(ranks, count), mask_token_id)


def tokens_per_step(schedule: str, num_steps: int, num_tokens: int) -> list[int]:
    """How many tokens a decoder reveals at each step; sums to L, at least one a step.

    Cumulative rule of di4c (arXiv 2410.08709): after step i, gamma(i / n) * L tokens are still
    masked (arccos, two steps, 256 tokens: [85, 171]). A step that rounding would leave empty
    takes one token, and the last step takes what remains.

    Raises:
        DimoError: Steps outside 1..L, or a schedule that does not fall from 1 to 0.
    """
    if not 1 <= num_steps <= num_tokens:
        raise DimoError(
            f"steps {num_steps} is out of range; "
            f"a grid of {num_tokens} tokens takes 1 to {num_tokens} steps"
        )
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    ratio = mask_ratio(schedule, u)
    if ratio[0] < 1 - 1e-9 or ratio[-1] > 1e-9:
        raise DimoError(f"schedule {schedule!r} cannot decode; use arccos or cosine")
    left = [round(float(x) * num_tokens) for x in ratio]
    counts = [max(1, before - after) for before, after in pairwise(left)]
    counts[-1] = num_tokens - sum(counts[:-1])
    for step in range(num_steps - 2, -1, -1):  # small grids, many steps: give back what is too much
        give_back = min(counts[step] - 1, max(0, 1 - counts[-1]))
        counts[step] -= give_back
        counts[-1] += give_back
    return counts
