"""Mask schedules gamma(u), forward masking and token initialization: pure functions on tokens."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dimo.errors import DimoError, unknown_name

# MAGE's distribution of the mask ratio (arXiv 2211.09117): a truncated normal
_MEAN, _DEVIATION, _LOWEST, _HIGHEST = 0.55, 0.25, 0.5, 1.0


def _truncated_normal(u: Tensor) -> Tensor:
    """Inverse CDF of the truncated normal."""
    bounds = torch.tensor([_LOWEST, _HIGHEST], dtype=torch.float64, device=u.device)
    below, above = torch.special.ndtr((bounds - _MEAN) / _DEVIATION)
    z = torch.special.ndtri(below + u.double() * (above - below))
    ratio: Tensor = (_MEAN + _DEVIATION * z).clamp(_LOWEST, _HIGHEST)
    return ratio.to(u.dtype)


# gamma: u in [0, 1] -> fraction of masked tokens, in the convention of Maskgit-pytorch v1.0 and
# Di[M]O; `linear` and `square` increase with u, in later code bases they decrease.
Schedule = Callable[[Tensor], Tensor]
MASK_SCHEDULES: dict[str, Schedule] = {
    "arccos": lambda u: torch.arccos(u) / (math.pi / 2),
    "cosine": lambda u: torch.cos(u * (math.pi / 2)),
    "linear": lambda u: u,
    "square": lambda u: u**2,
    "mage": _truncated_normal,
}

# How decoding turns a schedule into counts; see `tokens_per_step`.
DECODING_SCHEDULES = (
    "arccos",
    "cosine",
    "arccos-halton",
    "arccos-v1",
    "cosine-v1",
    "cosine-amused",
)

# Noise schedules of absorbing-state diffusion; see `unmasking_rate` and `mask_probability`.
UNMASKING_RATES: dict[str, Callable[[float], float]] = {
    "log-linear": lambda t: 1 / t,
    "cosine": lambda t: math.pi / 2 / math.tan(math.pi / 2 * t),
    "arccos": lambda t: 1 / (math.acos(1 - t) * math.sqrt(t * (2 - t))),
}
MASK_PROBABILITIES: dict[str, Callable[[float], float]] = {
    "log-linear": lambda t: t,
    "cosine": lambda t: math.sin(math.pi / 2 * t),
    "arccos": lambda t: math.acos(1 - t) / (math.pi / 2),
}


def mask_ratio(schedule: str, u: Tensor) -> Tensor:
    """Fraction of masked tokens gamma(u) [B] for uniform u [B] in [0, 1].

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
    """Masks exactly `count` ([B], or one for all) positions of each image: bool [B, L].

    `ranks` [B, L] holds a random permutation of 0..L-1 for each image.
    """
    return ranks < (count[:, None] if isinstance(count, Tensor) else count)


def initialize_tokens(
    random_tokens: Tensor, ranks: Tensor, *, init_mask_ratio: float, mask_token_id: int
) -> Tensor:
    """Token initialization x_init (sec. 3.3): random tokens [B, L], round(r * L) of them masked.

    `ranks` [B, L] holds random permutations; `init_mask_ratio` is r in [0, 1].
    """
    count = max(1, round(random_tokens.shape[1] * init_mask_ratio))
    return random_tokens.masked_fill(random_mask(ranks, count), mask_token_id)


def tokens_per_step(schedule: str, num_steps: int, num_tokens: int) -> list[int]:
    """How many tokens a decoder reveals in each of n steps: at least one per step, L in total.

    A step without tokens under the schedule reveals one; the last step reveals what remains.

    - "arccos", "cosine": after step i, round(gamma(i / n) * L) tokens are masked, the cumulative
      rule of di4c (arXiv 2410.08709); arccos, two steps, 256 tokens: [85, 171].
    - "arccos-halton": Halton-MaskGIT: after step i,
      floor((1 - arccos(i / n) / (pi / 2)) * L) tokens are revealed.
    - "arccos-v1", "cosine-v1": Maskgit-pytorch v1.0 and Di[M]O: step i reveals a fraction of all
      tokens proportional to gamma(1 - i / (n - 1)), i from 0; arccos, two steps: [1, 255].
    - "cosine-amused": aMUSEd and Meissonic: after step i, floor(gamma(i / n) * L) tokens are
      masked; 4096 tokens, three steps: [549, 1500, 2047].

    Raises:
        DimoError: Steps outside 1..L, unknown schedule.
    """
    check_steps(num_steps, num_tokens)
    if schedule not in DECODING_SCHEDULES:
        raise unknown_name("decoding schedule", schedule, DECODING_SCHEDULES)
    name, _, rule = schedule.partition("-")
    counts = _COUNTING_RULES[rule](MASK_SCHEDULES[name], num_steps, num_tokens)
    counts = [max(1, count) for count in counts]
    counts[-1] = num_tokens - sum(counts[:-1])
    for step in range(num_steps - 2, -1, -1):  # many steps on a small grid: leave one for the last
        give_back = min(counts[step] - 1, max(0, 1 - counts[-1]))
        counts[step] -= give_back
        counts[-1] += give_back
    return counts


def check_steps(num_steps: int, num_tokens: int) -> None:
    """Raises a `DimoError` unless the number of steps is in 1..L: each reveals a token or more."""
    if not 1 <= num_steps <= num_tokens:
        raise DimoError(
            f"steps {num_steps} is out of range; "
            f"a grid of {num_tokens} tokens takes 1 to {num_tokens} steps"
        )


def unmasking_rate(schedule: str) -> Callable[[float], float]:
    """The rate at which a masked token is revealed at time t in (0, 1], -alpha'_t / (1 - alpha_t).

    Time runs from t = 1 to 0, where the rate diverges; 1 - alpha_t is the `mask_probability`.

    Raises:
        DimoError: Unknown schedule.
    """
    if schedule not in UNMASKING_RATES:
        raise unknown_name("noise schedule", schedule, UNMASKING_RATES)
    return UNMASKING_RATES[schedule]


def mask_probability(schedule: str) -> Callable[[float], float]:
    """The probability 1 - alpha_t with which absorbing-state diffusion masks a token, t in [0, 1].

    It is t for "log-linear", gamma(1 - t) for "cosine" and "arccos".

    Raises:
        DimoError: Unknown schedule.
    """
    if schedule not in MASK_PROBABILITIES:
        raise unknown_name("noise schedule", schedule, MASK_PROBABILITIES)
    return MASK_PROBABILITIES[schedule]


def _cumulative(gamma: Schedule, num_steps: int, num_tokens: int) -> list[int]:
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    masked = [round(float(x) * num_tokens) for x in gamma(u)]
    return [before - after for before, after in pairwise(masked)]


def _floored(gamma: Schedule, num_steps: int, num_tokens: int) -> list[int]:
    # float32, because floor depends on the last digit: 24 x 24 tokens, two steps: [191, 385]
    u = torch.tensor([(step + 1) / num_steps for step in range(num_steps)])
    targets = ((1 - gamma(u)) * num_tokens).int().tolist()
    revealed = [max(step + 1, target) for step, target in enumerate(targets)]
    return [after - before for before, after in pairwise([0, *revealed])]


def _floored_masked(gamma: Schedule, num_steps: int, num_tokens: int) -> list[int]:
    # float32, as above: 4096 * cos(pi / 3) becomes 2047
    u = torch.tensor([(step + 1) / num_steps for step in range(num_steps)])
    masked = [num_tokens, *(num_tokens * gamma(u)).int().tolist()]
    return [before - after for before, after in pairwise([*masked[:-1], 0])]


def _proportional(gamma: Schedule, num_steps: int, num_tokens: int) -> list[int]:
    if num_steps == 1:
        return [num_tokens]
    weights = gamma(torch.linspace(1, 0, num_steps))
    return (weights / weights.sum() * num_tokens).round().int().tolist()


# suffix of a decoding schedule -> how it turns gamma into counts
_COUNTING_RULES = {
    "": _cumulative,
    "halton": _floored,
    "v1": _proportional,
    "amused": _floored_masked,
}
