"""Confidence-ordered parallel decoding of MaskGIT (Chang et al., arXiv 2202.04200, sec. 3.2).

Meissonic's sampler (arXiv 2410.08261) is that of aMUSEd: the same with constant guidance. Other
arguments and errors are those of `dimo.samplers.base.SamplerFunction`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.masking import tokens_per_step
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


def sample_confidence(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    unconditional: MaskedModel | None = None,
    callback: Callback | None = None,
) -> Samples:
    """Samples every masked token, keeps the most confident, masks the rest again, and repeats.

    Confidence is log p plus Gumbel noise scaled by `choice_temperature`, which falls linearly to
    zero at the last step. Guidance rises linearly from off at the first step to `guidance_scale`
    at the last. With `num_steps` = 1 the single step takes the last step's values.

    Args:
        num_steps: 1..L.
        mask_schedule: One of `DECODING_SCHEDULES`.
        choice_temperature: Scale of the confidence noise at the first step; 0 = none.
        unconditional: As in `Predictor`.
    """
    return sample_by_confidence(
        model,
        condition,
        noise,
        counts=tokens_per_step(mask_schedule, num_steps, model.num_tokens),
        guidance=lambda progress: 1 + (guidance_scale - 1) * progress,
        temperature=temperature,
        choice_temperature=choice_temperature,
        unconditional=unconditional,
        callback=callback,
    )


def sample_by_confidence(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    counts: Sequence[int],
    guidance: Callable[[float], float],
    temperature: float,
    choice_temperature: float,
    unconditional: MaskedModel | None = None,
    callback: Callback | None = None,
) -> Samples:
    """As `sample_confidence`, with any positive `counts` of tokens per step that sum to L.

    `guidance` is a function of progress, from 0 at the first step to 1 at the last.
    """
    if choice_temperature < 0:
        raise DimoError(f"choice temperature {choice_temperature:g} is negative; 0 is no noise")
    predict = Predictor(model, condition, noise, unconditional)
    tokens, masked = predict.all_masked(), model.num_tokens
    for step, count in enumerate(counts):
        progress = progress_of(step, len(counts))
        scale = guidance(progress)
        positions = masked_positions(tokens == model.mask_token_id, masked)  # [B, K]
        log_p = predict(tokens, step, positions, guidance_scale=scale, temperature=temperature)
        proposal = draw_tokens(log_p, noise, f"sample/tokens/{step}", positions)  # [B, K]
        confidence = log_p.gather(-1, proposal[..., None])[..., 0]
        choice_noise = noise.gumbel(f"sample/choice/{step}", (model.num_tokens,))
        confidence += choice_temperature * (1 - progress) * choice_noise.gather(1, positions)
        revealed = tokens.gather(1, positions) != model.mask_token_id
        confidence.masked_fill_(revealed, -torch.inf)
        chosen = confidence.topk(count, dim=-1).indices
        tokens = tokens.scatter(1, positions.gather(1, chosen), proposal.gather(1, chosen))
        masked -= count
        if callback is not None:
            callback(step, tokens)
    return Samples(tokens=tokens, nfe=predict.nfe, token_counts=list(counts))


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

    It differs from `sample_confidence` in its guidance, which is the same at every step, and in the
    default counts and noise. Its source calls the noise temperature, (2, 0): from the first step to
    the last. The null condition is a negative prompt.
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
