"""One network's updates: gradients of several parts and ranks, clipping, skipped steps.

Nothing here waits for a GPU. Whether a gradient is finite is decided on the device, and the fused
optimizer is told to do nothing; the host reads the counters at log lines only.
"""

__all__ = ["Update"]

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dimo.launch import Ranks, data_parallel
from dimo.muon import Muon

_FIRST_SCALE, _DOUBLE_AFTER = 2.0**16, 2000  # of the loss in float16, as torch.amp.GradScaler


class _Parallel:
    """The network as others see it, whose calls share gradients with the other ranks."""

    def __init__(self, network: nn.Module, wrapped: nn.Module) -> None:
        self._network, self._wrapped = network, wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class Update:
    """AdamW on the weighted mean of losses: sum of weight * loss over the sum of the weights.

    The sums run over the parts of a step and over the ranks, so how a batch is split changes
    nothing but rounding. A gradient that is not finite, which a loss that is not finite makes,
    changes neither weights nor the optimizer's state; it is counted on every rank alike.

    Args:
        network: Trained in place: its parameters with `requires_grad`.
        device: Where it lies.
        ranks: Who shares the batch.
        grad_clip: Largest norm of the gradient.
        scaled: Whether losses are scaled, as float16 needs it.
        weight_decay: Of every optimizer.
        matrices: Parameters that Muon updates in AdamW's place.
        **adam: `betas` and `eps`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: torch.device,
        ranks: Ranks,
        grad_clip: float,
        scaled: bool,
        weight_decay: float = 0.0,
        matrices: Sequence[Tensor] = (),
        **adam: Any,
    ) -> None:
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        apart = {id(p) for p in matrices}
        others = [p for p in self._parameters if id(p) not in apart]
        adamw = torch.optim.AdamW(others, fused=True, weight_decay=weight_decay, **adam)
        self._optimizers: dict[str, Any] = {"optimizer": adamw}
        if matrices:
            self._optimizers["muon"] = Muon(matrices, weight_decay=weight_decay, ranks=ranks)
        self._wrapped = data_parallel(network, ranks, device)
        self.model: Any = network if self._wrapped is network else _Parallel(network, self._wrapped)
        self._ranks, self._grad_clip, self._scaled = ranks, grad_clip, scaled
        self._weight = torch.zeros((), device=device)
        self._one = torch.ones_like(self._weight)
        self._nan = self._one * torch.nan
        self._state = {
            "scale": self._one * (_FIRST_SCALE if scaled else 1),
            "since_skip": torch.zeros((), dtype=torch.int64, device=device),
            "skipped": torch.zeros((), dtype=torch.int64, device=device),
            "in_a_row": torch.zeros((), dtype=torch.int64, device=device),
            "most_in_a_row": torch.zeros((), dtype=torch.int64, device=device),
        }

    @property
    def counts(self) -> Tensor:
        """Updates skipped so far, and the most in a row: int64 [2]."""
        return torch.stack([self._state["skipped"], self._state["most_in_a_row"]])

    @contextlib.contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one part; ranks exchange gradients in the last alone."""
        no_sync = getattr(self._wrapped, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if is_last else no_sync():
            yield

    def backward(self, loss: Tensor, weight: Tensor | None = None) -> None:
        """Adds the gradient of one part.

        Args:
            loss: Scalar, a mean over this part.
            weight: Scalar, how much of what the mean is over there was; None: as in every part.
        """
        weight = self._one if weight is None else weight.detach().float()
        self._weight += weight
        # a loss that is not finite may have a finite gradient: make it NaN, so on every rank
        factor = torch.where(loss.detach().isfinite(), self._one, self._nan)
        (loss * (factor * weight * self._state["scale"])).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clips, and updates the weights if all is finite.

        Returns:
            The gradient's norm before clipping, and whether it was finite (bool); both scalars.
        """
        divisor = self._ranks.sum_(self._weight) / self._ranks.count * self._state["scale"]
        norms = torch._foreach_norm([p.grad for p in self._parameters if p.grad is not None])
        norm = torch.linalg.vector_norm(torch.stack(list(norms))) / divisor
        good = norm.isfinite()
        grad_scale = divisor * ((norm + 1e-6) / self._grad_clip).clamp_min(1)
        found_inf = 1 - good.float()
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            # it divides the gradients by the one and does nothing if the other is 1
            optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._weight.zero_()
        self._count(good)
        return norm, good

    def _count(self, good: Tensor) -> None:
        state = self._state
        state["skipped"] += ~good
        state["in_a_row"].add_(1).mul_(~good)
        torch.maximum(state["most_in_a_row"], state["in_a_row"], out=state["most_in_a_row"])
        if self._scaled:
            state["since_skip"].add_(1).mul_(good)
            double = good & (state["since_skip"] % _DOUBLE_AFTER == 0)
            state["scale"].mul_(torch.where(good, self._one + double, 0.5 * self._one))

    def state_dict(self) -> dict[str, Any]:
        return {**{k: v.state_dict() for k, v in self._optimizers.items()}, **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self._state.items():
            value.copy_(state[name])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(tree_map_only(Tensor, torch.clone, state[name]))
