"""What a results folder has beside its records: sample pictures and verdicts of GenEval.

`pictures/<run_id>.png`, as `bench.rows.grid` writes it, is a grid of images with fixed seeds and
labels, which a text chunk names; pictures of the same seeds and labels are shown together.
`verdicts/<run_id>.jsonl` is as `dimo eval` writes it; some lines of each tag are shown, with the
small images of `verdicts/<run_id>.png` if there are any. Missing and damaged files are skipped.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from bench.protocol.catalog import METRICS
from bench.records.record import ResultRecord
from bench.records.seeds import grouped
from bench.report import table as cells
from bench.report.collect import ProtocolReport
from bench.report.text import one_line
from bench.suites.geneval.sheet import chosen

_MOST_BYTES = 4 << 20  # of one picture
_MOST_BYTES_OF_VERDICTS = 32 << 20
_MOST = 24  # pictures or verdicts of one protocol; the best rows come first in a table
_MOST_TAGS = 12
_MOST_SHOWN = 120  # images of a row with verdicts
_KEYS = {"filename": str, "tag": str, "prompt": str, "correct": bool, "reason": str}
_LABELS = {kind.tag: kind.label for name, kind in METRICS.items() if name.startswith("geneval_")}


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URL, with its size in pixels; `alt` is the picture in words."""

    name: str
    alt: str
    width: int
    height: int
    url: str


@dataclass(frozen=True)
class Pictures:
    """Pictures of the same seeds and labels, in the order of the table."""

    words: str  # what their images have in common
    small: bool  # whether their pixels should be visible as squares
    pictures: tuple[Picture, ...]
    left_out: int  # number of further pictures


@dataclass(frozen=True)
class Tiles:
    """A sheet of small images as a data URL, with sizes in pixels."""

    width: int
    height: int
    side: int  # of a tile
    places: dict[str, tuple[int, int]]  # file name of each image -> left and top of its tile
    url: str


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one row."""

    tags: tuple[tuple[str, int, int], ...]  # label, number of correct images, and of all images
    shown: tuple[dict[str, Any], ...]  # some lines of each tag, with its `label`, and the `place`
    sheet: Tiles | None  # of the images in this sheet, if they were kept
    key: str  # name of the sheet on the page


def sample_pictures(part: ProtocolReport, folder: Path) -> tuple[Pictures, ...]:
    """The pictures in a results folder of the rows of a table."""
    groups: dict[tuple[str, bool], list[Picture]] = {}
    for row, record in zip(cells.rows(part.frame), part.records, strict=True):
        try:
            width, height, facts, url = _read_png(folder / "pictures" / f"{record.run_id}.png")
            seed, columns = int(facts["seed"]), int(facts["columns"])
            labels = [one_line(str(label), 32) for label in facts["labels"]]
        except (ValueError, TypeError, KeyError):
            continue
        name, listed = cells.row_label(row), ", ".join(dict.fromkeys(labels))
        words = f"Images 0 to {len(labels) - 1} of seed {seed}, labels from left to right: {listed}"
        picture = Picture(name, f"{len(labels)} images of {name}", width, height, url)
        groups.setdefault((words, width // max(1, columns) < 64), []).append(picture)
    return tuple(
        Pictures(words, small, tuple(pictures[:_MOST]), len(pictures[_MOST:]))
        for (words, small), pictures in groups.items()
    )


def row_verdicts(records: Sequence[ResultRecord], folder: Path) -> dict[str, Verdicts]:
    """Run id -> verdicts in a results folder, for the first records that have any."""
    verdicts: dict[str, Verdicts] = {}
    for record in records:
        path = folder / "verdicts" / f"{record.run_id}.jsonl"
        if len(verdicts) < _MOST and (rows := _read_verdicts(path)):
            verdicts[record.run_id] = _verdicts(rows, record.run_id, path.with_suffix(".png"))
    return verdicts


def _verdicts(rows: list[dict[str, Any]], run_id: str, sheet: Path) -> Verdicts:
    tags = grouped(rows, lambda row: row["tag"])
    tiles = _read_tiles(sheet)
    places = tiles.places if tiles else {}
    shown = [rows[index] for index in chosen([row["tag"] for row in rows])[:_MOST_SHOWN]]
    return Verdicts(
        tuple(
            (_label(tag), sum(row["correct"] for row in of_tag), len(of_tag))
            for tag, of_tag in list(tags.items())[:_MOST_TAGS]
        ),
        tuple(
            row | {"label": _label(row["tag"]), "place": places.get(row["filename"])}
            for row in shown
        ),
        tiles,
        f"v{run_id[:12]}",
    )


def _label(tag: str) -> str:
    return _LABELS.get(tag, one_line(tag, 40))


def _read_verdicts(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if it is missing or one of them is no verdict."""
    try:
        if path.stat().st_size > _MOST_BYTES_OF_VERDICTS:
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    valid = all(
        isinstance(row, dict) and all(isinstance(row.get(k), kind) for k, kind in _KEYS.items())
        for row in rows
    )
    return rows if valid else []


def _read_tiles(path: Path) -> Tiles | None:
    """A sheet that `bench.suites.geneval.sheet` wrote; None if it is missing or damaged."""
    try:
        width, height, facts, url = _read_png(path)
        side, columns = int(facts["side"]), int(facts["columns"])
        places = {
            str(name): (i % columns * side, i // columns * side)
            for i, name in enumerate(facts["files"])
        }
    except (ValueError, TypeError, KeyError, ArithmeticError):
        return None
    fits = all(left + side <= width and top + side <= height for left, top in places.values())
    return Tiles(width, height, side, places, url) if fits and side > 0 else None


def _read_png(path: Path) -> tuple[int, int, dict[str, Any], str]:
    """Width, height, text chunk `dimo` and data URL of a whole PNG.

    Raises:
        ValueError: It is missing, too large, damaged or not a PNG.
        KeyError: It has no such chunk.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} is too large")
        data = path.read_bytes()
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            image.load()
            facts: dict[str, Any] = json.loads(image.text["dimo"])  # type: ignore[attr-defined]
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            return *image.size, facts, url
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
