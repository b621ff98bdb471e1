"""Building blocks of the Meissonic transformer (arXiv 2410.08261): joint and single blocks, RoPE.

Text and image tokens are one sequence, text first: a joint block has weights for each of the two, a
single block shares them. Parameter names are those of the official checkpoints.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.models.cpu import Convertible
from dimo.models.layers import attend, gather_positions

_EPS = 1e-6
_THETA = 10_000.0
Rotary: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, [T + N, head_dim] each


def rotary_tables(ids: Tensor, axes: Sequence[int]) -> Rotary:
    """Rotations of queries and keys (RoPE), cosines and sines float32 [N, sum(axes)].

    Tokens are at positions `ids` [N, len(axes)]; a head is split into axes of these even widths.
    """
    angles = []
    for axis, width in enumerate(axes):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[:, axis, None].double() * _THETA**-exponent)  # [N, width / 2]
    angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return angle.cos().float(), angle.sin().float()


def _rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """x [B, heads, N, d] rotated by the tables, in float32."""
    cos, sin = rotary
    x = x.float()
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def frequencies(width: int, device: torch.device) -> Tensor:
    """Geometric frequencies from 1 down to 1 / 10,000: float32 [width / 2].

    The official code takes exp in float32, whose last bit depends on the CPU; this takes float64.
    """
    half = torch.arange(width // 2, dtype=torch.float32, device=device)
    return (-math.log(_THETA) * half / (width // 2)).double().exp().float()


def sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """Numbers [..] -> cosines, then sines, of geometric frequencies: float32 [.., width]."""
    angle = values[..., None].float() * frequencies(width, values.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class RMSNorm(nn.RMSNorm):
    """In float32, also under autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


class _Attention(Convertible):
    """Attention with normalised queries and keys, without an output projection."""

    products: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v")

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        return _mixed(*self._of_image(x), rotary)

    def _of_image(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, N, d] of x [B, N, D]."""
        q, k, v = (self._by_head(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


class _JointAttention(_Attention):
    """Text and image attend to both, each with its own projections."""

    products = (
        *_Attention.products,
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_out.0",
        "to_add_out",
    )

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.norm_added_q, self.norm_added_k = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def joint(self, text: Tensor, image: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """text [B, T, D] and image [B, N, D] -> the same shapes."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (self._by_head(layer(text)) for layer in layers)
        of_text = (self.norm_added_q(q), self.norm_added_k(k), v)
        pairs = zip(of_text, self._of_image(image), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        y, length = _mixed(q, k, v, rotary), text.shape[1]
        # contiguous, because a linear layer rounds differently if a slice of a batch is not
        of_image: Tensor = self.to_out[0](y[:, length:].contiguous())
        return self.to_add_out(y[:, :length].contiguous()), of_image


def _mixed(q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
    """Attention with rotated queries and keys [B, heads, L, d] -> [B, L, D]."""
    y = attend(_rotated(q, rotary).to(v.dtype), _rotated(k, rotary).to(v.dtype), v)
    return y.transpose(1, 2).flatten(2)


class _Modulation(nn.Module):
    """`linear`: the condition [>= B, D] -> `parts` tensors [B, 1, D]."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, condition: Tensor, batch: int) -> list[Tensor]:
        parts = self.linear(F.silu(condition))[:batch, None].chunk(self.parts, dim=-1)
        return list(parts)


class _Projection(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out)


class _FeedForward(Convertible):
    """GELU in its tanh approximation, four times as wide inside."""

    products = ("net.0.proj", "net.2")

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers = (_Projection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.net = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self.net
        assert isinstance(first, _Projection)
        out: Tensor = last(F.gelu(first.proj(x), approximate="tanh"))
        return out


class JointBlock(nn.Module):
    """Text and image with their own weights and one attention (MM-DiT, arXiv 2403.03206)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm1_context = _Modulation(dim, 6), _Modulation(dim, 6)
        self.attn = _JointAttention(dim, heads)
        self.ff, self.ff_context = _FeedForward(dim), _FeedForward(dim)

    def forward(
        self, text_length: int, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """x [B, T + N, D], text first -> the same; condition [>= B, D]."""
        text, image = x[:, :text_length], x[:, text_length:]
        of_text, of_image = self.norm1_context(condition, len(x)), self.norm1(condition, len(x))
        text_change, image_change = self.attn.joint(
            torch.addcmul(of_text[0], _normalised(text), 1 + of_text[1]),
            torch.addcmul(of_image[0], _normalised(image), 1 + of_image[1]),
            (cos, sin),
        )
        text = _with_feed_forward(text, text_change, of_text, self.ff_context)
        image = _with_feed_forward(image, image_change, of_image, self.ff)
        return torch.cat([text, image], dim=1)


def _with_feed_forward(
    x: Tensor, attended: Tensor, modulation: list[Tensor], feed_forward: nn.Module
) -> Tensor:
    _, _, gate, shift, scale, last_gate = modulation
    x = x + gate * attended
    out: Tensor = x + last_gate * feed_forward(torch.addcmul(shift, _normalised(x), 1 + scale))
    return out


class SingleBlock(Convertible):
    """Parallel attention and feed-forward; text and image share the weights."""

    products = ("proj_mlp", "proj_out")

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = _Modulation(dim, 3)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)
        self.attn = _Attention(dim, heads)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T + N, D] -> the same; condition [>= B, D]."""
        shift, scale, gate = self.norm(condition, len(x))
        y = torch.addcmul(shift, _normalised(x), 1 + scale)
        inner = F.gelu(self.proj_mlp(y), approximate="tanh")
        out: Tensor = x + gate * self.proj_out(torch.cat([self.attn(y, (cos, sin)), inner], dim=2))
        return out


class Mlp(nn.Module):
    """Two linear layers with SiLU between."""

    def __init__(self, width: int, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, dim, bias=bias)
        self.linear_2 = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class Embed(nn.Module):
    """Tokens [B, L] -> [B, L, D]: embedding, RMS norm, 1 x 1 convolution."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, dim)
        self.layer_norm = RMSNorm(dim)
        self.conv = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.layer_norm(self.embeddings(tokens)), self.conv.weight[:, :, 0, 0])


class ConvMlmLayer(nn.Module):
    """The head: [B, L, D] -> logits [B, L, V], or [B, K, V] at positions [B, K]."""

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 1, bias=False)
        self.layer_norm = RMSNorm(dim)
        self.conv2 = nn.Conv2d(dim, codebook_size, 1, bias=False)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        x = F.linear(gather_positions(x, positions), self.conv1.weight[:, :, 0, 0])
        return F.linear(self.layer_norm(x), self.conv2.weight[:, :, 0, 0])


class Resample(nn.Module):
    """`norm`, then a convolution of 2 x 2 tokens to one, or of one to 2 x 2 (`is_up`).

    Computed as a matrix product per patch: the algorithm, and with it the last bits, that cuDNN and
    oneDNN choose for a convolution depends on the batch size.
    """

    def __init__(self, dim: int, *, is_up: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.is_up = is_up
        kind = nn.ConvTranspose2d if is_up else nn.Conv2d
        self.conv = kind(dim, dim, 2, stride=2, bias=False)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """x [B, side^2, D], row-major -> [B, N, D] of the other grid."""
        x, weight = self.norm(x), self.conv.weight
        batch, _, dim = x.shape
        if self.is_up:  # weight [in, out, 2, 2]
            x = F.linear(x, weight.permute(2, 3, 1, 0).flatten(0, 2))  # [B, N, 4 D]
            x = x.view(batch, side, side, 2, 2, dim)
            return x.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
        half = side // 2  # weight [out, in, 2, 2]
        x = x.view(batch, half, 2, half, 2, dim).permute(0, 1, 3, 2, 4, 5)
        return F.linear(x.flatten(3).flatten(1, 2), weight.permute(0, 2, 3, 1).flatten(1))
