"""Inference-only precision, and faster dropout and attention on a CPU."""

import math
import platform
from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimo.errors import unknown_name

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKED_FOR_ROWS = 256  # batch size that oneDNN packs weights for; other sizes work too
_SHORT = 64  # number of keys up to which plain attention is faster than the fused kernel
FUSED_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# (weight, bias, gelu=) -> the module that replaces a linear layer, with GELU after it or not
Convert: TypeAlias = Callable[..., nn.Module]
Network = TypeVar("Network", bound=nn.Module)


class Convertible(nn.Module):
    """A part of a network whose large linear layers `prepare_for_inference` replaces."""

    products: ClassVar[tuple[str, ...]] = ()  # names of these layers, dotted inside submodules

    def convert_products(self, convert: Convert) -> None:
        for name in self.products:
            layer = self.get_submodule(name)
            parent, _, last = name.rpartition(".")
            setattr(self.get_submodule(parent), last, convert(layer.weight, layer.bias))


def prepare_for_inference(model: Network, precision: str) -> Network:
    """Replaces the linear layers of a network's blocks in place; afterwards it can't be trained.

    With "bfloat16" these layers and the attention between them multiply bfloat16 numbers; the
    residual stream, norms, the layers before and after the blocks and the logits stay float32. On
    an x86 CPU weights are packed for oneDNN once; a CPU without bfloat16 instructions multiplies
    the bfloat16 numbers in float32. The result of a row does not depend on the other rows.

    Args:
        model: In eval mode, on its device. A network without `Convertible` parts is unchanged.
        precision: A key of `PRECISIONS`.

    Raises:
        DimoError: Unknown precision.
    """
    check_precision(precision)
    convert = partial(_Product, dtype=PRECISIONS[precision])
    for module in list(model.modules()):
        if isinstance(module, Convertible):
            module.convert_products(convert)
    return model


def check_precision(precision: str) -> None:
    """Raises a `DimoError` for anything but a key of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)


@cache
def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; without, bfloat16 is 6 times slower (Zen 3)."""
    if _on_x86():
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


class _Product(nn.Module):
    """x [..., I] -> x W^T + b [..., O] in `dtype`, for constant weights."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, gelu: bool = False
    ) -> None:
        super().__init__()
        self.dtype, self.gelu = dtype, gelu
        on_cpu = weight.device.type == "cpu"
        lacks_type = on_cpu and dtype == torch.bfloat16 and not has_bfloat16()
        self.multiplied_in = torch.float32 if lacks_type else dtype
        self.bias = None if bias is None else bias.detach().to(dtype).to(self.multiplied_in)
        self.weight = weight.detach().to(dtype).to(self.multiplied_in)
        self.packed = on_cpu and _on_x86() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PACKED_FOR_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).to(self.multiplied_in)
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            return (F.gelu(y) if self.gelu else y).to(self.dtype)
        then: tuple[str, list[float], str] = ("gelu", [], "none") if self.gelu else ("none", [], "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *then)
        return out.to(self.dtype)


def drop_out(x: Tensor, rate: float) -> Tensor:
    """Dropout with `rate` in steps of 2^-16: one random 64-bit word serves four elements."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-2^15, 2^15)
    factors = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    torch.ge(numbers, round(rate * 2**16) - 2**15, out=factors)
    return x * factors.mul_(1 / (1 - rate))


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """`dimo.models.layers.attend` on a CPU."""
    if q.dtype == torch.bfloat16 and not has_bfloat16():
        return attend(q.float(), k.float(), v.float(), dropout).bfloat16()
    is_short = k.shape[2] <= _SHORT
    # the backward pass of the fused kernel is far slower in bfloat16 than plain matrix products
    if not is_short and (dropout or q.dtype == torch.bfloat16):
        if torch.is_grad_enabled() or dropout:
            return _attend_plainly(q, k, v, dropout)
        return _attend_by_image(q, k, v)
    with sdpa_kernel(SDPBackend.MATH if is_short else FUSED_ATTENTION):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return out


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Matrix products that keep the weights for the backward pass."""
    with torch.autocast(q.device.type, enabled=False):  # it would keep the weights in float32
        weights = ((q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)).softmax(-1)
        return (drop_out(weights, dropout) if dropout else weights) @ v


def _attend_by_image(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matrix products of one image at a time, whose scores [heads, L, L] fit into the CPU's caches.

    Twice as fast as the fused kernel in bfloat16.
    """
    out, scale = torch.empty_like(q), 1 / math.sqrt(q.shape[-1])
    zero = q.new_zeros(1)
    for y, *image in zip(out, q, k, v, strict=True):
        queries, keys, values = image
        scores = torch.baddbmm(zero, queries, keys.transpose(-1, -2), beta=0, alpha=scale)
        torch.bmm(scores.softmax(-1), values, out=y)
    return out
