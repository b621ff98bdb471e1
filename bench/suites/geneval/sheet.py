"""Thumbnails of some judged images as one PNG, the same number per tag, spread evenly."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

SHEET_SIDE = 64  # pixels of a tile of the sheet of their images, at most
SHEET_COLUMNS = 10
_EACH = 10  # of a tag


def chosen(tags: Sequence[str]) -> list[int]:
    """Numbers of the images shown, ascending within each tag, tags in order of first appearance.

    Each step's offset is one larger than the last, so that not every image is the first of its
    prompt.

    Args:
        tags: Tag of each image.
    """
    rows: dict[str, list[int]] = {}
    for number, tag in enumerate(tags):
        rows.setdefault(tag, []).append(number)
    return [
        numbers[len(numbers) * place // count + place % (len(numbers) // count)]
        for numbers in rows.values()
        for count in [min(_EACH, len(numbers))]
        for place in range(count)
    ]


_GREY = 140
_Pixels = npt.NDArray[np.uint8]


def thumbnail(pixels: _Pixels) -> _Pixels:
    """An image uint8 [H, W, 3], reduced by box averages to `SHEET_SIDE` if it is larger."""
    import torch
    import torch.nn.functional as F

    height, width = pixels.shape[:2]
    scale = min(1.0, SHEET_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    levels = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    small = F.interpolate(levels, size, mode="area")[0].round().to(torch.uint8)
    return small.permute(1, 2, 0).numpy()


def draw_sheet(tiles: Mapping[str, _Pixels]) -> bytes:
    """Thumbnails side by side, row by row; a text chunk `dimo` holds `side`, `columns`, `files`.

    Args:
        tiles: File -> its thumbnail, at least one.
    """
    from bench.images.codec import encode_png

    side = max(max(tile.shape[:2]) for tile in tiles.values())
    rows = -(-len(tiles) // SHEET_COLUMNS)
    sheet = np.full((rows * side, SHEET_COLUMNS * side, 3), _GREY, dtype=np.uint8)
    for place, tile in enumerate(tiles.values()):
        top, left = place // SHEET_COLUMNS * side, place % SHEET_COLUMNS * side
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    description = {"side": side, "columns": SHEET_COLUMNS, "files": list(tiles)}
    return encode_png(sheet, text=json.dumps(description))
