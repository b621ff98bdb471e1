"""Updates of a network: gradients of micro-batches and ranks, clipping, skipped steps, Muon, EMA.

Nothing here synchronizes with the GPU: the fused optimizer skips a step whose gradient the device
finds non-finite, and the host reads the counters at log lines only.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dimo.engine.distributed import Ranks, data_parallel

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, near 1 between 0.7 and 1.2
_ITERATIONS = 5
_RMS = 0.2  # of an update, about what AdamW's are


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al., 2024), as large as one of AdamW.

    The size is 0.2 sqrt(max(m, n)) of an orthogonal [m, n] matrix (Liu et al., arXiv 2502.16982,
    Eq. 4), so learning rate and weight decay mean what they mean in AdamW, which needs about twice
    the steps on the bundled `scenes`. PyTorch's own Muon iterates in bfloat16, which is 15 times
    slower on a CPU without such instructions.

    Like PyTorch's fused AdamW it divides gradients by `grad_scale` and does nothing where
    `found_inf` is 1, without a wait for either. Each rank computes every update.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self, matrices: Iterable[Tensor], *, weight_decay: float, momentum: float = 0.95
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update, without a closure."""
        is_finite = 1 - self.found_inf
        for group in self.param_groups:
            rate = group["lr"] * is_finite
            for p in group["params"]:
                if p.grad is not None:
                    update = orthogonalize(self._sum(p, group["momentum"], is_finite))
                    p.mul_(1 - rate * group["weight_decay"])
                    p.sub_(rate * _RMS * max(p.shape) ** 0.5 * update)

    def _sum(self, p: Tensor, momentum: float, is_finite: Tensor) -> Tensor:
        """The Nesterov sum, after adding the gradient to the momentum."""
        assert p.grad is not None
        grad = torch.where(is_finite > 0, p.grad / self.grad_scale, 0)
        state: dict[str, Any] = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(grad, (1 - momentum) * is_finite)
        return grad.lerp(state["momentum"], momentum)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T [m, n], by Newton-Schulz iteration.

    Its singular values are between 0.7 and 1.2 where S / |S| is not small; 0 gives 0.
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


_FIRST_SCALE, _DOUBLE_AFTER = 2.0**16, 2000  # of the loss in float16, as in torch.amp.GradScaler


class _Parallel:
    """The wrapped network for calls, the plain one for attributes."""

    def __init__(self, network: nn.Module, wrapped: nn.Module) -> None:
        self._network, self._wrapped = network, wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class Update:
    """AdamW on the weighted mean of losses: sum of weight * loss over the sum of the weights.

    The sums run over micro-batches and ranks, so splitting a batch changes rounding only. A step
    with a non-finite loss or gradient is skipped and counted, on all ranks alike. Parameters of
    the network with `requires_grad` are trained in place.

    `grad_clip` is the largest norm of the gradient, `scaled` scales the loss, as float16 needs,
    `matrices` are updated by Muon instead of AdamW, and `adam` holds `betas` and `eps`.
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
            self._optimizers["muon"] = Muon(matrices, weight_decay=weight_decay)
        self._wrapped = data_parallel(network, ranks, device)
        self.model: Any = network if self._wrapped is network else _Parallel(network, self._wrapped)
        self._ranks, self._grad_clip, self._scaled = ranks, grad_clip, scaled
        self._weight = torch.zeros((), device=device)
        self._one = torch.ones_like(self._weight)
        self._nan = self._one * torch.nan
        counts = ("since_skip", "skipped", "in_a_row", "most_in_a_row")
        self._state = {
            "scale": self._one * (_FIRST_SCALE if scaled else 1),
            **{name: torch.zeros((), dtype=torch.int64, device=device) for name in counts},
        }

    @property
    def counts(self) -> Tensor:
        """Updates skipped so far, and the most in a row: int64 [2]."""
        return torch.stack([self._state["skipped"], self._state["most_in_a_row"]])

    def part(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch; ranks exchange gradients in the last one only."""
        no_sync = getattr(self._wrapped, "no_sync", nullcontext)
        return nullcontext() if is_last else no_sync()

    def backward(self, loss: Tensor, weight: Tensor | None = None) -> None:
        """Adds the gradient of a micro-batch, of whose mean loss `weight` is the weight (or 1)."""
        weight = self._one if weight is None else weight.detach().float()
        self._weight += weight
        # a non-finite loss may have a finite gradient: make it NaN, on every rank
        factor = torch.where(loss.detach().isfinite(), self._one, self._nan)
        (loss * (factor * weight * self._state["scale"])).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Updates the weights if all is finite; returns the norm before clipping, and if it was."""
        divisor = self._ranks.sum_(self._weight) / self._ranks.count * self._state["scale"]
        norms = torch._foreach_norm([p.grad for p in self._parameters if p.grad is not None])
        norm = torch.linalg.vector_norm(torch.stack(list(norms))) / divisor
        is_finite = norm.isfinite()
        grad_scale = divisor * ((norm + 1e-6) / self._grad_clip).clamp_min(1)
        found_inf = 1 - is_finite.float()
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            # divides the gradients by the first and does nothing if the second is 1
            optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._weight.zero_()
        self._count(is_finite)
        return norm, is_finite

    def _count(self, is_finite: Tensor) -> None:
        state = self._state
        state["skipped"] += ~is_finite
        state["in_a_row"].add_(1).mul_(~is_finite)
        torch.maximum(state["most_in_a_row"], state["in_a_row"], out=state["most_in_a_row"])
        if self._scaled:
            state["since_skip"].add_(1).mul_(is_finite)
            double = is_finite & (state["since_skip"] % _DOUBLE_AFTER == 0)
            state["scale"].mul_(torch.where(is_finite, self._one + double, 0.5 * self._one))

    def state_dict(self) -> dict[str, Any]:
        return {**{k: v.state_dict() for k, v in self._optimizers.items()}, **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self._state.items():
            value.copy_(state[name])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(tree_map_only(Tensor, torch.clone, state[name]))


@torch.no_grad()
def update_ema(
    ema: nn.Module, model: nn.Module, *, decay: float, step: int, is_finite: Tensor
) -> None:
    """ema <- rate * ema + (1 - rate) * model, rate = min(decay, (1 + step) / (10 + step)).

    The warm-up lets the average forget the first steps (`step` counts from 0). Frozen parameters
    stay equal, and are left out. The EMA may be on the CPU while the model is not; it stays as it
    is if `is_finite`, a bool scalar on the model's device, is False.
    """
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    trained = [(average, value) for average, value in pairs if value.requires_grad]
    averages: list[Tensor] = [average for average, _ in trained]
    values: list[Tensor] = [value.to(average.device) for average, value in trained]
    weight = is_finite * (1 - min(decay, (1 + step) / (10 + step)))
    weights: list[Any] = [weight.to(averages[0].device)] * len(averages)
    torch._foreach_lerp_(averages, values, weights)
