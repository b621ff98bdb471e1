"""Classifier-free guidance, written once: u + s (c - u), so s = 1 is off and costs one forward."""

__all__ = ["guided_logits"]

from collections.abc import Callable

import torch
from torch import Tensor


def guided_logits(
    model: Callable[..., Tensor], tokens: Tensor, labels: Tensor, scale: float
) -> Tensor:
    """Guided logits [B, L, V'] (Ho & Salimans, arXiv 2207.12598; papers' w-form: s = 1 + w).

    Args:
        model: A masked model in eval mode: (tokens, labels, drop=) -> logits.
        tokens: [B, L] int64.
        labels: [B] int64.
        scale: Guidance scale s. Any other value than 1 runs both halves as one doubled batch.
    """
    if scale == 1:
        return model(tokens, labels)
    drop = torch.arange(2 * len(labels), device=labels.device) >= len(labels)
    both = model(tokens.repeat(2, 1), labels.repeat(2), drop=drop)
    conditional, unconditional = both.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)
