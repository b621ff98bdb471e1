"""What the transformers share: attention and the perturbation of token embeddings."""

__all__ = ["Convert", "at_positions", "attend", "perturb"]

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# weight and bias of a linear layer, and whether GELU follows -> the module that takes its place
Convert: TypeAlias = Callable[..., nn.Module]

_SHORT_ON_CPU = [SDPBackend.MATH]
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, L, d], without keeping the weights."""
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return _attend_by_image(q, k, v)
    # On a CPU the fused kernel's bfloat16 backward is far slower than plain matrix products.
    with sdpa_kernel(_SHORT_ON_CPU if on_cpu and q.shape[2] <= 64 else _ATTENTION):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return out


def _attend_by_image(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain matrix products for one image at a time: in bfloat16 twice as fast as the fused kernel.

    Whose scores [heads, L, L] stay in a CPU's caches. The softmax is computed in float32.
    """
    out, scale = torch.empty_like(q), 1 / math.sqrt(q.shape[-1])
    zero = q.new_zeros(1)
    for y, *image in zip(out, q, k, v, strict=True):
        queries, keys, values = image
        scores = torch.baddbmm(zero, queries, keys.transpose(-1, -2), beta=0, alpha=scale)
        torch.bmm(scores.softmax(-1), values, out=y)
    return out


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """The rows of x [B, L, D] at positions [B, K], [B, K, D]; all rows for None."""
    if positions is None:
        return x
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def perturb(embedding: Tensor, sigma: float, noise: Tensor | None) -> Tensor:
    """sigma * noise + sqrt(1 - sigma^2) * embedding (sec. 3.3 of the Di[M]O paper).

    Args:
        embedding: [B, L, D] token embeddings, before the positions are added.
        sigma: Share of noise, 0 = unchanged.
        noise: [B, L, D] standard normal, needed when `sigma` > 0.
    """
    if sigma == 0:
        return embedding
    assert noise is not None, "sigma > 0 needs its normal draw"
    return sigma * noise + math.sqrt(1 - sigma**2) * embedding
