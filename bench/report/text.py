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
    """One line of text with a style.

    A `source` that is an arXiv number becomes a link; a `mark` is the number of a footnote; an
    `interval` is the uncertainty of the value before it, which a narrow table may leave out.
    """

    text: str
    style: Literal["code", "strong", "best", "second", "source", "mark", "interval"]


Line: TypeAlias = tuple[str | Styled, ...]


@dataclass(frozen=True)
class Table:
    """A heading, a table with its caption, and notes below it; every part is optional."""

    title: Line = ()
    level: int = 1  # of the heading; 1 is the highest in a report
    header: tuple[str, ...] = ()  # empty: no table, and the caption is a paragraph
    rows: tuple[tuple[Line, ...], ...] = ()
    left: tuple[int, ...] = (0,)  # columns aligned to the left; the others are to the right
    sections: tuple[str, ...] | None = None  # of each row; a new one has a line above the row
    caption: Line = ()
    notes: tuple[Line, ...] = ()  # a bullet list
    folded: bool = False  # whether a page may hide the table until it is opened
    # groups of columns that a narrow table may leave out: speeds, supplementary metrics
    spare: tuple[tuple[int, ...], ...] = ()

    def new_section(self, index: int) -> str | None:
        """The section that begins with a row, or None."""
        if self.sections and (index == 0 or self.sections[index] != self.sections[index - 1]):
            return self.sections[index]
        return None


def code(value: object, longest: int = 60) -> Styled:
    """A name, a hash or a command."""
    return Styled(one_line(str(value), longest), "code")


def ranked(shown: str, place: int) -> str | Styled:
    """A value styled by its place in the column: 1 is the best, 2 the second."""
    if place == 1:
        return Styled(shown, "best")
    return Styled(shown, "second") if place == 2 else shown


def rank_legend() -> Line:
    return (Styled("Best", "best"), " and ", Styled("second", "second"), " of each column")


class Footnotes:
    """The footnotes of one table: equal texts share a number."""

    def __init__(self) -> None:
        self._numbers: dict[Line, str] = {}

    def mark(self, *notes: Line) -> Line:
        """The mark of some footnotes, `1,2`, as the end of a line; empty without a footnote."""
        numbers = [self._numbers.setdefault(note, f"{len(self._numbers) + 1}") for note in notes]
        return (Styled(",".join(numbers), "mark"),) if numbers else ()

    @property
    def notes(self) -> list[Line]:
        return [(Styled(number, "mark"), " ", *note) for note, number in self._numbers.items()]


def joined(lines: Iterable[Line], separator: str = ", ") -> Line:
    pieces: list[str | Styled] = []
    for index, line in enumerate(lines):
        pieces += [separator] * (index > 0) + [*line]
    return tuple(pieces)


def one_line(value: str, longest: int = 60) -> str:
    """Text cut to `longest` characters; line ends become spaces, control characters U+FFFD."""
    value = value if len(value) <= longest else value[: longest - 1] + "…"
    value = " ".join(value.split())
    if value.isprintable():
        return value
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in value)


def display_width(text: str) -> int:
    """Width of a text in terminal columns."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )
