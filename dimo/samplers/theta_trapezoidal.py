"""theta-trapezoidal sampling of absorbing-state discrete diffusion (Ren et al., arXiv 2502.00234).

Second order, two predictions a step. With the intensities mu of `tau_leaping`, a step t -> t - h is

    x*      = leap of length theta h from x_t with mu_t(x_t)
    x_{t-h} = leap of length (1 - theta) h from x*
              with max(0, a1 mu_{t - theta h}(x*) - a2 mu_t(x_t)),
    a1 = 1 / (2 theta (1 - theta)),    a2 = a1 - 1 = ((1 - theta)^2 + theta^2) a1.

Where the positive part cuts, the step is first order.
"""

__all__ = ["sample_theta_trapezoidal", "trapezoidal_weights"]

from torch import Tensor

from dimo.errors import DimoError
from dimo.masking import unmasking_rate
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.predictor import Predictor, masked_positions
from dimo.samplers.tau_leaping import (
    check_predictions,
    expected_counts,
    leap,
    leap_law,
)
from dimo.samplers.types import Callback, Samples


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
    The last prediction, at t = 1/n, draws all that is still masked (the rate diverges at t = 0).
    The n - 1 before it come in pairs, a step of h = 2/n each; a prediction left over is a tau-leap
    of 1/n at the start. Guidance rises linearly in time, from off at t = 1 to `guidance_scale` at
    the last prediction.

    Args:
        model: Masked model in eval mode.
        condition: [B] int64 labels.
        noise: The images' random numbers.
        num_steps: n, at least 1; may exceed L.
        theta: Where in a step the second prediction is, strictly between 0 and 1.
        mask_schedule: A key of `UNMASKING_RATES`, alpha_t.
        guidance_scale: s at the last prediction; 1 = off.
        temperature: Divides the logits; 1 = as trained.
        callback: Called after each prediction with its number (from 0) and the tokens [B, L].

    Raises:
        DimoError: A setting or label out of range, an unknown schedule.
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
    """(a1, a2) of the second leap; a1 - a2 = 1.

    Raises:
        DimoError: Theta outside (0, 1).
    """
    if not 0 < theta < 1:
        raise DimoError(f"theta {theta:g} is out of range; it lies strictly between 0 and 1")
    a1 = 1 / (2 * theta * (1 - theta))
    return a1, a1 - 1
