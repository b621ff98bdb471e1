"""What a tokenizer loses: PSNR, SSIM and LPIPS of decoded images, and how it uses its codebook.

A row of `METRICS` whose `needs` is "reconstruction" names a function `(Reconstruction) -> Score`;
only the row "Tokenizer reconstruction" has its values. Images are compared as the bytes that the
protocol makes of them, batch by batch as they are decoded, by the functions of `COMPARISONS`: its
tokens and a number of each function are all that is kept of an image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.metrics.base import Score
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]
Compare = Callable[[Tensor, Tensor], Tensor]  # of two float64 batches [B, C, H, W], to [B]

SSIM_WINDOW = 11  # pixels, the least side of an image that has an SSIM
_SIGMA, _K1, _K2, _RANGE = 1.5, 0.01, 0.03, 255.0
_BATCH = 64  # images compared at a time


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What was found of real images after encoding and decoding.

    Attributes:
        tokens: int64 `[N, L]`, ids below `codebook_size`.
        values: float64 `[N]` by metric, for those of `COMPARISONS` that the protocol lists.
    """

    tokens: Tensor
    codebook_size: int
    values: Mapping[str, _Floats]


def psnr(*, original: Tensor, decoded: Tensor) -> _Floats:
    """Peak signal-to-noise ratio of each image in dB: `10 log10(255^2 / MSE)`, float64 `[N]`.

    The mean square is over the pixels and channels of one image. An image without any difference
    counts as if one value were off by one, so that the mean over images is finite.

    Args:
        original: uint8 `[N, C, H, W]`.
        decoded: The same shape.

    Raises:
        DimoError: Other shapes or dtypes.
    """
    return compare(_psnr, original=original, decoded=decoded)


def ssim(*, original: Tensor, decoded: Tensor) -> _Floats:
    """Structural similarity of each image, at most 1: float64 `[N]`.

    Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 2004, eq. 13 with their constants: K1 = 0.01, K2 = 0.03, L = 255, weights
    of a Gaussian of sigma 1.5 on 11 x 11 pixels that add up to 1, (co)variances by these weights,
    without a correction for the number of pixels. The mean is over all places where the window fits
    within the image, and over channels, which is what scikit-image computes with
    `gaussian_weights=True, use_sample_covariance=False`. Arguments as for `psnr`.

    Raises:
        DimoError: Other shapes or dtypes, or images smaller than the window.
    """
    return compare(_ssim, original=original, decoded=decoded)


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    least = 1.0 / a[0].numel()
    errors = (a - b).square().flatten(1).mean(1).clamp_min(least)
    return 10.0 * torch.log10(_RANGE**2 / errors)


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    if min(a.shape[-2:]) < SSIM_WINDOW:
        height, width = a.shape[-2:]
        raise DimoError(
            f"images of {height} x {width} have no SSIM; allowed: {SSIM_WINDOW} x {SSIM_WINDOW} "
            "pixels or more; leave ssim out"
        )
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a = _blurred(a * a) - mean_a.square()
    variance_b = _blurred(b * b) - mean_b.square()
    covariance = _blurred(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    whole = (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
    return (alike / whole).flatten(1).mean(1)


# metric -> what compares images, or "module:function" of it given the folder of weights
COMPARISONS: Mapping[str, Compare | str] = {
    "psnr": _psnr,
    "ssim": _ssim,
    "lpips": "bench.features.lpips:load_lpips",
}


def codebook_histogram(tokens: Tensor, codebook_size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs: int64 `[V]`.

    Raises:
        DimoError: There are no ids, or one is outside of the codebook.
    """
    if not tokens.numel() or not 0 <= int(tokens.min()) <= int(tokens.max()) < codebook_size:
        shown = f"{int(tokens.min())} to {int(tokens.max())}" if tokens.numel() else "none"
        raise DimoError(
            f"token ids are {shown}; allowed: 0 to {codebook_size - 1}; give the ids that the "
            "tokenizer made"
        )
    counts: npt.NDArray[np.int64] = torch.bincount(tokens.flatten(), minlength=codebook_size).numpy(
        force=True
    )
    return counts


def score_psnr(made: Reconstruction) -> Score:
    """Mean PSNR of the images."""
    values = made.values["psnr"]
    return Score(float(values.mean()), values, smallest=None)


def score_ssim(made: Reconstruction) -> Score:
    """Mean SSIM of the images."""
    values = made.values["ssim"]
    return Score(float(values.mean()), values, smallest=-1.0)


def score_lpips(made: Reconstruction) -> Score:
    """Mean LPIPS of the images."""
    values = made.values["lpips"]
    return Score(float(values.mean()), values)


def score_usage(made: Reconstruction) -> Score:
    """Fraction of the codebook's ids that occur in any image.

    The contributions are the jackknife's: N - 1 times what would be lost without the image, the ids
    that no other image has.
    """
    counts = codebook_histogram(made.tokens, made.codebook_size)
    tokens = np.sort(made.tokens.numpy(force=True), axis=1)
    first = np.ones(tokens.shape, dtype=bool)  # of equal ids of an image
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    images = np.bincount(tokens[first], minlength=made.codebook_size)  # that have the id
    alone = (first & (images[tokens] == 1)).sum(axis=1)
    contributions: _Floats = (len(tokens) - 1) * alone / made.codebook_size
    return Score(float((counts > 0).mean()), contributions)


def score_perplexity(made: Reconstruction) -> Score:
    """exp of the entropy of the ids' histogram: 1 for a single id, V for equal frequencies.

    A contribution is the value's derivative by the weight of the image: the value times the mean of
    -log p over the image's ids, p being their frequencies among all images.
    """
    counts = codebook_histogram(made.tokens, made.codebook_size)
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    entropy = float((counts / counts.sum()) @ surprise)
    value = float(np.exp(entropy))
    each: _Floats = surprise[made.tokens.numpy(force=True)].mean(axis=1)
    return Score(value, value * each, smallest=1.0)


def compare(function: Compare, *, original: Tensor, decoded: Tensor) -> _Floats:
    """The function's values of all pairs of uint8 `[N, C, H, W]`, `[N]`.

    Raises:
        DimoError: Other shapes or dtypes, or images that the function does not take.
    """
    if original.shape != decoded.shape or original.ndim != 4 or not len(original):
        raise DimoError(
            f"images have shapes {list(original.shape)} and {list(decoded.shape)}; allowed: the "
            "same [N, C, H, W]; give each decoded image its original"
        )
    if not original.dtype == decoded.dtype == torch.uint8:
        raise DimoError(
            f"images have dtypes {original.dtype} and {decoded.dtype}; allowed: uint8; round them "
            "as the protocol does"
        )
    batches = (slice(start, start + _BATCH) for start in range(0, len(original), _BATCH))
    parts = [
        function(original[rows].double(), decoded[rows].to(original.device).double())
        for rows in batches
    ]
    values: _Floats = torch.cat(parts).numpy(force=True)
    return values


def _blurred(images: Tensor) -> Tensor:
    """Gaussian means of `[N, C, H, W]` at all places where the window fits."""
    place = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (place / _SIGMA).square())
    weights = weights / weights.sum()
    flat = images.flatten(0, 1)[:, None]
    rows = F.conv2d(flat, weights.view(1, 1, -1, 1))
    means = F.conv2d(rows, weights.view(1, 1, 1, -1))
    return means.reshape(*images.shape[:2], *means.shape[2:])
