"""A report as a list of blocks, which Markdown and LaTeX write each in their own way.

A line is a tuple of pieces. Each format escapes every piece, our own words too: a format cannot
forget one.

Any text as one harmless line, before a format escapes it in its own way.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Words:
    """Text from a record or a file: cut to `longest` characters and put on one line."""

    value: str
    longest: int = 60


@dataclass(frozen=True)
class Code:
    """A name, a hash or a command as it is typed; treated as `Words`."""

    value: str
    longest: int = 60


@dataclass(frozen=True)
class Mark:
    """A number or word with its place in a column: 1 is bold, 2 underlined, 0 plain."""

    shown: str
    place: int


@dataclass(frozen=True)
class Strong:
    """Our own words, in bold."""

    words: str


@dataclass(frozen=True)
class Source:
    """A publication; an arXiv number becomes a link."""

    name: str


Piece: TypeAlias = str | Words | Code | Mark | Strong | Source
Line: TypeAlias = tuple[Piece, ...]


@dataclass(frozen=True)
class Heading:
    """Level 1 is the highest inside a report; what follows a detail may be folded away."""

    level: int
    line: Line
    is_detail: bool = False


@dataclass(frozen=True)
class Paragraph:
    """One paragraph."""

    line: Line


@dataclass(frozen=True)
class Bullets:
    """A list, one line an item."""

    items: tuple[Line, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: Column headings.
        body: Rows of cells.
        left: Columns that are aligned to the left; the others are to the right.
        sections: Section of each row; each new one gets a line of its own above.
        caption: What stands with the table; may be empty.
    """

    header: tuple[str, ...]
    body: tuple[tuple[Line, ...], ...]
    left: tuple[int, ...] = (0,)
    sections: tuple[str, ...] | None = None
    caption: Line = ()


Block: TypeAlias = Heading | Paragraph | Bullets | Table


def joined(lines: Iterable[Line], separator: str = ", ") -> Line:
    """Lines as one, with `separator` between."""
    pieces: list[Piece] = []
    for index, line in enumerate(lines):
        pieces += [separator] * (index > 0) + [*line]
    return tuple(pieces)


LONGEST_NAME = 90  # of a row, with the settings that tell it from another one
LONGEST_NOTE = 400


def one_line(value: str, longest: int) -> str:
    """Cut to `longest` characters, line ends as spaces, invisible characters shown.

    Controls, direction marks, lone surrogates and unassigned characters become U+FFFD, so nothing
    can hide, reorder or break what stands beside it.
    """
    value = value if len(value) <= longest else value[: longest - 1] + "…"
    value = " ".join(value.split())
    if value.isprintable():
        return value
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in value)
