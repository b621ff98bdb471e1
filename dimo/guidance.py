"""Classifier-free guidance, written once: u + s (c - u), so s = 1 is off and costs one forward."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dimo.errors import unknown_name
from dimo.models.layers import gather_positions

# How strongly the teacher of a distillation is guided; see `guidance_scales`.
GUIDANCE_RULES = ("constant", "adaptive")
_Ratio = TypeVar("_Ratio", float, Tensor)


def guided_logits(
    model: Callable[..., Tensor],
    tokens: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    positions: Tensor | None = None,
    **inputs: Tensor,
) -> Tensor:
    """Guided logits [B, L, V'] (Ho & Salimans, arXiv 2207.12598; papers' w-form: s = 1 + w).

    Args:
        model: A `dimo.models.MaskedModel`.
        tokens: [B, L] int64.
        labels: [B] int64.
        scale: s, or one per image, [B]. The number 1 skips the unconditional half.
        positions: [B, K] int64; only these logits are returned, [B, K, V'].
        **inputs: Further inputs of the model, [B, ...], the same for both halves.
    """
    if positions is not None:
        if not getattr(model, "takes_positions", False):
            logits = guided_logits(model, tokens, labels, scale, **inputs)
            return gather_positions(logits, positions)
        inputs["positions"] = positions
    if not isinstance(scale, Tensor) and scale == 1:
        return model(tokens, labels, **inputs)
    drop = torch.arange(2 * len(labels), device=labels.device) >= len(labels)
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    both = model(tokens.repeat(2, 1), labels.repeat(2), drop=drop, **twice)
    conditional, unconditional = both.chunk(2)
    return guide(conditional, unconditional, scale)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """u + s (c - u) in float32, for one scale or one per image, [B]."""
    unconditional = unconditional.float()
    if isinstance(scale, Tensor):
        scale = scale.to(unconditional)[:, None, None]
    return unconditional + scale * (conditional.float() - unconditional)


def guidance_scales(rule: str, scale: float, mask_ratio: _Ratio | None) -> float | _Ratio:
    """The teacher's guidance scale: s ("constant"), or 1 + (s - 1) rho ("adaptive").

    Args:
        rule: One of `GUIDANCE_RULES`.
        scale: s.
        mask_ratio: rho, the masked fraction drawn for each image [B], or one number for all;
            "adaptive" needs it.

    Raises:
        DimoError: Unknown rule.
    """
    if rule not in GUIDANCE_RULES:
        raise unknown_name("guidance rule", rule, GUIDANCE_RULES)
    if rule == "constant" or scale == 1:
        return scale
    assert mask_ratio is not None, "adaptive guidance depends on the mask ratio"
    return 1 + (scale - 1) * mask_ratio
