"""One-step sampling of a distilled student: x_init -> all tokens.

Few-step sampling of a one-step student re-masks part of its output and applies it again. Other
arguments and errors are those of `dimo.samplers.base.SamplerFunction`.
"""

from typing import Any

import torch
from torch import Tensor

from dimo.errors import DimoError, unknown_name
from dimo.initialization import TokenInitialization, initial_state
from dimo.masking import check_steps, mask_count, mask_ratio, random_mask
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.base import Callback, Samples, check_finite_logits, check_labels, draw_tokens


def sample_one_step(
    student: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    init_mask_ratio: float,
    embedding_noise: float,
    token_initialization: str = "mixed",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callback | None = None,
) -> Samples:
    """Samples all tokens at once, with one forward per image, from the `initial_state` of training.

    Args:
        init_mask_ratio: r.
        embedding_noise: sigma.
        top_k: Draw among the k likeliest tokens only; None = all.
        top_p: Draw among the likeliest tokens that together reach probability p; None = all.
    """
    check_labels(condition, student.num_classes)
    initial = initial_state(
        student,
        noise,
        "sample",
        init_mask_ratio=init_mask_ratio,
        embedding_noise=embedding_noise,
        token_initialization=token_initialization,
    )
    logits = student_logits(student, initial, condition, embedding_noise)
    logits = restrict_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = draw_tokens(logits, noise, "sample/tokens")
    if callback is not None:
        callback(0, tokens)
    return Samples(tokens=tokens, nfe=1, token_counts=[student.num_tokens])


def student_logits(
    student: MaskedModel, state: TokenInitialization, condition: Tensor, embedding_noise: float
) -> Tensor:
    """The student's logits of the codebook, float64 [B, L, V]."""
    logits = student(state.tokens, condition, embedding_noise=embedding_noise, noise=state.noise)
    logits = logits[..., : student.codebook_size].double()
    check_finite_logits(logits.isfinite())
    return logits


def restrict_logits(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Logits [.., V] divided by the temperature, -inf where top-k or top-p exclude a token.

    Top-p applies to the tokens that top-k keeps. Of equal logits the lower id ranks first.
    """
    vocabulary = logits.shape[-1]
    if temperature <= 0:
        raise DimoError(f"temperature {temperature:g} is not positive; 1 is as trained")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise DimoError(f"top-k {top_k} is out of range; it is 1 to {vocabulary}")
    if top_p is not None and not 0 < top_p <= 1:
        raise DimoError(f"top-p {top_p:g} is out of range; it is above 0 and at most 1")
    logits = logits / temperature
    if top_k is None and top_p is None:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = -torch.inf
    if top_p is not None:
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, ids, ordered)


_SCHEDULES = ("arccos", "cosine")  # the decreasing ones


def sample_few_step(
    student: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "arccos",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callback | None = None,
    **initialization: Any,
) -> Samples:
    """One step from x_init, then steps that redraw part of the tokens.

    Step i of n, i from 1, masks round(gamma(i / n) L) random positions of each image and draws
    them again given the others. With `num_steps` = 1 this is `sample_one_step`, whose arguments it
    shares.

    Args:
        num_steps: 1..L.
        mask_schedule: gamma, "arccos" or "cosine".
    """
    length, embedding_noise = student.num_tokens, initialization["embedding_noise"]
    check_steps(num_steps, length)
    if mask_schedule not in _SCHEDULES:
        raise unknown_name("few-step schedule", mask_schedule, _SCHEDULES)
    u = torch.arange(1, num_steps, dtype=torch.float64) / num_steps
    counts = mask_count(mask_ratio(mask_schedule, u), length).tolist()
    restrictions: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = {**initialization, **restrictions, "callback": callback}
    tokens = sample_one_step(student, condition, noise, **settings).tokens
    for step, count in enumerate(counts, start=1):
        mask = random_mask(noise.random_ranks(f"sample/mask/{step}", length), count)
        perturbation = None
        if embedding_noise > 0:
            perturbation = noise.normal(f"sample/noise/{step}", (length, student.hidden_dim))
        state = TokenInitialization(tokens.masked_fill(mask, student.mask_token_id), perturbation)
        logits = student_logits(student, state, condition, embedding_noise)
        logits = restrict_logits(logits, **restrictions)
        tokens = torch.where(mask, draw_tokens(logits, noise, f"sample/tokens/{step}"), tokens)
        if callback is not None:
            callback(step, tokens)
    return Samples(tokens=tokens, nfe=num_steps, token_counts=[length, *counts])
