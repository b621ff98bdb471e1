"""Shared by the convolutional VQ tokenizers: encoder, decoder, images <-> tokens in chunks."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.models.layers import attend

_GROUPS = 32  # of every GroupNorm
_CHUNK_PIXELS = 2**19  # at once on an accelerator: 8 images of 256 x 256; on a CPU one image


@dataclass(frozen=True)
class Names:
    """Official names of the parts."""

    down: str  # levels of the encoder
    up: str  # levels of the decoder
    blocks: str  # residual blocks of a level
    middle: tuple[str, str, str]  # residual block, attention, residual block
    up_reversed: bool  # the decoder's levels are numbered from the finest, which runs last


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        out: Tensor = shortcut + y
        return out


class AttentionBlock(nn.Module):
    """Residual self-attention with one head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        y = attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)  # from [B, 1, H * W, C]
        out: Tensor = x + self.proj_out(y)
        return out


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros to the right and below
        return out


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _Level(nn.ModuleDict):
    """Residual blocks, with or without an attention block after each, then `resample`."""

    def __init__(
        self, widths: Sequence[int], names: Names, *, attention: bool, resample: nn.Module | None
    ) -> None:
        blocks = [_ResidualBlock(inputs, outputs) for inputs, outputs in pairwise(widths)]
        attentions = [AttentionBlock(width) for width in widths[1:]] if attention else []
        super().__init__({names.blocks: nn.ModuleList(blocks), "attn": nn.ModuleList(attentions)})
        if resample is not None:
            self["downsample" if isinstance(resample, _Downsample) else "upsample"] = resample
        self._steps: list[nn.Module] = []  # in the order they run
        for number, block in enumerate(blocks):
            self._steps += [block, *attentions[number : number + 1]]
        self._steps += [resample] if resample is not None else []

    def forward(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x)
        return x


def _middle(width: int, names: Names) -> nn.Sequential:
    parts = (_ResidualBlock(width, width), AttentionBlock(width), _ResidualBlock(width, width))
    return nn.Sequential(OrderedDict(zip(names.middle, parts, strict=True)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> latents [B, z_channels, H / f, W / f] with f = 2^(levels - 1).

    Level i, 0 = the finest, has `num_res_blocks` residual blocks of width ch * ch_mult[i], and
    attention if i is in `attention`.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Collection[int],
        in_channels: int,
        z_channels: int,
        names: Names,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        levels, width, last = nn.ModuleList(), ch, len(ch_mult) - 1
        for number, factor in enumerate(ch_mult):
            widths = [width] + [ch * factor] * num_res_blocks
            width = widths[-1]
            resample = _Downsample(width) if number < last else None
            levels.append(_Level(widths, names, attention=number in attention, resample=resample))
        self.add_module(names.down, levels)
        self.mid = _middle(width, names)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)
        self._levels = list(levels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self._levels:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latents [B, z_channels, h, w] -> images [B, 3, f h, f w]; arguments as for `Encoder`."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Collection[int],
        out_ch: int,
        z_channels: int,
        names: Names,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _middle(width, names)
        self._levels: list[nn.Module] = []  # in the order they run
        for number in reversed(range(len(ch_mult))):
            widths = [width] + [ch * ch_mult[number]] * (num_res_blocks + 1)
            width = widths[-1]
            resample = _Upsample(width) if number > 0 else None
            level = _Level(widths, names, attention=number in attention, resample=resample)
            self._levels.append(level)
        stored = self._levels[::-1] if names.up_reversed else self._levels
        self.add_module(names.up, nn.ModuleList(stored))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in self._levels:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class ConvTokenizer(nn.Module):
    """Images <-> token grid in chunks; see `dimo.models.Tokenizer` for the interface.

    A token covers `factor` pixels along each side; `image_size` (pixels) sets `num_tokens` only.
    Codebook vectors have width `code_dim`, latents of encoder and decoder `z_channels`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        factor: int,
        image_size: int,
        codebook_size: int,
        code_dim: int,
        z_channels: int,
    ) -> None:
        super().__init__()
        self.codebook_size, self.factor = codebook_size, factor
        self.num_tokens = (image_size // factor) ** 2
        self.encoder, self.decoder = encoder, decoder
        self.quantize = _Codebook(codebook_size, code_dim)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], uint8 or float in [-1, 1] -> tokens int64 [B, L], row-major.

        Raises:
            DimoError: Another shape or type; H or W is not a multiple of `factor`.
        """
        is_image = images.dtype == torch.uint8 or images.is_floating_point()
        fits = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] % self.factor == 0
        if not fits or images.shape[3] % self.factor or not is_image:
            raise DimoError(
                f"cannot encode {images.dtype} {list(images.shape)}; give uint8 [B, 3, H, W] "
                f"(or float in [-1, 1]) with H and W multiples of {self.factor}"
            )
        chunk = self._chunk(images.shape[2] * images.shape[3])
        return torch.cat([self._nearest(self.latents(part)) for part in torch.split(images, chunk)])

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, L] of a square grid -> float [B, 3, H, W], about [-1, 1], not clipped.

        Raises:
            DimoError: L is not a square.
        """
        tokens = tokens.flatten(1)
        side = isqrt(tokens.shape[1])
        if side * side != tokens.shape[1] or side == 0:
            raise DimoError(f"{tokens.shape[1]} tokens are no square grid; give e.g. 256 or 1024")
        vectors = self._comparable(self.quantize.embedding.weight)  # [V, D]
        images = []
        for part in torch.split(tokens, self._chunk((side * self.factor) ** 2)):
            grid = vectors[part].transpose(1, 2).reshape(len(part), -1, side, side)  # [b, D, h, w]
            images.append(self.decoder(self.post_quant_conv(grid)))
        return torch.cat(images)

    def latents(self, images: Tensor) -> Tensor:
        """Images as for `encode` -> latents [B, D, h, w] before quantization."""
        weight = self.quant_conv.weight
        x = images.to(weight.device, weight.dtype)
        if not images.is_floating_point():
            x = x / 127.5 - 1
        z: Tensor = self.quant_conv(self.encoder(x))
        return z

    def _chunk(self, pixels: int) -> int:
        """Number of images of so many pixels computed at once, which bounds memory."""
        if self.quant_conv.weight.device.type == "cpu":
            return 1  # the last bits of CPU convolutions depend on the batch size
        return max(1, _CHUNK_PIXELS // pixels)

    def _nearest(self, z: Tensor) -> Tensor:
        """Index of the codebook vector nearest to each latent: [B, D, h, w] -> int64 [B, L]."""
        z = self._comparable(z.flatten(2).transpose(1, 2))  # [B, L, D]
        vectors = self._comparable(self.quantize.embedding.weight)
        distance = vectors.square().sum(1) - 2 * z @ vectors.T  # [B, L, V], up to |z|^2
        return distance.argmin(-1)

    def _comparable(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] in the form in which they are compared and decoded."""
        return vectors


class _Codebook(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)


def _norm(channels: int) -> nn.GroupNorm:
    if channels % _GROUPS:
        raise DimoError(
            f"a level of {channels} channels does not split into {_GROUPS} groups; "
            f"ch times each ch_mult is a multiple of {_GROUPS}"
        )
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)
