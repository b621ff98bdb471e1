"""Thumbnails of some judged images as one PNG; importing this loads no torch."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

_SIDE = 64  # pixels of a tile, at most
_COLUMNS = 10
_EACH = 10  # images of a tag
_GREY = 140
_Pixels = npt.NDArray[np.uint8]


def chosen(tags: Sequence[str]) -> list[int]:
    """Numbers of the images shown: the same number per tag, spread evenly.

    Ascending within each tag, tags in order of first appearance. Each step's offset is one larger
    than the last, so that not every image is the first of its prompt.
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


def thumbnail(pixels: _Pixels) -> _Pixels:
    """An image uint8 [H, W, 3], reduced by box averages to 64 pixels a side if it is larger."""
    import torch
    import torch.nn.functional as F

    height, width = pixels.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    levels = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    small = F.interpolate(levels, size, mode="area")[0].round().to(torch.uint8)
    return small.permute(1, 2, 0).numpy()


def draw_sheet(tiles: Mapping[str, _Pixels]) -> bytes:
    """File -> thumbnail as one PNG, row by row; a text chunk holds `side`, `columns`, `files`."""
    from bench.images.codec import encode_png

    side = max(max(tile.shape[:2]) for tile in tiles.values())
    rows = -(-len(tiles) // _COLUMNS)
    sheet = np.full((rows * side, _COLUMNS * side, 3), _GREY, dtype=np.uint8)
    for place, tile in enumerate(tiles.values()):
        top, left = place // _COLUMNS * side, place % _COLUMNS * side
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    description = {"side": side, "columns": _COLUMNS, "files": list(tiles)}
    return encode_png(sheet, text=json.dumps(description))
