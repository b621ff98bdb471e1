"""Verdicts of GenEval beside the records: `verdicts/<run_id>.jsonl`, as `dimo eval` writes them.

Some of each tag are shown, with the small images of `verdicts/<run_id>.png` where there is one. A
file that is missing or damaged is not shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.protocol.catalog import METRICS
from bench.records.record import ResultRecord
from bench.report.html.pictures import Tiles, read_tiles
from bench.report.text import one_line
from bench.suites.geneval.sheet import chosen

_MOST_BYTES = 32 << 20  # of one file
_MOST = 24  # rows of one protocol; the best ones come first in a table
_MOST_TAGS = 12
_MOST_SHOWN = 120  # images of a row
_KEYS = {"filename": str, "tag": str, "prompt": str, "correct": bool, "reason": str}
_LABELS = {kind.tag: kind.label for name, kind in METRICS.items() if name.startswith("geneval_")}


@dataclass(frozen=True)
class TagCount:
    """A tag's name, and how many of its images are right."""

    label: str
    right: int
    count: int


@dataclass(frozen=True)
class Verdict:
    """One image.

    Attributes:
        filename: Of the image, one line.
        tag: Name of its prompt's tag.
        prompt: What it should show.
        correct: Whether it does.
        reason: Why not.
        place: Left and top of its tile in the sheet; None: it has none.
    """

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    place: tuple[int, int] | None


@dataclass(frozen=True)
class Sheet:
    """Tiles of the images, as data, and the name by which the page refers to them."""

    key: str
    tiles: Tiles


@dataclass(frozen=True)
class Verdicts:
    """Of one row.

    Attributes:
        tags: Counts over all images.
        shown: Some of each tag.
        sheet: Their images; None: not kept.
    """

    tags: tuple[TagCount, ...]
    shown: tuple[Verdict, ...]
    sheet: Sheet | None


def row_verdicts(records: Sequence[ResultRecord], folder: Path) -> dict[str, Verdicts]:
    """Run id -> verdicts of the first rows that have any.

    Args:
        records: In the order of the table.
        folder: Of the results.
    """
    found: dict[str, Verdicts] = {}
    for record in records:
        path = folder / "verdicts" / f"{record.run_id}.jsonl"
        if len(found) < _MOST and path.is_file() and path.stat().st_size <= _MOST_BYTES:
            rows = _read(path)
            if rows:
                found[record.run_id] = _verdicts(rows, record.run_id, path.with_suffix(".png"))
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if one of them is no verdict."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    whole = all(
        isinstance(row, dict) and all(isinstance(row.get(k), kind) for k, kind in _KEYS.items())
        for row in rows
    )
    return rows if whole else []


def _verdicts(rows: list[dict[str, Any]], run_id: str, sheet: Path) -> Verdicts:
    by_tag: dict[str, list[bool]] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row["correct"])
    tags = list(by_tag.items())[:_MOST_TAGS]
    shown = chosen([row["tag"] for row in rows])[:_MOST_SHOWN]
    tiles = read_tiles(sheet)
    places = {} if tiles is None else dict(zip(tiles.files, tiles.places, strict=True))
    return Verdicts(
        tuple(TagCount(_label(tag), sum(right), len(right)) for tag, right in tags),
        tuple(_verdict(rows[i], places) for i in shown),
        None if tiles is None else Sheet(f"v{run_id[:12]}", tiles),
    )


def _verdict(row: dict[str, Any], places: dict[str, tuple[int, int]]) -> Verdict:
    return Verdict(
        one_line(row["filename"], 90),
        _label(row["tag"]),
        row["prompt"],
        row["correct"],
        row["reason"],
        places.get(row["filename"]),
    )


def _label(tag: str) -> str:
    return _LABELS.get(tag, one_line(tag, 40))
