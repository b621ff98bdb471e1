"""What a report says, before a format writes it: tables with their headings and notes.

A line is a tuple of pieces, each a plain string or a `Styled` one. Every format escapes every
piece, so no text of a record can be taken for markup.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

LONGEST_NAME = 90  # characters of a row's name with the settings that distinguish it
LONGEST_NOTE = 400


@dataclass(frozen=True)
class Styled:
    """A piece with a style.

    Attributes:
        text: One line; see `one_line`.
        style: `best` and `second` mark values of a column; a `source` that is an arXiv number
            becomes a link.
    """

    text: str
    style: Literal["code", "strong", "best", "second", "source"]


Line: TypeAlias = tuple[str | Styled, ...]


@dataclass(frozen=True)
class Table:
    """A heading, a table with its caption, and notes below it; every part is optional.

    Attributes:
        title: The heading.
        level: Of the heading; 1 is the highest in a report.
        header: Column headings; empty: no table, and the caption is a paragraph.
        rows: One line per cell.
        left: Columns aligned to the left; the others are aligned to the right.
        sections: Section of each row; a new section gets a line of its own above the row.
        caption: What is written next to the table.
        notes: A bullet list.
        folded: Whether a page may hide the table until it is opened.
    """

    title: Line = ()
    level: int = 1
    header: tuple[str, ...] = ()
    rows: tuple[tuple[Line, ...], ...] = ()
    left: tuple[int, ...] = (0,)
    sections: tuple[str, ...] | None = None
    caption: Line = ()
    notes: tuple[Line, ...] = ()
    folded: bool = False

    def new_section(self, index: int) -> str | None:
        """The section that begins with a row; None: the row continues one."""
        if self.sections is None:
            return None
        begins = index == 0 or self.sections[index] != self.sections[index - 1]
        return self.sections[index] if begins else None


def code(value: object, longest: int = 60) -> Styled:
    """A name, a hash or a command as one types it."""
    return Styled(one_line(str(value), longest), "code")


def ranked(shown: str, place: int) -> str | Styled:
    """A value of a column with its place: 1 is the best, 2 the second, 0 any other."""
    if place == 1:
        return Styled(shown, "best")
    return Styled(shown, "second") if place == 2 else shown


def rank_legend() -> Line:
    """What the marks of the best two values mean."""
    return ("Best in ", Styled("bold", "best"), ", second ", Styled("underlined", "second"))


def joined(lines: Iterable[Line], separator: str = ", ") -> Line:
    """Several lines as one, with a separator between them."""
    pieces: list[str | Styled] = []
    for index, line in enumerate(lines):
        pieces += [separator] * (index > 0) + [*line]
    return tuple(pieces)


def one_line(value: str, longest: int = 60) -> str:
    """Text cut to `longest` characters, with line ends as spaces.

    Control characters and others that cannot be printed become U+FFFD: a terminal, an XML file or
    a table would break on them.
    """
    value = value if len(value) <= longest else value[: longest - 1] + "…"
    value = " ".join(value.split())
    if value.isprintable():
        return value
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in value)
