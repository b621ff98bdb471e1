"""Parallel decoding in an order that does not depend on the tokens: random, or Halton's.

Halton order: Besnier et al., Halton scheduler for MaskGIT, arXiv 2503.17076. A low-discrepancy
sequence spreads the tokens of each step over the grid, so that tokens drawn together are far apart
and hence nearly independent. Other arguments and errors are those of
`dimo.samplers.base.SamplerFunction`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.guidance import guidance_scales
from dimo.masking import tokens_per_step
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.base import (
    Callback,
    Predictor,
    Samples,
    draw_tokens,
    padded_count,
    progress_of,
    temperature_between,
)
from dimo.samplers.inpainting import Inpainting


def sample_random(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    guidance_rule: str | None = None,
    temperature: float = 1.0,
    final_temperature: float | None = None,
    callback: Callback | None = None,
) -> Samples:
    """Reveals positions in a uniformly random order, the order in which the model was trained.

    With an exact model, L steps sample the exact law. With a `guidance_rule`, L steps sample the
    law that a Di[M]O student converges to under that rule of its teacher's guidance.

    Args:
        num_steps: 1..L.
        mask_schedule: One of `DECODING_SCHEDULES`.
        guidance_rule: One of `dimo.guidance.GUIDANCE_RULES`, for the fraction of tokens that are
            masked before each step; None: linear from off at the first step to the scale.
        final_temperature: Temperature where nothing is masked; the inverse is linear in the
            fraction that is. None = `temperature` throughout.
    """
    length = model.num_tokens
    counts = tokens_per_step(mask_schedule, num_steps, length)
    steps = range(len(counts))
    masked = [sum(counts[step:]) / length for step in steps]
    temperatures = [temperature] * len(counts)
    if final_temperature is not None:
        temperatures = [temperature_between(temperature, final_temperature, 1 - r) for r in masked]
    if guidance_rule is None:
        guidance = [1 + (guidance_scale - 1) * progress_of(step, len(counts)) for step in steps]
    else:
        guidance = [guidance_scales(guidance_rule, guidance_scale, rho) for rho in masked]
    return sample_in_order(
        model,
        condition,
        noise,
        noise.random_ranks("sample/order", length).argsort(1),
        counts=counts,
        guidance=guidance,
        temperature=temperatures,
        callback=callback,
    )


def sample_in_order(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    order: Tensor,
    *,
    counts: Sequence[int],
    guidance: Sequence[float],
    temperature: Sequence[float],
    callback: Callback | None = None,
) -> Samples:
    """Reveals the positions in the given order [B, L], a permutation of them for each image.

    Each step has a count of tokens, a guidance scale and a temperature; the counts are positive and
    sum to L.
    """
    predict = Predictor(model, condition, noise)
    tokens, length, done = predict.all_masked(), model.num_tokens, 0
    for step, count in enumerate(counts):
        asked = padded_count(count, length)
        start = min(done, length - asked)
        positions = order[:, start : start + asked]  # [B, K]; this step reveals `now` of them
        now = slice(done - start, done - start + count)
        settings = {"guidance_scale": guidance[step], "temperature": temperature[step]}
        log_p = predict(tokens, step, positions, **settings)[:, now]
        proposal = draw_tokens(log_p, noise, f"sample/tokens/{step}", positions[:, now])
        tokens = tokens.scatter(1, positions[:, now], proposal)
        done += count
        if callback is not None:
            callback(step, tokens)
    return Samples(tokens=tokens, nfe=predict.nfe, token_counts=list(counts))


def sample_halton(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "arccos-halton",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    final_temperature: float | None = None,
    random_start: bool = False,
    callback: Callback | None = None,
) -> Samples:
    """Reveals positions in Halton order, with the same guidance at every step.

    Args:
        num_steps: 1..L.
        mask_schedule: One of `DECODING_SCHEDULES`.
        final_temperature: Temperature of the last step; the inverse is linear in between, as in
            Halton-MaskGIT (its example: inverse from 1 to 1.2). None = `temperature` throughout.
        random_start: Start each image at a random place of the order, which then wraps.

    Raises:
        DimoError: Also for a grid that is not square.
    """
    length = model.num_tokens
    counts = tokens_per_step(mask_schedule, num_steps, length)
    turn = torch.arange(length, device=condition.device).expand(len(condition), -1)  # [B, L]
    if random_start:
        turn = (turn - noise.integers("sample/start", (1,), length)) % length
    mask = model.known.mask if isinstance(model, Inpainting) else torch.ones(length).bool()
    order = masked_halton_order(mask.cpu()).to(condition.device)[turn]
    last = temperature if final_temperature is None else final_temperature
    if min(temperature, last) <= 0:
        raise DimoError(f"temperature {min(temperature, last):g} is not positive; 1 is as trained")
    return sample_in_order(
        model,
        condition,
        noise,
        order,
        counts=counts,
        guidance=[guidance_scale] * len(counts),
        temperature=[
            temperature_between(temperature, last, progress_of(step, len(counts)))
            for step in range(len(counts))
        ],
        callback=callback,
    )


def masked_halton_order(mask: Tensor) -> Tensor:
    """The `halton_order` of the masked cells of a grid, bool [L], numbered among them: int64 [K].

    Raises:
        DimoError: The grid is not square.
    """
    side = math.isqrt(len(mask))
    if side * side != len(mask):
        raise DimoError(f"{len(mask)} tokens are no square grid; the Halton order needs one")
    order = halton_order(side)
    return (mask.cumsum(0) - 1)[order[mask[order]]]


@lru_cache(maxsize=8)
def halton_order(side: int) -> Tensor:
    """The flat positions (row-major) of a square grid in the order they are revealed, int64 [L].

    Point n of the sequence (n = 1, 2, ...) is the radical inverse of n in base 2 (row) and base 3
    (column), times `side`, floored, in float32 as in Halton-MaskGIT; cells that occurred before are
    skipped. Unlike Halton-MaskGIT, points are added until every cell has occurred.
    """
    from scipy.stats.qmc import Halton  # slow to import

    cells = side * side
    count = 4 * cells
    while True:
        points = torch.from_numpy(Halton(2, scramble=False).random(count + 1)[1:]).float()
        row, column = (points * side).long().T
        visited, cell_of_point = torch.unique(row * side + column, return_inverse=True)
        if len(visited) == cells:
            break
        count *= 2
    first = torch.full((cells,), count)
    return first.scatter_reduce(0, cell_of_point, torch.arange(count), "amin").argsort()
