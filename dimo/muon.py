"""Muon for a network's matrices: AdamW needs about twice the steps on the embedded `scenes`."""

__all__ = ["Muon", "orthogonalize"]

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dimo.launch import ALONE, Ranks

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, near 1 between 0.7 and 1.2
_ITERATIONS = 5
_RMS = 0.2  # of an update, about what AdamW's are


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al., 2024), as large as one of AdamW.

    The size is 0.2 sqrt(max(m, n)) of an orthogonal [m, n] matrix (Liu et al., arXiv 2502.16982,
    Eq. 4), so learning rate and weight decay mean what they mean in AdamW. PyTorch's own iterates
    in bfloat16, which takes a CPU without such instructions 15 times as long.

    Like PyTorch's fused AdamW it divides gradients by `grad_scale` and does nothing where
    `found_inf` is 1, without waiting for either. Ranks share the matrices.

    Args:
        matrices: float32 [m, n].
        weight_decay: As in AdamW.
        momentum: Of the Nesterov sum of gradients.
        ranks: Who shares the work; gradients are the same on each.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self,
        matrices: Iterable[Tensor],
        *,
        weight_decay: float,
        momentum: float = 0.95,
        ranks: Ranks = ALONE,
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(matrices, defaults)
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not called."""
        good = 1 - self.found_inf
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            sums = [self._sum(p, group["momentum"], good) for p in matrices]
            rate = group["lr"] * good
            for p, update in zip(matrices, self._orthogonal(sums), strict=True):
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(rate * _RMS * max(p.shape) ** 0.5 * update)

    def _sum(self, p: Tensor, momentum: float, good: Tensor) -> Tensor:
        """The Nesterov sum, after adding the gradient to the momentum."""
        assert p.grad is not None
        grad = torch.where(good > 0, p.grad / self.grad_scale, 0)
        state: dict[str, Any] = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(grad, (1 - momentum) * good)
        return grad.lerp(state["momentum"], momentum)

    def _orthogonal(self, sums: list[Tensor]) -> list[Tensor]:
        """Each rank makes every n-th; the sum over ranks, of which all others hold 0, is exact."""
        count, index = self._ranks.count, self._ranks.index
        mine = [
            orthogonalize(s) if i % count == index else torch.zeros_like(s)
            for i, s in enumerate(sums)
        ]
        if count == 1:
            return mine
        flat = self._ranks.sum_(torch.cat([m.flatten() for m in mine]))
        parts = torch.split(flat, [m.numel() for m in mine])
        return [part.view_as(m) for part, m in zip(parts, mine, strict=True)]


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by a Newton-Schulz iteration.

    Args:
        matrix: float32 [m, n].

    Returns:
        [m, n], of singular values between 0.7 and 1.2 where S / |S| is not small; 0 for 0.
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
