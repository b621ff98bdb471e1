"""Sample pictures beside the records: `pictures/<run_id>.png`, as `bench.rows.grid` writes them.

A picture is a grid of images made with fixed seeds and labels, which a text chunk names. Pictures
with the same seeds and labels are shown together, so that they compare image by image.
"""

import base64
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from bench.report import table as cells
from bench.report.collect import ProtocolReport
from bench.report.text import LONGEST_NAME, one_line

_MOST_BYTES = 4 << 20  # of one picture
_MOST = 24  # pictures of one protocol; the best rows come first in a table


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URL, with its size in pixels.

    Attributes:
        name: The method's name and its steps.
        alt: The picture in words.
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
        words: What their images have in common.
        small: Whether the images are so small that their pixels should be visible as squares.
        pictures: In the order of the table.
        left_out: Number of further pictures.
    """

    words: str
    small: bool
    pictures: tuple[Picture, ...]
    left_out: int


@dataclass(frozen=True)
class Tiles:
    """A sheet of small images as a data URL, with sizes in pixels.

    Attributes:
        side: Of a tile.
        places: File name of each image -> left and top of its tile.
    """

    width: int
    height: int
    side: int
    places: dict[str, tuple[int, int]]
    url: str


def read_tiles(path: Path) -> Tiles | None:
    """A sheet that `bench.suites.geneval.sheet` wrote; None if it is missing or damaged."""
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return None
    try:
        width, height, facts, url = _read(path)
        side, columns = int(facts["side"]), int(facts["columns"])
        places = {
            str(name): (i % columns * side, i // columns * side)
            for i, name in enumerate(facts["files"])
        }
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError):
        return None
    fits = all(left + side <= width and top + side <= height for left, top in places.values())
    return Tiles(width, height, side, places, url) if fits and side > 0 else None


def sample_pictures(part: ProtocolReport, folder: Path) -> tuple[Pictures, ...]:
    """The pictures of the rows of a table; missing and damaged ones are skipped.

    Args:
        part: The table.
        folder: The results folder.
    """
    groups: dict[tuple[str, bool], list[Picture]] = {}
    for row, record in zip(cells.rows(part.frame), part.records, strict=True):
        path = folder / "pictures" / f"{record.run_id}.png"
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            continue
        try:
            width, height, facts, url = _read(path)
            seed, columns = int(facts["seed"]), int(facts["columns"])
            labels = [one_line(str(label), 32) for label in facts["labels"]]
        except (ValueError, TypeError, KeyError):
            continue
        steps = cells.step_count(row["num_steps"])
        name = one_line(row["method"], LONGEST_NAME) + (f", {steps}" if steps else "")
        listed = ", ".join(dict.fromkeys(labels))
        words = f"Images 0 to {len(labels) - 1} of seed {seed}, labels from left to right: {listed}"
        picture = Picture(name, f"{len(labels)} images of {name}", width, height, url)
        groups.setdefault((words, width // max(1, columns) < 64), []).append(picture)
    return tuple(
        Pictures(words, small, tuple(pictures[:_MOST]), max(0, len(pictures) - _MOST))
        for (words, small), pictures in groups.items()
    )


def _read(path: Path) -> tuple[int, int, dict[str, Any], str]:
    """Width, height, text chunk `dimo` and data URL of a whole PNG.

    Raises:
        ValueError: It is damaged or not a PNG.
        KeyError: It has no such chunk.
    """
    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            image.load()
            facts: dict[str, Any] = json.loads(image.text["dimo"])  # type: ignore[attr-defined]
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            return *image.size, facts, url
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
