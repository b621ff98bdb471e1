"""What the methods share that learn from a teacher's way through masked data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dimo import rng
from dimo.models import MaskedModel


@dataclass(frozen=True)
class DataDraw:
    """Images of the data set, as tokens."""

    tokens: Tensor  # x_0 [B, L] int64
    labels: Tensor  # [B] int64
    drop: Tensor  # [B] bool, True = without its label


def draw_data(
    tokens: Tensor, labels: Tensor, seed: int, index: Tensor, *, label_dropout: float
) -> DataDraw:
    """Images drawn with replacement from tokens [N, L] and labels [N], for rows `index` [B]."""
    rows = rng.integers(seed, index, "row", (), len(tokens))
    drop = rng.uniform(seed, index, "drop", ()) < label_dropout
    return DataDraw(tokens[rows], labels[rows], drop)


def log_probabilities(
    model: MaskedModel, tokens: Tensor, labels: Tensor, drop: Tensor, **inputs: Any
) -> Tensor:
    """log p(x_0 | x_t) of the codebook, float32 [B, L, V]; no image holds a mask token."""
    logits = model(tokens, labels, drop=drop, **inputs)
    return logits[..., : model.codebook_size].float().log_softmax(-1)


def draw_categorical(p: Tensor, uniform: Tensor) -> Tensor:
    """Classes of p [.., V] by its inverse CDF at uniform numbers [.., K]: int64 [.., K]."""
    cdf = p.cumsum(-1)
    at = (uniform.to(cdf) * cdf[..., -1:]).contiguous()
    return torch.searchsorted(cdf, at, right=True).clamp_max_(p.shape[-1] - 1)


def reveal(
    log_p: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    count: Tensor,
    noise_scale: Tensor,
    uniform: Tensor,
    gumbel: Tensor,
) -> Tensor:
    """One step of the confidence sampler (`dimo.samplers.confidence`), N times from one state.

    Every masked token is drawn; those of the largest log p plus scaled Gumbel noise stay.

    Args:
        log_p: The teacher's [B, L, V].
        tokens: x_t [B, L].
        mask: [B, L] bool, what x_t hides.
        count: [B] int64, how many tokens are revealed.
        noise_scale: [B], of the confidence noise.
        uniform: [B, N, L] in (0, 1), chooses the tokens.
        gumbel: [B, N, L], the confidence noise.

    Returns:
        x_u [B, N, L] int64.
    """
    proposal = draw_categorical(log_p.exp(), uniform.mT).mT  # [B, N, L]
    confidence = log_p.gather(-1, proposal.mT).mT + noise_scale[:, None, None] * gumbel
    confidence = confidence.masked_fill(~mask[:, None], -torch.inf)
    order = confidence.argsort(-1, descending=True).argsort(-1)
    return torch.where(order < count[:, None, None], proposal, tokens[:, None])
