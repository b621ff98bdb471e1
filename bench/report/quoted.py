"""Numbers that others published: read from `results/published.csv`, never mixed with measured ones.

The file has one number per line. Lines of one benchmark share a table, lines of two never do.
"""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from bench.protocol import Protocol
from bench.protocol.catalog import METRICS
from bench.report import table as cells
from bench.report.table import SECTIONS, best_and_second, higher_is_better
from bench.report.text import (
    LONGEST_NOTE,
    Footnotes,
    Line,
    Styled,
    Table,
    joined,
    one_line,
    rank_legend,
    ranked,
)
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

_SECTIONS = (*SECTIONS[1:4], "Other")
_MAY_BE_EMPTY = ("teacher", "steps", "note")


@dataclass(frozen=True)
class PublishedRow:
    """One quoted number."""

    benchmark: str  # what was measured and how; only rows of one benchmark are comparable
    section: str  # one of `_SECTIONS`
    method: str
    teacher: str
    steps: int | None  # None: not stated
    metric: str
    value: str  # the number as printed, with its digits
    source: str  # publication, such as `arXiv:2503.15457`
    location: str  # place in it, such as a table
    certainty: str  # `read` if it was read in the source, otherwise how it is known
    note: str


_COLUMNS = [field.name for field in fields(PublishedRow)]
_KEY = ("benchmark", "section", "method", "teacher", "steps", "source", "location")
_FACTS = (*_KEY[1:], "certainty", "note")


def load_published(path: str | os.PathLike[str]) -> list[PublishedRow]:
    """Reads `published.csv`, in the order of its lines.

    Raises:
        DimoError: It cannot be read, or a line is not as described in `results/README.md`.
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
        key = (_row_key(row), row.metric)
        if key in first_lines:
            raise origin.error(f"line {number} gives the number of line {first_lines[key]} again")
        first_lines[key] = number
    return rows


def published_frame(rows: Iterable[PublishedRow], benchmark: str) -> pd.DataFrame:
    """One benchmark in wide form: a row per method and number of steps.

    Columns are section, method, teacher, steps, source, location, certainty (`read` if all numbers
    of the row were) and note, then one column of text per metric, None where nothing was published.
    Sections are in the order of the paper, rows of a section in the order of the file.
    """
    chosen = [row for row in rows if row.benchmark == benchmark]
    metrics = list(dict.fromkeys(row.metric for row in chosen))
    merged: dict[tuple[object, ...], dict[str, object]] = {}
    for row in chosen:
        facts = {name: getattr(row, name) for name in _FACTS}
        line = merged.setdefault(_row_key(row), facts)
        line[row.metric] = row.value
        if line["certainty"] == "read":
            line["certainty"] = row.certainty
        if row.note and row.note not in str(line["note"]):
            line["note"] = f"{line['note']}; {row.note}" if line["note"] else row.note
    frame = pd.DataFrame(list(merged.values()), columns=[*_FACTS, *metrics], dtype=object)
    frame = frame.where(frame.notna(), None)
    order = frame["section"].map(_SECTIONS.index)
    return frame.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def _row_key(row: PublishedRow) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in _KEY)


def _parse(line: list[str], number: int, origin: Origin) -> PublishedRow:
    if len(line) != len(_COLUMNS):
        raise origin.error(f"line {number} has {len(line)} fields, not {len(_COLUMNS)}")
    cells: dict[str, Any] = dict(zip(_COLUMNS, line, strict=True))
    for name, cell in cells.items():
        if not cell.strip() and name not in _MAY_BE_EMPTY:
            raise origin.error(f"line {number}: {name!r} is empty")
    if cells["section"] not in _SECTIONS:
        allowed = ", ".join(_SECTIONS)
        raise origin.error(f"line {number}: 'section' must be one of {allowed}")
    if not re.fullmatch(r"-?\d+(\.\d+)?", cells["value"]):
        raise origin.error(f"line {number}: 'value' must be a number, not {cells['value']!r}")
    if not re.fullmatch(r"[1-9]\d*|", cells["steps"]):
        raise origin.error(f"line {number}: 'steps' must be 1 or more, or empty")
    steps = int(cells["steps"]) if cells["steps"] else None
    return PublishedRow(**cells | {"steps": steps})


def quoted_beside(rows: Sequence[PublishedRow], protocol: Protocol) -> tuple[PublishedRow, ...]:
    """The published rows on the data of a protocol; if there are none, the paper's on ImageNet.

    A benchmark belongs to a protocol if its name begins with a word of the protocol's name; one
    with a scorer's version belongs to the protocol of exactly its name. A protocol of prompts or of
    own images without published rows gets none.
    """
    if protocol.scorer is not None and protocol.scorer.version:
        return tuple(row for row in rows if row.benchmark == protocol.name)
    words = tuple(protocol.name.split("-"))
    same_data = tuple(row for row in rows if row.benchmark.startswith(words))
    if same_data or protocol.prompts is not None or protocol.reference_file is not None:
        return same_data
    return tuple(row for row in rows if row.benchmark.startswith("imagenet256"))


def quoted_tables(published_rows: Sequence[PublishedRow]) -> list[Table]:
    """A heading with a warning, then a table per benchmark."""
    frames = {title: published_frame(published_rows, name) for name, title in QUOTED_TITLES.items()}
    tables = [_table(title, frame) for title, frame in frames.items() if not frame.empty]
    if not tables:
        return []
    warning = ": not to be compared with the table above, nor one of these tables with another."
    opening = ("Published by others, ", Styled("not measured here", "strong"), warning)
    return [Table(("Quoted results",), caption=opening), *tables]


def _table(title: str, frame: pd.DataFrame) -> Table:
    rows = cells.rows(frame)
    quoted = [name for name in frame.columns if name not in (*_FACTS, *METRICS)]
    metrics = [*(name for name in METRICS if name in frame.columns), *quoted]
    papers = list(dict.fromkeys(row["source"] for row in rows))
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    columns = [_column(frame[name], name, is_ranked=len(papers) == 1) for name in metrics]
    noted, footnotes = {row["note"] for row in rows}, Footnotes()
    with_teacher = len(teachers) > 1
    headings = [  # higher is better for what is not registered
        cells.metric_heading(n) if n in METRICS else f"{n.replace('_', ' ').capitalize()} (↑)"
        for n in metrics
    ]
    header = ["Method", *["Teacher"] * with_teacher, "Steps (↓)", *headings, "Source"]
    body = tuple(
        (
            (one_line(row["method"]),),
            *[(one_line(row["teacher"] or cells.MISSING),)] * with_teacher,
            (cells.integer(row["steps"]),),
            *values,
            _source(row, footnotes if len(noted) > 1 else None),
        )
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    )
    sources = joined((Styled(one_line(paper), "source"),) for paper in papers)
    notes: list[Line] = [("Quoted from ", *sources, ".")]
    if not with_teacher and teachers[0]:
        notes.append(("Teacher of every row: ", one_line(teachers[0]), "."))
    if len(papers) == 1 < len(rows):
        notes.append((*rank_legend(), "."))
    if len(noted) == 1 and rows[0]["note"]:
        notes.append(("Every row: ", one_line(rows[0]["note"], LONGEST_NOTE), "."))
    notes += footnotes.notes
    doubts = dict.fromkeys(row["certainty"] for row in rows if row["certainty"] != "read")
    if doubts:
        listed = ", ".join(one_line(doubt) for doubt in doubts)
        notes.append(("† ", listed, ": not checked in the source itself."))
    return Table(
        (f"Quoted: {title}",),
        level=2,
        header=tuple(header),
        rows=body,
        left=(0, *[1] * with_teacher, len(header) - 1),
        sections=tuple(row["section"] for row in rows),
        notes=tuple(notes),
    )


def _column(values: "pd.Series[Any]", name: str, *, is_ranked: bool) -> list[Line]:
    """Numbers with their published digits."""
    decimals = max(len(value.partition(".")[2]) for value in values if value is not None)
    places = best_and_second(
        pd.to_numeric(values), higher_is_better=higher_is_better(name), decimals=decimals
    )
    return [
        (cells.MISSING,) if value is None else (ranked(value, place if is_ranked else 0),)
        for value, place in zip(values, places, strict=True)
    ]


def _source(row: dict[str, Any], footnotes: Footnotes | None) -> Line:
    """Where a row was published; with `footnotes`, the mark of its note."""
    dagger = "" if row["certainty"] == "read" else " †"
    shown: Line = (one_line(f"{row['source']}, {row['location']}"), dagger)
    if footnotes is None or not row["note"]:
        return shown
    return (*shown, *footnotes.mark((one_line(row["note"], LONGEST_NOTE), ".")))
