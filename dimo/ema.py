"""Exponential moving average of a network's weights."""

__all__ = ["update_ema"]

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, *, decay: float, step: int, good: Tensor) -> None:
    """ema <- rate * ema + (1 - rate) * model, rate = min(decay, (1 + step) / (10 + step)).

    The warm-up lets the average forget the first steps. Frozen parameters stay equal, and are
    left out.

    Args:
        ema: The average; it may be on the CPU while the model is not.
        model: Same parameters.
        decay: Rate in the long run.
        step: Number of the step, from 0.
        good: Bool scalar on the model's device; False leaves the average untouched.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    pairs = [
        (a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True) if b.requires_grad
    ]
    averages: list[Tensor] = [a for a, _ in pairs]
    values: list[Tensor] = [b.to(a.device) for a, b in pairs]
    weight = (good * share).to(averages[0].device)
    weights: list[Any] = [weight] * len(averages)
    torch._foreach_lerp_(averages, values, weights)
