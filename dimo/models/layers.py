"""Shared by the transformers: dropout, attention, embedding noise, activation checkpointing."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dimo.errors import DimoError
from dimo.models import cpu


class Dropout(nn.Dropout):
    """`nn.Dropout`, several times faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        rate = self.p if self.training else 0.0
        return cpu.drop_out(x, rate) if rate and x.device.type == "cpu" else F.dropout(x, rate)


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, L, d], with dropout of the weights."""
    if q.device.type == "cpu":
        return cpu.attend(q, k, v, dropout)
    with sdpa_kernel(cpu.FUSED_ATTENTION):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return out


def gather_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """The rows of x [B, L, D] at positions [B, K], [B, K, D]; all rows for None."""
    if positions is None:
        return x
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def perturb(embedding: Tensor, sigma: float, noise: Tensor | None) -> Tensor:
    """sigma * noise + sqrt(1 - sigma^2) * embedding, [B, L, D] (sec. 3.3 of the Di[M]O paper).

    The embeddings are those of the tokens before positions are added; `noise` is standard normal.
    """
    if sigma == 0:
        return embedding
    assert noise is not None, "sigma > 0 needs its normal draw"
    return sigma * noise + math.sqrt(1 - sigma**2) * embedding


class Blocks(nn.Module):
    """A stack of blocks that recomputes activations in the backward pass if `recomputes`."""

    recomputes: bool = False

    def run(self, block: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        if not (self.recomputes and torch.is_grad_enabled()):
            return block(*inputs)
        out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return out


def recompute_activations(network: nn.Module) -> None:
    """Turns on gradient checkpointing.

    Raises:
        DimoError: The network has no `Blocks`.
    """
    stacks = [module for module in network.modules() if isinstance(module, Blocks)]
    if not stacks:
        raise DimoError(
            f"{type(network).__name__} has no gradient checkpointing; set gradient_checkpointing "
            "to false"
        )
    for stack in stacks:
        stack.recomputes = True
