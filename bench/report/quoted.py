"""Quoted numbers as blocks, in tables of their own, each row with its source."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from bench.protocol import Protocol
from bench.protocol.catalog import METRICS
from bench.report import table as cells
from bench.report.notes import rank_legend
from bench.report.published import QUOTED_METRICS, QUOTED_TITLES, PublishedRow, published_frame
from bench.report.table import best_and_second
from bench.report.text import (
    LONGEST_NOTE,
    Block,
    Bullets,
    Heading,
    Line,
    Mark,
    Paragraph,
    Source,
    Strong,
    Table,
    Words,
    joined,
)

_Row = dict[str, Any]
_PAPER = "imagenet256"  # quoted beside data that nobody published numbers of


def quoted_beside(rows: Iterable[PublishedRow], protocol: Protocol) -> tuple[PublishedRow, ...]:
    """The published rows of the data that a protocol is about; the paper's if there are none.

    A benchmark belongs to a protocol if its name begins with a word of the protocol's name; one
    with a scorer's version, to the protocol of its own name only. Numbers of prompts' images have
    no such rows in their place.
    """
    words = tuple(protocol.name.split("-"))
    rows = tuple(rows)
    if protocol.scorer is not None and protocol.scorer.version:
        return tuple(row for row in rows if row.benchmark == protocol.name)
    found = tuple(row for row in rows if row.benchmark.startswith(words))
    if found or protocol.prompts is not None:
        return found
    return tuple(row for row in rows if row.benchmark.startswith(_PAPER))


def quoted_blocks(published_rows: Sequence[PublishedRow]) -> list[Block]:
    """A heading, a warning, then a table and its notes for each benchmark."""
    blocks: list[Block] = []
    for benchmark, title in QUOTED_TITLES.items():
        frame = published_frame(published_rows, benchmark)
        if not frame.empty:
            blocks += [Heading(2, (f"Quoted: {title}",)), *_table(frame)]
    if not blocks:
        return []
    opening: Line = (
        "Published by others, ",
        Strong("not measured here"),
        ": not to be compared with the table above, nor one of these tables with another.",
    )
    return [Heading(1, ("Quoted results",)), Paragraph(opening), *blocks]


def _table(frame: pd.DataFrame) -> list[Block]:
    rows = cells.rows(frame)
    known = dict.fromkeys([*METRICS, *QUOTED_METRICS])
    metrics = [name for name in known if name in frame.columns]
    papers = list(dict.fromkeys(row["source"] for row in rows))
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    columns = [_column(frame[name], name, ranked=len(papers) == 1) for name in metrics]
    letters, common_note = _notes(rows)
    with_teacher = len(teachers) > 1
    header = ["Method", *["Teacher"] * with_teacher, "Steps (↓)"]
    header += [*map(_heading, metrics), "Source"]
    body = tuple(
        (
            (Words(row["method"]),),
            *[(Words(row["teacher"] or cells.MISSING),)] * with_teacher,
            (cells.integer(row["steps"]),),
            *values,
            _source(row, letters),
        )
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    )
    notes: list[Line] = [("Quoted from ", *joined((Source(paper),) for paper in papers), ".")]
    if not with_teacher and teachers[0]:
        notes.append(("Teacher of every row: ", Words(teachers[0]), "."))
    if len(papers) == 1:
        notes.append((*rank_legend(), "."))
    if common_note:
        notes.append(("Every row: ", Words(common_note, LONGEST_NOTE), "."))
    notes += [(f"({mark}) ", Words(note, LONGEST_NOTE), ".") for note, mark in letters.items()]
    doubts = dict.fromkeys(row["certainty"] for row in rows if row["certainty"] != "read")
    if doubts:
        said = joined((Words(doubt),) for doubt in doubts)
        notes.append(("† ", *said, ": not checked in the source itself."))
    left = (0, *[1] * with_teacher, len(header) - 1)
    sections = tuple(row["section"] for row in rows)
    return [Table(tuple(header), body, left=left, sections=sections), Bullets(tuple(notes))]


def _heading(name: str) -> str:
    return cells.metric_heading(name) if name in METRICS else f"{QUOTED_METRICS[name]} (↑)"


def _column(values: "pd.Series[Any]", name: str, *, ranked: bool) -> list[Line]:
    """Numbers with the digits they were published with, marked within one source."""
    decimals = max(len(value.partition(".")[2]) for value in values if value is not None)
    higher = name not in METRICS or METRICS[name].higher_is_better
    places = best_and_second(pd.to_numeric(values), higher_is_better=higher, decimals=decimals)
    return [
        (cells.MISSING,) if value is None else (Mark(value, place if ranked else 0),)
        for value, place in zip(values, places, strict=True)
    ]


def _notes(rows: list[_Row]) -> tuple[dict[str, str], str]:
    """A letter for each note, or, where every row has the same one, no letters and that note."""
    notes = list(dict.fromkeys(row["note"] for row in rows))
    if len(notes) == 1:
        return {}, notes[0]
    marks = (f"{chr(ord('a') + i % 26)}{i // 26 or ''}" for i in range(len(notes)))
    return dict(zip(filter(None, notes), marks, strict=False)), ""


def _source(row: _Row, letters: dict[str, str]) -> Line:
    mark = f" ({letters[row['note']]})" if row["note"] in letters else ""
    dagger = "" if row["certainty"] == "read" else " †"
    return (Words(f"{row['source']}, {row['location']}"), mark + dagger)
