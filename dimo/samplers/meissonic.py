"""Meissonic's sampler (arXiv 2410.08261), as aMUSEd's: by confidence, with constant guidance."""

__all__ = ["sample_meissonic"]

from torch import Tensor

from dimo.masking import tokens_per_step
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.confidence import sample_by_confidence
from dimo.samplers.types import Callback, Samples


def sample_meissonic(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "cosine-amused",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    choice_temperature: float = 2.0,
    callback: Callback | None = None,
) -> Samples:
    """Samples every masked token, keeps the most confident, masks the rest again, and repeats.

    It differs from `sample_confidence` in that guidance is the same at every step, in the counts
    and in the strength of the noise. Its source calls the latter temperature, (2, 0): from the
    first step to the last.

    Args:
        model: Masked model in eval mode; dropped conditions are its negative prompt.
        condition: [B] int64 numbers of prompts.
        noise: The images' random numbers.
        num_steps: 1..L.
        mask_schedule: One of `DECODING_SCHEDULES`: how many tokens each step reveals.
        guidance_scale: s at every step; 1 = off.
        temperature: Divides the logits; 1 = as trained.
        choice_temperature: Of the confidence noise at the first step; 0 = none.
        callback: Called after each step with its number (from 0) and the tokens [B, L].

    Raises:
        DimoError: A setting or label out of range, an unknown schedule.
    """
    return sample_by_confidence(
        model,
        condition,
        noise,
        counts=tokens_per_step(mask_schedule, num_steps, model.num_tokens),
        guidance=lambda progress: guidance_scale,
        temperature=temperature,
        choice_temperature=choice_temperature,
        callback=callback,
    )
