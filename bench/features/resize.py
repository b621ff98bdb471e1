"""Resizers of the published pipelines: uint8 [B, 3, H, W] -> float32 grey levels [B, 3, S, S].

Numbers of two resizers do not compare: clean-fid's README has FID 2.83 with `legacy_tensorflow` and
3.06 with `clean` on the same images. Values stay on the scale 0 to 255; the network normalises.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.protocol.networks import PREPROCESSINGS
from dimo.errors import DimoError, unknown_name

Resizer: TypeAlias = Callable[[Tensor, int], Tensor]
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, std
_Pixels: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.uint8]


def tf1_bilinear(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's: corners not aligned, no half-pixel centres, no antialiasing.

    Bit-equal to torch-fidelity's, which interpolates each row as often as it is read.
    """
    height, width = images.shape[2:]
    columns = images.permute(3, 0, 1, 2).contiguous().float()  # [W, B, 3, H]: copies are blocks
    rows = _lerp(columns, width, side, dim=0).permute(1, 3, 0, 2).contiguous()  # [B, H, S, 3]
    return _lerp(rows, height, side, dim=1).permute(0, 3, 1, 2)


def _lerp(values: Tensor, size: int, side: int, *, dim: int) -> Tensor:
    """Linear interpolation along a dimension of `size` values, to `side`."""
    position = torch.arange(side, dtype=torch.float32, device=values.device) * float(
        np.float32(size / side)
    )
    low = position.long()
    weight = (position - low.float()).view([-1 if d == dim else 1 for d in range(values.ndim)])
    start = values.index_select(dim, low)
    end = values.index_select(dim, (low + 1).clamp_max(size - 1))
    return end.sub_(start).mul_(weight).add_(start)


def torch_bilinear(images: Tensor, side: int) -> Tensor:
    """pytorch-fid's and clean-fid's `legacy_pytorch`: half-pixel centres, no antialiasing."""
    resized = F.interpolate(images.float(), size=(side, side), mode="bilinear", align_corners=False)
    return resized.clamp_(0, 255)


def torch_bicubic(images: Tensor, side: int) -> Tensor:
    """No antialiasing and no clipping."""
    return F.interpolate(images.float(), size=(side, side), mode="bicubic", align_corners=False)


def torch_bicubic_antialias(images: Tensor, side: int) -> Tensor:
    """Antialiased, without clipping; images of that size stay as they are."""
    levels = images.float()
    if images.shape[2:] == (side, side):
        return levels
    size = (side, side)
    return F.interpolate(levels, size=size, mode="bicubic", align_corners=False, antialias=True)


def pil_bicubic(images: Tensor, side: int) -> Tensor:
    """clean-fid's `clean`: antialiased, each channel in float32, clipped and not quantised."""

    def one(source: _Pixels, target: _Pixels) -> None:
        for levels, resized in zip(source, target, strict=True):
            np.clip(_pil_resize(Image.fromarray(levels).convert("F"), side), 0, 255, out=resized)

    target = np.empty((len(images), 3, side, side), dtype=np.float32)
    _in_threads(one, images.cpu().numpy(), target)
    return torch.from_numpy(target).to(images.device)


def pil_bicubic_floor(images: Tensor, side: int) -> Tensor:
    """Halton-MaskGIT's: `clean`, then cut off to whole grey levels."""
    return pil_bicubic(images, side).floor_()


def pil_bicubic_bytes(images: Tensor, side: int) -> Tensor:
    """Antialiased, on bytes: rounded to whole grey levels."""

    def one(source: _Pixels, target: _Pixels) -> None:
        target[:] = _pil_resize(Image.fromarray(source), side)

    target = np.empty((len(images), side, side, 3), dtype=np.uint8)
    _in_threads(one, images.permute(0, 2, 3, 1).contiguous().cpu().numpy(), target)
    return torch.from_numpy(target).permute(0, 3, 1, 2).float().to(images.device)


def pil_central_square(
    image: npt.NDArray[np.uint8], side: int, *, floor: bool = False
) -> npt.NDArray[np.uint8]:
    """CLIP's: uint8 [H, W, 3], its shorter side to `side` on bytes, then the central square.

    Half of an odd margin is rounded to even, as by torchvision, or down, as by transformers.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    size = (side * width // short, side * height // short)
    resized = np.asarray(Image.fromarray(image).resize(size, resample=Image.Resampling.BICUBIC))
    left, top = ((n - side) // 2 if floor else round((n - side) / 2) for n in size)
    return resized[top : top + side, left : left + side]


# How CLIP's image reaches its size: on bytes by Pillow; as a float tensor, antialiased or not.
# torchvision antialiases tensors since 0.17 only, so that one call stands for the last two.
def central_square(pixels: npt.NDArray[np.uint8], side: int, preprocessing: str) -> Tensor:
    """A uint8 image [H, W, 3], its shorter side resized to fit, and its central square [3, S, S].

    Returns float32, 0 to 1, or a little beyond, as a tensor's bicubic overshoots without clipping.

    Raises: DimoError: Unknown preprocessing, or pixels of another shape or type.
    """
    if preprocessing not in PREPROCESSINGS:
        raise unknown_name("preprocessing", preprocessing, PREPROCESSINGS)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DimoError(
            f"image is {pixels.dtype} {list(pixels.shape)}; allowed: uint8 [H, W, 3]; convert it"
        )
    if preprocessing == "pil":
        square = np.array(pil_central_square(pixels, side))
        return torch.from_numpy(square).permute(2, 0, 1).float() / 255
    height, width = pixels.shape[:2]
    short = min(height, width)
    height, width = side * height // short, side * width // short
    levels = F.interpolate(
        torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255,
        size=(height, width),
        mode="bicubic",
        align_corners=False,
        antialias=preprocessing == "tensor-antialias",
    )[0]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return levels[:, top : top + side, left : left + side]


def pil_bicubic_to(image: npt.NDArray[np.uint8], height: int, width: int) -> _Pixels:
    """A uint8 image [H, W, 3], antialiased on bytes, to any height and width, as uint8."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _pil_resize(image: Image.Image, side: int) -> _Pixels:
    return np.asarray(image.resize((side, side), resample=Image.Resampling.BICUBIC))


def _in_threads(one: Callable[[_Pixels, _Pixels], None], source: _Pixels, target: _Pixels) -> None:
    """Calls `one` on each pair of images; Pillow releases the interpreter's lock meanwhile."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(one, source, target))


def clip_normalized(levels: Tensor) -> Tensor:
    """Levels from 0 to 1, [3, H, W], as CLIP and those after it have them: shifted and scaled."""
    mean, std = (levels.new_tensor(row).view(3, 1, 1) for row in _CLIP)
    return (levels - mean) / std
