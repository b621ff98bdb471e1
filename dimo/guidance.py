"""Classifier-free guidance, written once: u + s (c - u), so s = 1 is off and costs one forward."""

__all__ = ["guide", "guided_logits"]

from collections.abc import Callable

import torch
from torch import Tensor


def guided_logits(
    model: Callable[..., Tensor], tokens: Tensor, labels: Tensor, scale: float, **inputs: Tensor
) -> Tensor:
    """Guided logits [B, L, V'] (Ho & Salimans, arXiv 2207.12598; papers' w-form: s = 1 + w).

    Args:
        model: A masked model in eval mode: (tokens, labels, drop=) -> logits.
        tokens: [B, L] int64.
        labels: [B] int64.
        scale: Guidance scale s. Any other value than 1 runs both halves as one doubled batch.
        **inputs: Further inputs of the model, [B, ...]; both halves get the same.
    """
    if scale == 1:
        return model(tokens, labels, **inputs)
    drop = torch.arange(2 * len(labels), device=labels.device) >= len(labels)
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    both = model(tokens.repeat(2, 1), labels.repeat(2), drop=drop, **twice)
    conditional, unconditional = both.chunk(2)
    return guide(conditional, unconditional, scale)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + s (c - u) in float32."""
    unconditional = unconditional.float()
    return unconditional + scale * (conditional.float() - unconditional)
