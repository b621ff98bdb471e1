"""Verdicts of GenEval beside the records: `verdicts/<run_id>.jsonl`, as `dimo eval` writes them.

Some of each tag are shown, with the small images of `verdicts/<run_id>.png` if there is one. A file
that is missing or damaged is skipped.
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
class Verdicts:
    """The verdicts of one row.

    Attributes:
        tags: Label of a tag, number of its correct images, and of all its images.
        shown: Some lines of each tag, with `label` of the tag and `place` of the image's tile in
            the sheet, or None.
        sheet: The images; None: not kept.
        key: Name of the sheet on the page.
    """

    tags: tuple[tuple[str, int, int], ...]
    shown: tuple[dict[str, Any], ...]
    sheet: Tiles | None
    key: str


def row_verdicts(records: Sequence[ResultRecord], folder: Path) -> dict[str, Verdicts]:
    """Run id -> verdicts, for the first rows that have any.

    Args:
        records: In the order of the table.
        folder: The results folder.
    """
    verdicts: dict[str, Verdicts] = {}
    for record in records:
        path = folder / "verdicts" / f"{record.run_id}.jsonl"
        if len(verdicts) < _MOST and path.is_file() and path.stat().st_size <= _MOST_BYTES:
            rows = _read(path)
            if rows:
                verdicts[record.run_id] = _verdicts(rows, record.run_id, path.with_suffix(".png"))
    return verdicts


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if one of them is no verdict."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    valid = all(
        isinstance(row, dict) and all(isinstance(row.get(k), kind) for k, kind in _KEYS.items())
        for row in rows
    )
    return rows if valid else []


def _verdicts(rows: list[dict[str, Any]], run_id: str, sheet: Path) -> Verdicts:
    by_tag: dict[str, list[bool]] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row["correct"])
    tags = list(by_tag.items())[:_MOST_TAGS]
    tiles = read_tiles(sheet)
    places = tiles.places if tiles else {}
    shown = [rows[index] for index in chosen([row["tag"] for row in rows])[:_MOST_SHOWN]]
    return Verdicts(
        tuple((_label(tag), sum(correct), len(correct)) for tag, correct in tags),
        tuple(
            row | {"label": _label(row["tag"]), "place": places.get(row["filename"])}
            for row in shown
        ),
        tiles,
        f"v{run_id[:12]}",
    )


def _label(tag: str) -> str:
    return _LABELS.get(tag, one_line(tag, 40))
