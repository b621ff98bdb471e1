"""One random stream per image index: every draw is a function of (seed, index, stream, position).

Counter-based: position j of a stream is SplitMix64's output function (Steele, Lea & Flood, OOPSLA
2014) at counter j, keyed by seed, index and stream name. Integer arithmetic makes it the same on
any device; image i gets the same draws in any batch.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BELOW_1 = 1 - 2.0**-24  # the largest float32 below 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned `value`."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, in place, on int64 [..] read as unsigned."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        high = z >> shift
        high &= (1 << (64 - shift)) - 1  # >> is arithmetic; drop the copies of the sign bit
        z ^= high
        if factor is not None:
            z *= _signed(factor)
    return z


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for generators that take one number (e.g. `torch.manual_seed`)."""
    digest = hashlib.sha256(f"{seed}|{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _bits(seed: int, index: Tensor, stream: str, number: Tensor) -> Tensor:
    """64 random bits for each number of a draw, [count] or [B, count]: int64 [B, count]."""
    key = _mix(index.to(torch.int64) * _signed(_GAMMA) + stream_seed(seed, stream))
    return _mix(key[:, None] + (number + 1) * _signed(_GAMMA))


def uniform(seed: int, index: Tensor, stream: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform draws strictly inside (0, 1): float64 [B, *shape].

    `index` holds one integer per image, [B]; `stream` names the draw, e.g. "tokens/3".
    """
    number = torch.arange(math.prod(shape), device=index.device)
    return _uniform64(_bits(seed, index, stream, number)).view(len(index), *shape)


def _uniform64(bits: Tensor) -> Tensor:
    """float64 in (0, 1) from random bits, which it overwrites."""
    bits >>= 12
    bits &= (1 << 52) - 1
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-52)


def _uniform32(seed: int, index: Tensor, stream: str, count: int) -> Tensor:
    """Uniform draws strictly inside (0, 1), float32 [B, count]: 24 bits each, two from one hash."""
    number = torch.arange((count + 1) // 2, device=index.device)
    halves = _bits(seed, index, stream, number).view(torch.int32)[:, :count]
    u = ((halves >> 8) & 0xFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-24)
    return u.clamp_max_(_BELOW_1)  # 2^24 - 0.5 is no float32: the largest draw rounds to 1


def gumbel(
    seed: int,
    index: Tensor,
    stream: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Standard Gumbel draws [B, *shape]; argmax(logits + gumbel) samples softmax(logits).

    float32 is several times cheaper but truncates the upper tail at 17: enough for training, while
    sampling needs float64 (arXiv 2409.02908).
    """
    if dtype == torch.float64:
        u = uniform(seed, index, stream, shape)
    else:
        u = _uniform32(seed, index, stream, math.prod(shape)).view(len(index), *shape)
    return u.log_().neg_().log_().neg_()


def gumbel_at(seed: int, index: Tensor, stream: str, positions: Tensor, width: int) -> Tensor:
    """`gumbel(seed, index, stream, (L, width))` at positions [B, K]: float64 [B, K, width]."""
    number = positions[:, :, None] * width + torch.arange(width, device=index.device)
    u = _uniform64(_bits(seed, index, stream, number.flatten(1))).view(number.shape)
    return u.log_().neg_().log_().neg_()


def normal(seed: int, index: Tensor, stream: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draws, float32 [B, *shape] (Box-Muller, both outputs used)."""
    count = math.prod(shape)
    half = (count + 1) // 2
    u = _uniform32(seed, index, stream, 2 * half)
    radius = u[:, :half].log().mul_(-2).sqrt_()
    angle = u[:, half:].mul(2 * math.pi)
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].reshape(len(index), *shape)


def integers(seed: int, index: Tensor, stream: str, shape: tuple[int, ...], high: int) -> Tensor:
    """Uniform integers in 0..high-1, int64 [B, *shape]."""
    return (uniform(seed, index, stream, shape) * high).to(torch.int64)


def random_ranks(seed: int, index: Tensor, stream: str, length: int) -> Tensor:
    """A uniform random permutation of 0..length-1 for each image, int64 [B, length]."""
    return uniform(seed, index, stream, (length,)).argsort(dim=1)


@dataclass(frozen=True)
class ImageNoise:
    """The draws of this module for the images `index` [B] of one batch, with one seed."""

    seed: int
    index: Tensor

    def uniform(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return uniform(self.seed, self.index, stream, shape)

    def gumbel(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return gumbel(self.seed, self.index, stream, shape)

    def gumbel_at(self, stream: str, positions: Tensor, width: int) -> Tensor:
        return gumbel_at(self.seed, self.index, stream, positions, width)

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return normal(self.seed, self.index, stream, shape)

    def integers(self, stream: str, shape: tuple[int, ...], high: int) -> Tensor:
        return integers(self.seed, self.index, stream, shape, high)

    def random_ranks(self, stream: str, length: int) -> Tensor:
        return random_ranks(self.seed, self.index, stream, length)
