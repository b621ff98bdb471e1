"""Parallel decoding in an order that does not look at the tokens: random, or a given one."""

__all__ = ["sample_in_order", "sample_random"]

from collections.abc import Callable, Sequence

from torch import Tensor

from dimo.masking import tokens_per_step
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.predictor import Predictor, draw_tokens, padded_count, progress_of
from dimo.samplers.types import Callback, Samples


def sample_random(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    callback: Callback | None = None,
) -> Samples:
    """Reveals positions in a uniformly random order, the order in which the model was trained.

    Of an exact model, L steps sample the exact law. Guidance rises linearly from off at the first
    step to `guidance_scale` at the last.

    Args:
        model: Masked model in eval mode.
        condition: [B] int64 labels.
        noise: The images' random numbers.
        num_steps: 1..L.
        mask_schedule: One of `DECODING_SCHEDULES`: how many tokens each step reveals.
        guidance_scale: s at the last step; 1 = off.
        temperature: Divides the logits; 1 = as trained.
        callback: Called after each step with its number (from 0) and the tokens [B, L].

    Raises:
        DimoError: A setting or label out of range, an unknown schedule.
    """
    return sample_in_order(
        model,
        condition,
        noise,
        noise.random_ranks("sample/order", model.num_tokens).argsort(1),
        counts=tokens_per_step(mask_schedule, num_steps, model.num_tokens),
        guidance=lambda progress: 1 + (guidance_scale - 1) * progress,
        temperature=lambda progress: temperature,
        callback=callback,
    )


def sample_in_order(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    order: Tensor,
    *,
    counts: Sequence[int],
    guidance: Callable[[float], float],
    temperature: Callable[[float], float],
    callback: Callback | None = None,
) -> Samples:
    """Reveals the positions in the given order, `counts[i]` of them at step i.

    Args:
        model: Masked model in eval mode.
        condition: [B] int64 labels.
        noise: The images' random numbers.
        order: [B, L], the positions as they are revealed, each once.
        counts: Positive numbers that sum to L.
        guidance: Progress, from 0 at the first step to 1 at the last -> guidance scale.
        temperature: Progress -> temperature.
        callback: Called after each step with its number (from 0) and the tokens [B, L].

    Raises:
        DimoError: A setting or label out of range.
    """
    predict = Predictor(model, condition, noise)
    tokens, length, done = predict.all_masked(), model.num_tokens, 0
    for step, count in enumerate(counts):
        progress = progress_of(step, len(counts))
        asked = padded_count(count, length)
        start = min(done, length - asked)
        positions = order[:, start : start + asked]  # [B, K]; this step reveals `now` of them
        now = slice(done - start, done - start + count)
        log_p = predict(
            tokens,
            step,
            positions,
            guidance_scale=guidance(progress),
            temperature=temperature(progress),
        )[:, now]
        proposal = draw_tokens(log_p, noise, f"sample/tokens/{step}", positions[:, now])
        tokens = tokens.scatter(1, positions[:, now], proposal)
        done += count
        if callback is not None:
            callback(step, tokens)
    return Samples(tokens=tokens, nfe=predict.nfe, token_counts=list(counts))
