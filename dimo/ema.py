"""Exponential moving average of a network's weights."""

__all__ = ["update_ema"]

import torch
from torch import nn


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, *, decay: float, step: int) -> None:
    """ema <- rate * ema + (1 - rate) * model, rate = min(decay, (1 + step) / (10 + step)).

    The warm-up lets the average forget the first steps. Frozen parameters stay equal, and are
    left out.
    """
    rate = min(decay, (1 + step) / (10 + step))
    pairs = [
        (a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True) if b.requires_grad
    ]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - rate)
