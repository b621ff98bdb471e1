"""Sample pictures beside the records: `pictures/<run_id>.png`, as `bench.rows.grid` writes them.

A picture is a grid of images made with fixed seeds and labels, which it names in a text chunk.
Pictures of the same seeds and labels are shown together: image by image they compare.
"""

import base64
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from bench.records.record import ResultRecord
from bench.report import table as cells
from bench.report.document import ProtocolReport
from bench.report.text import one_line

_MOST_BYTES = 4 << 20  # of one picture
_MOST = 24  # pictures of one protocol; the best rows come first in a table


@dataclass(frozen=True)
class Picture:
    """One row's images.

    Attributes:
        name: The method's name and its steps.
        alt: The picture in words.
        width: In pixels.
        height: In pixels.
        url: The PNG as data.
    """

    name: str
    alt: str
    width: int
    height: int
    url: str


@dataclass(frozen=True)
class Pictures:
    """Pictures of the same seeds and labels.

    Attributes:
        words: What their images share.
        small: Whether their images are so small that pixels should be seen as squares.
        pictures: In the order of the table.
        left_out: How many more there are.
    """

    words: str
    small: bool
    pictures: tuple[Picture, ...]
    left_out: int


@dataclass(frozen=True)
class Tiles:
    """A sheet of small images.

    Attributes:
        width: Of the sheet in pixels.
        height: Of the sheet in pixels.
        side: Of a tile.
        files: Whose images they are.
        places: Left and top of each.
        url: The PNG as data.
    """

    width: int
    height: int
    side: int
    files: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    url: str


def read_tiles(path: Path) -> Tiles | None:
    """A sheet as `bench.suites.geneval.sheet` writes it; None if it is missing or damaged."""
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return None
    try:
        data = path.read_bytes()
        width, height, told = _told(data)
        side, columns = int(told["side"]), int(told["columns"])
        files = tuple(str(name) for name in told["files"])
        places = tuple((i % columns * side, i // columns * side) for i in range(len(files)))
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError):
        return None
    fits = all(left + side <= width and top + side <= height for left, top in places)
    return Tiles(width, height, side, files, places, _url(data)) if fits and side > 0 else None


def sample_pictures(part: ProtocolReport, folder: Path) -> tuple[Pictures, ...]:
    """The pictures of the rows of a table; those that are missing or damaged are not shown.

    Args:
        part: The table.
        folder: Of the results.
    """
    found: dict[tuple[str, bool], list[Picture]] = {}
    for row, record in zip(cells.rows(part.frame), part.records, strict=True):
        path = folder / "pictures" / f"{record.run_id}.png"
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            read = _read(path, row, record)
            if read is not None:
                words, small, picture = read
                found.setdefault((words, small), []).append(picture)
    return tuple(
        Pictures(words, small, tuple(pictures[:_MOST]), max(0, len(pictures) - _MOST))
        for (words, small), pictures in found.items()
    )


def _read(
    path: Path, row: dict[str, Any], record: ResultRecord
) -> tuple[str, bool, Picture] | None:
    data = path.read_bytes()
    try:
        width, height, told = _told(data)
        seed, columns = int(told["seed"]), int(told["columns"])
        labels = [one_line(str(label), 32) for label in told["labels"]]
    except (ValueError, TypeError, KeyError):
        return None
    steps = row["num_steps"]
    name = one_line(row["method"], 90)
    if not cells.is_missing(steps):
        name += f", {int(steps)} step{'s' if steps > 1 else ''}"
    several = ", ".join(dict.fromkeys(labels))
    words = f"Images 0 to {len(labels) - 1} of seed {seed}, labels from left to right: {several}"
    alt = f"{len(labels)} images of {name}"
    return words, width // max(1, columns) < 64, Picture(name, alt, width, height, _url(data))


def _told(data: bytes) -> tuple[int, int, dict[str, Any]]:
    """Width and height of a whole PNG, and what its text chunk `dimo` says.

    Raises:
        ValueError: It is damaged or no PNG.
        KeyError: It has no such chunk.
    """
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            image.load()
            found: dict[str, Any] = json.loads(image.text["dimo"])  # type: ignore[attr-defined]
            return *image.size, found
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def _url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
