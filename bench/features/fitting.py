"""The training loop of the small networks that come with dimo: extractors and a detector."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

TrainingStep: TypeAlias = Callable[[int, float], None]


def fit_network(
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: Callable[[int], float],
    weight_decay: float,
    on_step: TrainingStep | None = None,
) -> None:
    """Trains in place by AdamW.

    Args:
        network: In train mode.
        loss_at: Step -> its loss, a scalar.
        steps: Optimizer steps.
        learning_rate: Step -> learning rate.
        weight_decay: AdamW's.
        on_step: Called with the number of steps done and the loss.
    """
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=weight_decay)
    for step in range(steps):
        loss = loss_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))
