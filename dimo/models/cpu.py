"""A network made ready for sampling alone: the precision of its large products, weights packed."""

import platform
from functools import cache, partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.errors import unknown_name

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKED_FOR_ROWS = 256  # what oneDNN lays the weights out for; other numbers of rows work too

Network = TypeVar("Network", bound=nn.Module)


def in_precision(model: Network, precision: str) -> Network:
    """Converts a network's linear layers in place; it can only be sampled then.

    It converts those of its blocks, which are nearly all of its arithmetic. In bfloat16 they and
    the attention between them multiply bfloat16 numbers, while the residual stream, norms, the
    layers before and after the blocks and the logits stay float32. On an x86 CPU weights are laid
    out for oneDNN once instead of at each product; a CPU without bfloat16 instructions multiplies
    the bfloat16 numbers in float32. The result of a row does not depend on the other rows.

    Args:
        model: In eval mode, on its device. Networks without blocks of that kind are left as they
            are.
        precision: A key of `PRECISIONS`.

    Raises:
        DimoError: Unknown precision.
    """
    check_precision(precision)
    dtype = PRECISIONS[precision]
    for module in list(model.modules()):
        convert = getattr(module, "convert_products", None)
        if convert is not None:
            convert(partial(_Product, dtype=dtype))
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
    """Whether this CPU multiplies bfloat16 numbers; one that does not takes 6 times float32's time.

    Measured on AMD Zen 3, which PyTorch gives a plain loop.
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
