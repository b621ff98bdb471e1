"""What the transformers share: attention and the perturbation of token embeddings."""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dimo.errors import DimoError
from dimo.models.cpu import has_bfloat16

# weight and bias of a linear layer, and whether GELU follows -> the module that takes its place
Convert: TypeAlias = Callable[..., nn.Module]

_SHORT_ON_CPU = [SDPBackend.MATH]
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


class Dropout(nn.Dropout):
    """`nn.Dropout`, on a CPU several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        return _drop_out(x, self.p if self.training else 0.0)


def _drop_out(x: Tensor, rate: float) -> Tensor:
    """Zeroes a share `rate` of x, in steps of 2^-16, and divides the rest by 1 - rate."""
    if rate == 0 or not _on_cpu(x):
        return F.dropout(x, rate)
    # PyTorch draws one number after the other; here one random 64-bit word serves four elements
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-2^15, 2^15)
    factors = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    torch.ge(numbers, round(rate * 2**16) - 2**15, out=factors)
    return x * factors.mul_(1 / (1 - rate))


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, L, d]; `dropout` is of the weights."""
    on_cpu, is_short = _on_cpu(q), k.shape[2] <= 64
    if on_cpu and q.dtype == torch.bfloat16 and not has_bfloat16():
        return attend(q.float(), k.float(), v.float(), dropout=dropout).bfloat16()
    if on_cpu and not is_short and (dropout or q.dtype == torch.bfloat16):
        if torch.is_grad_enabled() or dropout:
            return _attend_plainly(q, k, v, dropout)
        return _attend_by_image(q, k, v)
    # On a CPU the fused kernel's bfloat16 backward is far slower than plain matrix products.
    with sdpa_kernel(_SHORT_ON_CPU if on_cpu and is_short else _ATTENTION):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return out


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Matrix products that keep the weights for the backward pass."""
    with torch.autocast(q.device.type, enabled=False):  # which would keep the weights in float32
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        return _drop_out(scores.softmax(-1), dropout) @ v


def _attend_by_image(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain matrix products for one image at a time: in bfloat16 twice as fast as the fused kernel.

    The scores [heads, L, L] of one image stay in a CPU's caches; softmax is computed in float32.
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


def recompute_activations(network: nn.Module) -> None:
    """Makes the network's blocks keep their inputs alone until the backward pass.

    Raises:
        DimoError: A network without blocks that can.
    """
    found = [module for module in network.modules() if hasattr(module, "recomputes")]
    if not found:
        raise DimoError(
            f"{type(network).__name__} has no gradient checkpointing; set gradient_checkpointing "
            "to false"
        )
    for module in found:
        module.recomputes = True  # type: ignore[assignment]


def run_block(
    block: Callable[..., Tensor], *inputs: Tensor | None, recomputes: bool = False
) -> Tensor:
    """block(*inputs), whose inside is computed again in the backward pass if `recomputes`."""
    if not (recomputes and torch.is_grad_enabled()):
        return block(*inputs)
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return out
