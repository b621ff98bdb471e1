"""tau-leaping and theta-trapezoidal sampling of absorbing-state discrete diffusion.

tau-leaping is of Campbell et al., arXiv 2205.14987; for masked image models and theta-trapezoidal
see Ren et al., arXiv 2502.00234. Time runs from t = 1 (all masked) to t = 0. A masked position d
jumps to token v with intensity

    mu_t(d, v) = r(t) p(x_d = v | x_t),    r(t) = -alpha'_t / (1 - alpha_t)    (1/t for log-linear)

and a revealed position never jumps. A leap of length h keeps the intensities of its start.
theta-trapezoidal is second order with two predictions per step; a step t -> t - h is

    x*      = leap of length theta h from x_t with mu_t(x_t)
    x_{t-h} = leap of length (1 - theta) h from x*
              with max(0, a1 mu_{t - theta h}(x*) - a2 mu_t(x_t)),
    a1 = 1 / (2 theta (1 - theta)),    a2 = a1 - 1 = ((1 - theta)^2 + theta^2) a1.

Where the positive part cuts, the step is first order. Other arguments and errors are those of
`dimo.samplers.base.SamplerFunction`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.masking import unmasking_rate
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.base import (
    Callback,
    Predictor,
    Samples,
    draw_tokens,
    masked_positions,
    progress_of,
)


def sample_tau_leaping(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "log-linear",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    callback: Callback | None = None,
) -> Samples:
    """First-order simulation of the reverse process on the grid t = 1, 1 - 1/n, ..., 1/n, 0.

    The rate diverges towards t = 0, where every token is revealed; so the last of the n predictions
    draws all that are still masked (taking the likeliest instead would distort the law). Guidance
    rises linearly in time, from off at t = 1 to `guidance_scale` at the last prediction.

    Args:
        num_steps: n, at least 1; may exceed L.
        mask_schedule: A key of `UNMASKING_RATES`, alpha_t.
    """
    check_predictions(num_steps)
    rate = unmasking_rate(mask_schedule)
    hazards = [rate(1 - step / num_steps) / num_steps for step in range(num_steps - 1)]
    predict = Predictor(model, condition, noise)
    tokens = predict.all_masked()
    for step in range(num_steps):
        scale = 1 + (guidance_scale - 1) * progress_of(step, num_steps)
        positions = masked_positions(tokens == model.mask_token_id)
        log_p = predict(tokens, step, positions, guidance_scale=scale, temperature=temperature)
        law = leap_law(hazards[step] * log_p.exp()) if step < num_steps - 1 else log_p
        tokens = leap(tokens, law, positions, model, noise, step)
        if callback is not None:
            callback(step, tokens)
    counts = expected_counts(hazards, model.num_tokens)
    return Samples(tokens=tokens, nfe=predict.nfe, token_counts=counts)


def leap(
    tokens: Tensor,
    law: Tensor,
    positions: Tensor,
    model: MaskedModel,
    noise: ImageNoise,
    step: int,
) -> Tensor:
    """Draws the masked tokens at `positions` [B, K] after leap number `step`: tokens [B, L].

    `law` holds log-probabilities [B, K, V + 1] of `leap_law`; with [B, K, V], nothing stays masked.
    """
    before = tokens.gather(1, positions)
    outcome = draw_tokens(law, noise, f"sample/tokens/{step}", positions)
    jumps = (before == model.mask_token_id) & (outcome < model.codebook_size)
    return tokens.scatter(1, positions, torch.where(jumps, outcome, before))


def leap_law(intensity: Tensor) -> Tensor:
    """Log-probabilities of a masked position after a leap: [.., V + 1], last = still masked.

    `intensity` [.., V] is non-negative and multiplied by the length of the leap. The first event
    comes within the leap with probability 1 - exp(-sum), and is v with probability
    intensity_v / sum. A revealed token never jumps again, so that event decides. (Counting events
    in each class and rejecting positions with more than one loses jumps to first order in the
    length of the leap.)
    """
    total = intensity.sum(-1, keepdim=True)
    possible = total > 0
    log_jump = (-torch.expm1(-total)).log() - total.log()  # nan where nothing can jump
    log_token = torch.where(possible, intensity.log() + log_jump, -torch.inf)
    return torch.cat([log_token, -total], dim=-1)


def expected_counts(hazards: Sequence[float], num_tokens: int) -> list[int]:
    """Expected tokens that leaps of these hazards reveal, then the rest; rounded to sum to L."""
    masked, hazard = [num_tokens], 0.0
    for more in [*hazards, math.inf]:
        hazard += more
        masked.append(round(num_tokens * math.exp(-hazard)))
    return [before - after for before, after in pairwise(masked)]


def check_predictions(num_steps: int) -> None:
    """Refuses fewer than one prediction; continuous time allows any other number."""
    if num_steps < 1:
        raise DimoError(f"steps {num_steps} is out of range; this sampler takes 1 or more")


def sample_theta_trapezoidal(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    theta: float = 0.5,
    mask_schedule: str = "log-linear",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    callback: Callback | None = None,
) -> Samples:
    """Second-order simulation of the reverse process with n predictions in all.

    `num_steps` counts predictions, so that equal steps cost the same as with any other sampler.
    The last prediction, at t = 1/n, draws all that are still masked (the rate diverges at t = 0).
    The n - 1 before it come in pairs, a step of h = 2/n each; if n - 1 is odd, the first is a
    tau-leap of 1/n. Guidance is that of `sample_tau_leaping`.

    Args:
        num_steps: n, at least 1; may exceed L.
        theta: Position of the second prediction in a step, strictly between 0 and 1.
        mask_schedule: A key of `UNMASKING_RATES`, alpha_t.
        callback: Called after each prediction, not each step.
    """
    check_predictions(num_steps)
    rate_at = unmasking_rate(mask_schedule)
    a1, a2 = trapezoidal_weights(theta)
    predict = Predictor(model, condition, noise)
    tokens = predict.all_masked()
    hazards: list[float] = []  # of the leaps so far

    def log_probabilities(t: float, positions: Tensor) -> Tensor:
        progress = (1 - t) / (1 - 1 / num_steps) if num_steps > 1 else 1.0
        scale = 1 + (guidance_scale - 1) * progress
        step = len(hazards)
        return predict(tokens, step, positions, guidance_scale=scale, temperature=temperature)

    def jump(length: float, intensity: Tensor, positions: Tensor, rate: float) -> Tensor:
        step = len(hazards)
        hazards.append(length * rate)
        after = leap(tokens, leap_law(length * intensity), positions, model, noise, step)
        if callback is not None:
            callback(step, after)
        return after

    while len(hazards) < num_steps - 1:
        t = 1 - len(hazards) / num_steps
        rate = rate_at(t)
        positions = masked_positions(tokens == model.mask_token_id)
        intensity = rate * log_probabilities(t, positions).exp()
        if (num_steps - 1 - len(hazards)) % 2 == 1:
            tokens = jump(1 / num_steps, intensity, positions, rate)
            continue
        h = 2 / num_steps
        tokens = jump(theta * h, intensity, positions, rate)
        t -= theta * h
        middle_rate = rate_at(t)
        middle_intensity = middle_rate * log_probabilities(t, positions).exp()
        intensity = (a1 * middle_intensity - a2 * intensity).clamp_min(0)
        tokens = jump((1 - theta) * h, intensity, positions, a1 * middle_rate - a2 * rate)
    positions = masked_positions(tokens == model.mask_token_id)
    log_p = log_probabilities(1 / num_steps, positions)
    tokens = leap(tokens, log_p, positions, model, noise, num_steps - 1)
    if callback is not None:
        callback(num_steps - 1, tokens)
    counts = expected_counts(hazards, model.num_tokens)
    return Samples(tokens=tokens, nfe=predict.nfe, token_counts=counts)


def trapezoidal_weights(theta: float) -> tuple[float, float]:
    """(a1, a2) of the second leap; a `DimoError` for theta outside (0, 1)."""
    if not 0 < theta < 1:
        raise DimoError(f"theta {theta:g} is out of range; it must be strictly between 0 and 1")
    a1 = 1 / (2 * theta * (1 - theta))
    return a1, a1 - 1
