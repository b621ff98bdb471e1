"""Pieces of GitHub Markdown: escaped text, numbers, marks, and tables that align in a terminal."""

__all__ = [
    "LONGEST_NOTE",
    "MISSING",
    "RANK_LEGEND",
    "bullets",
    "code",
    "integer",
    "is_missing",
    "link",
    "marked",
    "metric_heading",
    "number",
    "rows",
    "speed",
    "table",
    "text",
]

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from bench.catalog import METRICS

MISSING = "\u2013"
LONGEST_NOTE = 400
RANK_LEGEND = "Best in **bold**, second <ins>underlined</ins>"
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "<span>$</span>"}


def text(value: object, longest: int = 60) -> str:
    """Any text on one line, cut to `longest` characters, with nothing in it that Markdown or HTML
    would act on. Brackets are left as they are (`Di[M]O`) unless they could make a link.
    """
    line = _one_line(str(value), longest)
    special = r"\\`*|~#&<>$" + (r"\[\]" if re.search(r"\][(\[:]", line) else "")
    line = re.sub(f"[{special}]", lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line)
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    return re.sub(r"(?i)\b(https?|ftp|www)(?=[:.])", r"\1<span></span>", line)  # no automatic link


def code(value: object, longest: int = 60) -> str:
    """Any text as a code span of one line. Not for table cells: a bar would end the cell."""
    line = _one_line(str(value), longest)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def link(source: str) -> str:
    """A source as a link if it is an arXiv number, as plain text otherwise."""
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", source)
    return f"[{source}](https://arxiv.org/abs/{found[1]})" if found else text(source)


def metric_heading(name: str) -> str:
    """Column heading of a metric, with the direction that is better, if this dimo knows it."""
    if name not in METRICS:
        return text(name)
    kind = METRICS[name]
    return f"{kind.label} ({'↑' if kind.higher_is_better else '↓'})"


def marked(shown: str, place: int) -> str:
    """Bold for place 1, underlined for place 2."""
    return {1: f"**{shown}**", 2: f"<ins>{shown}</ins>"}.get(place, shown)


def number(value: float, decimals: int) -> str:
    """A number with so many decimals, and no minus before a zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def integer(value: Any) -> str:
    """An integer, or the sign for a missing one."""
    return MISSING if is_missing(value) else f"{int(value)}"


def speed(value: Any) -> str:
    """Images a second, to three digits or more."""
    if is_missing(value):
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame, each as a dict with plain Python values."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def is_missing(value: Any) -> bool:
    """Whether a cell of a data frame holds None, NaN or NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def bullets(notes: Iterable[str]) -> str:
    """A list, one note an item."""
    return "\n".join(f"- {note}" for note in notes)


def table(
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    sections: Sequence[str] | None = None,
) -> str:
    """A table whose columns also line up as plain text.

    Args:
        header: Column headings.
        body: Cells, escaped.
        left: Columns that are aligned to the left; the others are to the right.
        sections: Section of each row; each new one gets a line of its own above.
    """
    lines: list[Sequence[str]] = []
    for index, cells in enumerate(body):
        if sections is not None and (index == 0 or sections[index] != sections[index - 1]):
            lines.append([f"*{text(sections[index])}*", *[""] * (len(header) - 1)])
        lines.append(cells)
    widths = [
        max(3, *(_width(cells[column]) for cells in [header, *lines]))
        for column in range(len(header))
    ]
    rule = [
        ":" + "-" * (width - 1) if column in left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    padded = [
        " | ".join(
            _padded(cell, width, column in left)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in [header, rule, *lines]
    ]
    return "\n".join(f"| {line} |" for line in padded)


def _one_line(value: str, longest: int) -> str:
    """Cut, with line ends as spaces and invisible characters (controls, direction marks) shown."""
    value = value if len(value) <= longest else value[: longest - 1] + "…"
    value = re.sub(r"\s+", " ", value).strip()
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in value)


def _padded(cell: str, width: int, left: bool) -> str:
    padding = " " * (width - _width(cell))
    return cell + padding if left else padding + cell


def _width(cell: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in cell
    )
