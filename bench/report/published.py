"""Numbers that others published: read from `results/published.csv`, never mixed with measured ones.

The file has one number a line (long form). A table is the wide form of one benchmark: lines of one
benchmark were measured alike, lines of two were not and never share a table.
"""

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from dimo.util.schema import Origin

# Benchmarks that the report quotes, in order, and the titles of their tables.
QUOTED_TITLES = {
    "imagenet256-c2i": "ImageNet 256 x 256, class-conditional",
    "imagenet256-c2i-redi": "ImageNet 256 x 256, class-conditional, as measured by ReDi",
    "imagenet256-c2i-other": "ImageNet 256 x 256, class-conditional, other sources",
    "geneval": "GenEval",
    "hpsv2-v2.0": "HPS v2.0",
    "coco30k": "COCO, 30,000 captions",
}
# Headings of quoted metrics that `bench.protocol.catalog.METRICS` does not know; higher is better
# in all.
QUOTED_METRICS = {
    "overall": "Overall",
    "single_object": "Single obj.",
    "two_object": "Two obj.",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Color attr.",
    "animation": "Animation",
    "concept_art": "Concept art",
    "painting": "Painting",
    "photo": "Photo",
    "average": "Average",
}

_SECTION_ORDER = ("Teacher", "Sampler", "Distill.", "Other")
_FRAME_COLUMNS = (
    "section",
    "method",
    "teacher",
    "steps",
    "source",
    "location",
    "certainty",
    "note",
)
_MAY_BE_EMPTY = ("teacher", "steps", "note")


@dataclass(frozen=True)
class PublishedRow:
    """One quoted number.

    Attributes:
        benchmark: What was measured and how; rows compare only within one.
        section: Block of the table.
        method: Name in the table.
        teacher: Teacher of the method, or empty.
        steps: Sampling steps, None if not stated.
        metric: Name of the metric.
        value: The number as printed, so that its digits are kept.
        source: Where it was published.
        location: Place in the source.
        certainty: `read` if it was read in the source, otherwise how it is known.
        note: What a reader must know to use it, or empty.
    """

    benchmark: str
    section: str
    method: str
    teacher: str
    steps: int | None
    metric: str
    value: str
    source: str
    location: str
    certainty: str
    note: str


_COLUMNS = [field.name for field in fields(PublishedRow)]


def load_published(path: str | os.PathLike[str]) -> list[PublishedRow]:
    """Reads `published.csv`, in the order of its lines.

    Raises:
        DimoError: It cannot be read, or a line is not as described in `results/README.md`. The
            message names the line.
    """
    origin = Origin(str(path), "the columns are explained in results/README.md")
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise origin.error(f"cannot be read: {error}") from error
    if not lines or lines[0][1] != _COLUMNS:
        raise origin.error(f"the first line must be {','.join(_COLUMNS)}")
    rows = [_parse(line, number, origin) for number, line in lines[1:]]
    first_lines: dict[tuple[object, ...], int] = {}
    for row, (number, _) in zip(rows, lines[1:], strict=True):
        key = (*_row_key(row), row.metric)
        if key in first_lines:
            raise origin.error(f"line {number} gives the number of line {first_lines[key]} again")
        first_lines[key] = number
    return rows


def published_frame(rows: Iterable[PublishedRow], benchmark: str) -> pd.DataFrame:
    """One benchmark in wide form: a row for each method and number of steps.

    Returns:
        Columns section, method, teacher, steps, source, location, certainty (`read` if all of the
        row is), note, then one column of text for each metric, None where nothing was published.
        Blocks in the order of the paper, lines of a block in the order of the file.
    """
    chosen = [row for row in rows if row.benchmark == benchmark]
    metrics = list(dict.fromkeys(row.metric for row in chosen))
    merged: dict[tuple[object, ...], dict[str, object]] = {}
    for row in chosen:
        line = merged.setdefault(
            _row_key(row),
            {
                "section": row.section,
                "method": row.method,
                "teacher": row.teacher,
                "steps": row.steps,
                "source": row.source,
                "location": row.location,
                "certainty": row.certainty,
                "note": row.note,
            },
        )
        line[row.metric] = row.value
        if line["certainty"] == "read":
            line["certainty"] = row.certainty
        if row.note and row.note not in str(line["note"]):
            line["note"] = f"{line['note']}; {row.note}" if line["note"] else row.note
    frame = pd.DataFrame(list(merged.values()), columns=[*_FRAME_COLUMNS, *metrics], dtype=object)
    frame = frame.where(frame.notna(), None)
    order = frame["section"].map(_SECTION_ORDER.index)
    return frame.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def _row_key(row: PublishedRow) -> tuple[object, ...]:
    return (
        row.benchmark,
        row.section,
        row.method,
        row.teacher,
        row.steps,
        row.source,
        row.location,
    )


def _parse(line: list[str], number: int, origin: Origin) -> PublishedRow:
    if len(line) != len(_COLUMNS):
        raise origin.error(f"line {number} has {len(line)} fields, not {len(_COLUMNS)}")
    cells = dict(zip(_COLUMNS, line, strict=True))
    for name, cell in cells.items():
        if not cell.strip() and name not in _MAY_BE_EMPTY:
            raise origin.error(f"line {number}: {name!r} is empty")
    if cells["section"] not in _SECTION_ORDER:
        allowed = ", ".join(_SECTION_ORDER)
        raise origin.error(f"line {number}: 'section' must be one of {allowed}")
    if not re.fullmatch(r"-?\d+(\.\d+)?", cells["value"]):
        raise origin.error(f"line {number}: 'value' must be a number, not {cells['value']!r}")
    if not re.fullmatch(r"[1-9]\d*|", cells["steps"]):
        raise origin.error(f"line {number}: 'steps' must be 1 or more, or empty")
    return PublishedRow(
        benchmark=cells["benchmark"],
        section=cells["section"],
        method=cells["method"],
        teacher=cells["teacher"],
        steps=int(cells["steps"]) if cells["steps"] else None,
        metric=cells["metric"],
        value=cells["value"],
        source=cells["source"],
        location=cells["location"],
        certainty=cells["certainty"],
        note=cells["note"],
    )
