"""Pieces of GitHub Markdown: escaped text, numbers, marks, and tables that align in a terminal."""

__all__ = [
    "MISSING",
    "bullets",
    "code",
    "integer",
    "is_missing",
    "link",
    "marked",
    "metric_heading",
    "speed",
    "table",
    "text",
]

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from bench.protocol import METRICS

MISSING = "\u2013"
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
    """Column heading of a metric, with the direction that is better."""
    kind = METRICS[name]
    return f"{kind.label} ({'↑' if kind.higher_is_better else '↓'})"


def marked(shown: str, place: int) -> str:
    """Bold for place 1, underlined for place 2."""
    return {1: f"**{shown}**", 2: f"<ins>{shown}</ins>"}.get(place, shown)


def integer(value: Any) -> str:
    """An integer, or the sign for a missing one."""
    return MISSING if is_missing(value) else f"{int(value)}"


def speed(value: Any) -> str:
    """Images a second, to three digits or more."""
    if is_missing(value):
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def is_missing(value: Any) -> bool:
    """Whether a cell of a data frame holds None, NaN or NA."""
    return value is None or str(value) in ("nan", "<NA>")


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
    rows: list[Sequence[str]] = []
    for index, cells in enumerate(body):
        if sections is not None and (index == 0 or sections[index] != sections[index - 1]):
            rows.append([f"*{text(sections[index])}*", *[""] * (len(header) - 1)])
        rows.append(cells)
    widths = [
        max(_width(cells[column]) for cells in [header, *rows]) for column in range(len(header))
    ]
    rule = [
        ":" + "-" * max(width - 1, 2) if column in left else "-" * max(width - 1, 2) + ":"
        for column, width in enumerate(widths)
    ]
    widths = [max(width, 3) for width in widths]
    lines = [
        " | ".join(
            _padded(cell, width, column in left)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in [header, rule, *rows]
    ]
    return "\n".join(f"| {line} |" for line in lines)


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
