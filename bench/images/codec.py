"""The image contract: uint8 [B, 3, H, W]; how float images and files become it; captioned grids.

A file becomes 8-bit RGB only where nothing is lost or guessed: grey and palette are spread to RGB,
an alpha channel is dropped if it is opaque everywhere. 16-bit, CMYK, transparent and many-frame
images are problems. Orientation tags and colour profiles are not applied.
"""

import functools
import hashlib
import io
import os
import struct
import unicodedata
import zlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_bytes, write_atomic

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LOSSY_CODECS = ("jpeg", "webp", "tiff-jpeg", "tiff-webp")  # lossless WebP is "webp-lossless"

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_MODES = ("RGB", "L", "1", "P", "RGBA", "LA")  # what is converted without loss
_LOSSY_MODES = ("CMYK", "YCbCr", "LAB", "HSV", "PA")  # 8-bit, converted by PIL's own rules

_SIDE = 40  # pixels of one image in a grid, at least
_GAP = 5  # pixels between images
_LETTERS = 15  # size of the captions in pixels, at least; a twelfth of an image if that is more
_HEAD_LINES = 2
_PROMPT_SIDE, _PROMPT_LINES = 128, 6  # the same where captions are prompts


@dataclass(frozen=True)
class ImageInfo:
    """What inspecting an image file yields.

    Attributes:
        sha256: Hash of the content; equal for exact duplicates.
        height: In pixels; 0 if unknown, as `width`.
        mode: As PIL names it ("RGB", "L", "P", "RGBA", "I;16", ...), with ";16" where PIL would
            cut 16 bits off silently; "" if unknown.
        codec: "png", "jpeg", "webp" (lossy), "webp-lossless", "bmp", "tiff", "tiff-jpeg" or
            "array"; "" if unknown.
        problem: Why the image cannot be scored, or None.
    """

    sha256: str
    height: int
    width: int
    mode: str
    codec: str
    problem: str | None


@dataclass(frozen=True)
class ImageBatch:
    """A batch on its way to the feature extractor.

    Attributes:
        images: uint8 [B, 3, H, W].
        index: int64 [B], the image's number in the whole set.
        labels: int64 [B], the condition.
    """

    images: Tensor
    index: Tensor
    labels: Tensor
    nfe: int


def to_uint8(images: Tensor, rule: str) -> Tensor:
    """Float images in [-1, 1] -> uint8, any shape; values outside are clipped.

    `rule` is "round" (to the nearest level) or "floor" (ADM: truncation of (x + 1) * 127.5).
    """
    if rule not in ("round", "floor"):
        raise unknown_name("uint8 rule", rule, ("round", "floor"))
    levels = (images.float() + 1) * 127.5
    if rule == "round":
        levels = levels + 0.5
    return levels.floor().clamp(0, 255).to(torch.uint8)


def inspect_image(data: bytes, *, lossy: bool = False) -> ImageInfo:
    """Checks all bytes of an image file; never raises for a bad one.

    A PNG of mode RGB, L or P is not decompressed, which would cost ten times more: the CRC of
    every chunk detects damage. Anything else is decoded. The hash covers the file's bytes, for a
    PNG those of the chunks that determine the pixels, so that text and dates do not matter.
    `lossy` as in `decode_image`.
    """
    sha256, height, width, mode, codec, problem = "", 0, 0, "", "", None
    try:
        if data.startswith(_PNG_SIGNATURE):
            sha256 = _checked_png_sha256(data)
        image = _open(data)
        (width, height), mode, codec = image.size, _mode(image), _codec(image, data)
        if codec != "png" or mode not in ("RGB", "L", "P") or "transparency" in image.info:
            _decoded(image, lossy=lossy)
    except DimoError as error:
        problem = str(error)
    return ImageInfo(sha256 or sha256_bytes(data), height, width, mode, codec, problem)


def decode_image(data: bytes, *, lossy: bool = False) -> npt.NDArray[np.uint8]:
    """The bytes of an image file -> uint8 [H, W, 3].

    With `lossy`, also takes what PIL converts with a loss: CMYK and other 8-bit colours, and
    transparent images, whose alpha channel is dropped. ImageNet has a few of them.

    Raises: DimoError: No image, damaged, or one that is not 8-bit RGB without a loss or a guess.
    """
    return _decoded(_open(data), lossy=lossy)


def _decoded(image: Image.Image, *, lossy: bool) -> npt.NDArray[np.uint8]:
    mode = _mode(image)
    if lossy and (mode in _LOSSY_MODES or (mode in _MODES and _is_transparent(image))):
        return _pixels(image)
    return _to_rgb(image)


def read_image(path: Path) -> tuple[ImageInfo, npt.NDArray[np.uint8]]:
    """A file that must be an image: its `ImageInfo` and its pixels, uint8 [H, W, 3].

    Raises: DimoError: It cannot be read, or as `decode_image`.
    """
    if path.exists() and not path.is_file():
        raise DimoError(f"{path} is no file; replace it by an image")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DimoError(f"cannot read {path}: {error.strerror}; make the image again") from error
    try:
        return inspect_image(data), decode_image(data)
    except DimoError as error:
        raise DimoError(f"{path}: {error}; make the image again") from error


def centre_crop(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """The middle square, resized: uint8 [H, W, 3] -> uint8 [side, side, 3].

    The rule of ADM (arXiv 2105.05233, its `center_crop_arr`): halved by box averages as long as
    the shorter side is at least twice `side`, then resized bicubically to `side` and cropped.
    """
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    return resized[top : top + side, left : left + side]


def _open(data: bytes) -> Image.Image:
    """Reads only the header."""
    if not data:
        raise DimoError("zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError as error:
        raise DimoError("not an image (allowed: PNG, JPEG, WebP, BMP, TIFF)") from error
    except Exception as error:  # PIL raises many types on bad data
        raise DimoError(f"damaged: {error}") from error
    if frames != 1:
        raise DimoError(f"{frames} frames (allowed: 1)")
    return image


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    mode = _mode(image)
    if mode not in _MODES:
        raise DimoError(f"mode {mode} (allowed: 8-bit RGB, or what becomes it without a loss)")
    if _is_transparent(image):
        raise DimoError(f"mode {mode} with transparent pixels (allowed: opaque)")
    return _pixels(image)


def _is_transparent(image: Image.Image) -> bool:
    if not _has_alpha(image):
        return False
    try:
        alpha, _ = image.convert("RGBA").getchannel("A").getextrema()
    except Exception as error:  # PIL raises many types on bad data
        raise DimoError(f"damaged: {error}") from error
    return alpha != 255


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA") or "transparency" in image.info


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    try:
        if _has_alpha(image):
            image = image.convert("RGBA")  # PIL warns of a palette that becomes RGB at once
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises many types on bad data
        raise DimoError(f"damaged: {error}") from error


def _mode(image: Image.Image) -> str:
    """PIL's mode, marked where PIL would silently turn 16 bits per channel into 8."""
    raw_modes = "".join(str(tile.args) for tile in getattr(image, "tile", []))
    if ";16" in raw_modes and image.mode in _MODES:
        return f"{image.mode};16"
    return image.mode


def _codec(image: Image.Image, data: bytes) -> str:
    codec = {"MPO": "jpeg"}.get(str(image.format), str(image.format).lower())
    if codec == "webp":
        return "webp-lossless" if _webp_is_lossless(data) else "webp"
    if codec == "tiff" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
        return "tiff-" + str(image.info["compression"]).removeprefix("tiff_")
    return codec


def _webp_is_lossless(data: bytes) -> bool:
    """Whether the first bitstream chunk of the RIFF container is VP8L and not VP8."""
    position, name = 12, b""
    while name not in (b"VP8 ", b"VP8L") and position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        position += 8 + length + length % 2
    return name == b"VP8L"


def _checked_png_sha256(data: bytes) -> str:
    """Hash of the critical chunks and of tRNS, after checking every chunk."""
    digest = hashlib.sha256()
    view, position, name, has_pixels = memoryview(data), len(_PNG_SIGNATURE), b"", False
    while name != b"IEND":
        if position + 12 > len(data):
            raise DimoError("cut short")
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise DimoError("cut short")
        (crc,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[position + 4 : end - 4]) != crc:
            raise DimoError(f"checksum error in its {ascii(name)[2:-1]} chunk")
        if name[:1].isupper() or name == b"tRNS":  # upper case: critical (PNG, sec. 5.4)
            digest.update(view[position:end])
        has_pixels |= name == b"IDAT"
        position = end
    if not has_pixels:
        raise DimoError("no pixels (it has no IDAT chunk)")
    return digest.hexdigest()


def encode_png(pixels: npt.NDArray[np.uint8], *, text: str | None = None) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG; `text` goes into a chunk named `dimo`."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("dimo", text)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def is_whole_png(path: Path) -> bool:
    """Whether a file begins and ends as a PNG does; reads a few bytes of it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_PNG_SIGNATURE))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return start == _PNG_SIGNATURE and file.read() == _PNG_END
    except OSError:  # not there, no file, or too short to have such an end
        return False


def save_grid(
    path: str | PathLike[str],
    rows: list[tuple[str, Tensor]],
    *,
    columns: list[str],
    sentences: bool = False,
) -> None:
    """Writes a captioned PNG: one row of images each, the same condition down each column.

    Small images are enlarged by a whole factor, others keep their size. Captions are wrapped to the
    width of their column, and what does not fit ends in an ellipsis.

    Args:
        rows: Caption, of one line or more, and uint8 [C, 3, H, W] of each row.
        columns: C captions, above.
        sentences: The captions are prompts: placed below larger images, with more lines.
    """
    pixels, most = (_PROMPT_SIDE, _PROMPT_LINES) if sentences else (_SIDE, _HEAD_LINES)
    tiles = [[_tile(image, pixels) for image in images] for _, images in rows]
    width = max(tile.width for row in tiles for tile in row)
    height = max(tile.height for row in tiles for tile in row)
    font = _font(max(_LETTERS, width // 12))
    line = int(font.size * 1.25)
    heads = [_wrapped(_plain(caption), width, font, most) for caption in columns]
    sides = [_plain(caption) for caption, _ in rows]
    left = 12 + max(int(font.getlength(text)) for side in sides for text in side.split("\n"))
    captions = 8 + line * max(head.count("\n") + 1 for head in heads)
    top = _GAP if sentences else captions
    height = max(height, line * max(side.count("\n") + 1 for side in sides))
    bottom = top + len(rows) * (height + _GAP)
    size = (
        left + len(columns) * (width + _GAP) + _GAP,
        bottom + (captions if sentences else _GAP),
    )
    canvas = Image.new("RGB", size, "white")
    write = functools.partial(ImageDraw.Draw(canvas).multiline_text, fill="black", font=font)
    for c, head in enumerate(heads):
        middle = left + c * (width + _GAP) + width // 2
        place, anchor = (bottom, "ma") if sentences else (top - 4, "md")
        write((middle, place), head, anchor=anchor, align="center", spacing=2)
    for r, (side, row) in enumerate(zip(sides, tiles, strict=True)):
        y = top + r * (height + _GAP)
        write((left - 8, y + height // 2), side, anchor="rm", align="right", spacing=2)
        for c, tile in enumerate(row):
            x = left + c * (width + _GAP) + (width - tile.width) // 2
            canvas.paste(tile, (x, y + (height - tile.height) // 2))
    write_atomic(path, encode_png(np.asarray(canvas)))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _tile(image: Tensor, side: int) -> Image.Image:
    """uint8 [3, H, W] as a picture enlarged by a whole factor to at most `side` pixels."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
    scale = max(1, side // picture.width)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _plain(text: str) -> str:
    """Replaces or drops letters that the font of captions does not have."""
    for letter, name in (("τ", "tau"), ("θ", "theta")):
        text = text.replace(letter, name)
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, most: int) -> str:
    """At most `most` lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width and len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(_elided(line, width, font) for line in lines)


def _elided(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"
