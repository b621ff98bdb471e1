"""The image contract: uint8 [B, 3, H, W], and how float images become it; grids for people."""

__all__ = ["ImageBatch", "save_grid", "to_uint8"]

import io
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dimo.errors import unknown_name
from dimo.files import write_atomic


@dataclass(frozen=True)
class ImageBatch:
    """A batch on its way to the feature extractor.

    Attributes:
        images: uint8 [B, 3, H, W].
        index: int64 [B], the image's number in the whole set.
        labels: int64 [B], the condition.
        nfe: Network forwards spent on each image.
    """

    images: Tensor
    index: Tensor
    labels: Tensor
    nfe: int


def to_uint8(images: Tensor, rule: str) -> Tensor:
    """Float images in [-1, 1] -> uint8, any shape.

    Args:
        images: Values outside [-1, 1] are clipped.
        rule: "round" (to the nearest level) or "floor" (ADM: truncation of (x + 1) * 127.5).

    Raises:
        DimoError: Unknown rule.
    """
    if rule not in ("round", "floor"):
        raise unknown_name("uint8 rule", rule, ("round", "floor"))
    levels = (images.float() + 1) * 127.5
    if rule == "round":
        levels = levels + 0.5
    return levels.floor().clamp(0, 255).to(torch.uint8)


def save_grid(
    path: str | PathLike[str],
    rows: list[tuple[str, Tensor]],
    *,
    columns: list[str],
    scale: int,
) -> None:
    """Writes a captioned PNG: one row of images each, the same condition down each column.

    Args:
        path: Where to write, atomically.
        rows: Caption and uint8 [C, 3, H, W] of each row.
        columns: C captions, above.
        scale: Each pixel becomes scale x scale.
    """
    side, gap = rows[0][1].shape[-1] * scale, max(2, scale)
    font = ImageFont.load_default(size=15)
    margin = 12 + max(int(font.getlength(caption)) for caption, _ in rows)
    head = 26
    width = margin + len(columns) * (side + gap) + gap
    canvas = Image.new("RGB", (width, head + len(rows) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for c, caption in enumerate(columns):
        x = margin + c * (side + gap) + side // 2
        draw.text((x, head // 2), caption, fill="black", font=font, anchor="mm")
    for r, (caption, images) in enumerate(rows):
        y = head + r * (side + gap)
        draw.text((margin - 8, y + side // 2), caption, fill="black", font=font, anchor="rm")
        for c, image in enumerate(images):
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + c * (side + gap), y))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
