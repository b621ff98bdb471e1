"""Quoted numbers as GitHub Markdown, in tables of their own, each row with its source."""

__all__ = ["quoted_blocks"]

from collections.abc import Sequence
from typing import Any

import pandas as pd

from bench.catalog import METRICS
from bench.report import cells
from bench.report.published import QUOTED_TITLES, PublishedRow, published_frame
from bench.report.table import best_and_second

_Row = dict[str, Any]


def quoted_blocks(published_rows: Sequence[PublishedRow]) -> list[str]:
    """Blocks of Markdown: a heading, a warning, then a table and its notes for each benchmark."""
    blocks = []
    for benchmark, title in QUOTED_TITLES.items():
        frame = published_frame(published_rows, benchmark)
        if not frame.empty:
            blocks += [f"### Quoted: {title}", *_table(frame)]
    if not blocks:
        return []
    opening = (
        "Published by others, **not measured here**: not to be compared with the table above, "
        "nor one of these tables with another."
    )
    return ["## Quoted results", opening, *blocks]


def _table(frame: pd.DataFrame) -> list[str]:
    rows = cells.rows(frame)
    metrics = [name for name in METRICS if name in frame.columns]
    papers = list(dict.fromkeys(row["source"] for row in rows))
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    columns = [_column(frame[name], name, ranked=len(papers) == 1) for name in metrics]
    letters, common_note = _notes(rows)
    with_teacher = len(teachers) > 1
    header = ["Method", *["Teacher"] * with_teacher, "Steps (↓)"]
    header += [*map(cells.metric_heading, metrics), "Source"]
    body = [
        [
            cells.text(row["method"]),
            *[cells.text(row["teacher"] or cells.MISSING)] * with_teacher,
            cells.integer(row["steps"]),
            *values,
            _source(row, letters),
        ]
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    ]
    notes = [f"Quoted from {', '.join(map(cells.link, papers))}."]
    if not with_teacher and teachers[0]:
        notes.append(f"Teacher of every row: {cells.text(teachers[0])}.")
    if len(papers) == 1:
        notes.append(f"{cells.RANK_LEGEND}.")
    if common_note:
        notes.append(f"Every row: {cells.text(common_note, cells.LONGEST_NOTE)}.")
    notes += [f"({mark}) {cells.text(note, cells.LONGEST_NOTE)}." for note, mark in letters.items()]
    doubts = dict.fromkeys(row["certainty"] for row in rows if row["certainty"] != "read")
    if doubts:
        notes.append(f"† {', '.join(map(cells.text, doubts))}: not checked in the source itself.")
    left = [0, *[1] * with_teacher, len(header) - 1]
    sections = [row["section"] for row in rows]
    return [cells.table(header, body, left=left, sections=sections), cells.bullets(notes)]


def _column(values: "pd.Series[Any]", name: str, *, ranked: bool) -> list[str]:
    """Numbers with the digits they were published with, marked within one source."""
    decimals = max(len(value.partition(".")[2]) for value in values if value is not None)
    places = best_and_second(
        pd.to_numeric(values), higher_is_better=METRICS[name].higher_is_better, decimals=decimals
    )
    return [
        cells.MISSING if value is None else cells.marked(value, place if ranked else 0)
        for value, place in zip(values, places, strict=True)
    ]


def _notes(rows: list[_Row]) -> tuple[dict[str, str], str]:
    """A letter for each note, or, where every row has the same one, no letters and that note."""
    notes = list(dict.fromkeys(row["note"] for row in rows))
    if len(notes) == 1:
        return {}, notes[0]
    marks = (f"{chr(ord('a') + i % 26)}{i // 26 or ''}" for i in range(len(notes)))
    return dict(zip(filter(None, notes), marks, strict=False)), ""


def _source(row: _Row, letters: dict[str, str]) -> str:
    mark = f" ({letters[row['note']]})" if row["note"] in letters else ""
    dagger = "" if row["certainty"] == "read" else " †"
    return cells.text(f"{row['source']}, {row['location']}") + mark + dagger
