"""Few-step sampling of a one-step student: its output is re-masked and it is applied again."""

__all__ = ["sample_few_step"]

import torch
from torch import Tensor

from dimo.errors import unknown_name
from dimo.initialization import TokenInitialization
from dimo.masking import check_steps, mask_count, mask_ratio, random_mask
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.one_step import restrict_logits, sample_one_step, student_logits
from dimo.samplers.predictor import draw_tokens
from dimo.samplers.types import Callback, Samples

_SCHEDULES = ("arccos", "cosine")  # those that fall


def sample_few_step(
    student: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    init_mask_ratio: float,
    embedding_noise: float,
    token_initialization: str = "mixed",
    mask_schedule: str = "arccos",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callback | None = None,
) -> Samples:
    """One step from x_init, then again and again with part of the tokens masked.

    Step i of n, i from 1, masks round(gamma(i / n) L) random positions of each image and draws
    them again given the rest. One step is `sample_one_step`.

    Args:
        student: The generator.
        condition: [B] int64 labels.
        noise: The images' random numbers.
        num_steps: 1..L.
        init_mask_ratio: r of its training.
        embedding_noise: sigma of its training, at every step.
        token_initialization: Of its training, see `dimo.initialization`.
        mask_schedule: "arccos" or "cosine", gamma.
        temperature: Divides the logits; 1 = as trained.
        top_k: Draws among the k likeliest tokens only; None = all.
        top_p: Draws among the likeliest tokens that together reach probability p; None = all.
        callback: Called after each step with its number (from 0) and the tokens [B, L].

    Raises:
        DimoError: A setting or label out of range, an unknown schedule.
    """
    length = student.num_tokens
    check_steps(num_steps, length)
    if mask_schedule not in _SCHEDULES:
        raise unknown_name("few-step schedule", mask_schedule, _SCHEDULES)
    u = torch.arange(1, num_steps, dtype=torch.float64) / num_steps
    counts = mask_count(mask_ratio(mask_schedule, u), length).tolist()
    tokens = sample_one_step(
        student,
        condition,
        noise,
        init_mask_ratio=init_mask_ratio,
        embedding_noise=embedding_noise,
        token_initialization=token_initialization,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        callback=callback,
    ).tokens
    for step, count in enumerate(counts, start=1):
        mask = random_mask(noise.random_ranks(f"sample/mask/{step}", length), count)
        perturbation = None
        if embedding_noise > 0:
            perturbation = noise.normal(f"sample/noise/{step}", (length, student.hidden_dim))
        state = TokenInitialization(tokens.masked_fill(mask, student.mask_token_id), perturbation)
        logits = student_logits(student, state, condition, embedding_noise)
        logits = restrict_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        tokens = torch.where(mask, draw_tokens(logits, noise, f"sample/tokens/{step}"), tokens)
        if callback is not None:
            callback(step, tokens)
    return Samples(tokens=tokens, nfe=num_steps, token_counts=[length, *counts])
