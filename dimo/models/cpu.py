"""Inference-only precision, and what makes networks fast on a CPU.

`prepare_for_inference` casts the large linear layers of a network and, on an x86 CPU, packs their
weights for oneDNN. `drop_out` and `attend` replace PyTorch's slower CPU kernels in training.
"""

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import ClassVar, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimo.errors import unknown_name

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKED_FOR_ROWS = 256  # what oneDNN lays the weights out for; other numbers of rows work too
_SHORT = 64  # keys up to which plain attention beats the fused kernel
FUSED_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# weight and bias of a linear layer, and whether GELU follows -> the module that replaces it
Convert: TypeAlias = Callable[..., nn.Module]
Network = TypeVar("Network", bound=nn.Module)


class Convertible(nn.Module):
    """A part of a network whose large linear layers `prepare_for_inference` replaces.

    Attributes:
        products: Names of these layers; one inside a submodule has a dotted name.
    """

    products: ClassVar[tuple[str, ...]] = ()

    def convert_products(self, convert: Convert) -> None:
        """Replaces each of `products` by `convert(weight, bias)`."""
        for name in self.products:
            layer = self.get_submodule(name)
            parent, _, last = name.rpartition(".")
            setattr(self.get_submodule(parent), last, convert(layer.weight, layer.bias))


def prepare_for_inference(model: Network, precision: str) -> Network:
    """Converts the linear layers of a network's blocks in place; it can only be sampled then.

    They are nearly all of its arithmetic. In bfloat16 they and the attention between them multiply
    bfloat16 numbers, while the residual stream, norms, the layers before and after the blocks and
    the logits stay float32. On an x86 CPU weights are laid out for oneDNN once instead of at each
    product; a CPU without bfloat16 instructions multiplies the bfloat16 numbers in float32. The
    result of a row does not depend on the other rows.

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
    """
    Raises:
        DimoError: Not a key of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)


@cache
def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them it takes 6 times float32's time.

    Measured on AMD Zen 3, for which PyTorch has a plain loop.
    """
    if _on_x86():
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _has_onednn() -> bool:
    return _on_x86() and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class _Product(nn.Module):
    """x [..., I] -> x W^T + b [..., O] for weights that never change.

    Args:
        weight: [O, I].
        bias: [O] or None.
        dtype: Of the product.
        gelu: Whether GELU follows.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        gelu: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self.gelu = dtype, gelu
        on_cpu = weight.device.type == "cpu"
        lacks_type = on_cpu and dtype == torch.bfloat16 and not has_bfloat16()
        self.multiplied_in = torch.float32 if lacks_type else dtype
        self.bias = None if bias is None else bias.detach().to(dtype).to(self.multiplied_in)
        self.weight = weight.detach().to(dtype).to(self.multiplied_in)
        self.packed = on_cpu and _has_onednn()
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


_kernels_of: ContextVar[str] = ContextVar("kernels_of", default="")  # "": the tensor's device


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Computes on any device as on a GPU, to estimate what that keeps in memory."""
    token = _kernels_of.set("cuda")
    try:
        yield
    finally:
        _kernels_of.reset(token)


def uses_cpu_kernels(x: Tensor) -> bool:
    """Whether the functions below take the place of PyTorch's for x."""
    return (_kernels_of.get() or x.device.type) == "cpu"


def drop_out(x: Tensor, rate: float) -> Tensor:
    """Zeroes a fraction `rate` of x, in steps of 2^-16, and divides the rest by 1 - rate.

    PyTorch draws one number after the other; here one random 64-bit word serves four elements.
    """
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
    # the fused kernel's bfloat16 backward is far slower than plain matrix products
    if not is_short and (dropout or q.dtype == torch.bfloat16):
        if torch.is_grad_enabled() or dropout:
            return _attend_plainly(q, k, v, dropout)
        return _attend_by_image(q, k, v)
    with sdpa_kernel(SDPBackend.MATH if is_short else FUSED_ATTENTION):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return out


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Matrix products that keep the weights for the backward pass."""
    with torch.autocast(q.device.type, enabled=False):  # which would keep the weights in float32
        weights = ((q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)).softmax(-1)
        return (drop_out(weights, dropout) if dropout else weights) @ v


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
