"""The report as text for a terminal: tables that line up, no wider than 100 columns if they can be.

A wide table keeps the interval of its first metric only, then shortens headings, then leaves out
speeds, or the supplementary metrics if that is not enough, or both; the other formats have
everything. A long name continues below itself.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.report.collect import Report
from bench.report.measured import report_tables
from bench.report.text import Line, Styled, Table, display_width, one_line

_WIDTH = 100
_LONGEST_WORD = 24  # of a name; a longer one is broken
_RANKS = {"best": "*", "second": "'"}
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_Cell = tuple[str, str]  # a value, and what follows it: its interval and its rank


@dataclass(frozen=True)
class _Layout:
    """How a table is made narrow; `intervals` is the number of columns that keep theirs."""

    intervals: int
    gap: int = 2
    cut_headings: bool = False
    left_out: tuple[int, ...] = ()  # of the groups of spare columns


_LAYOUTS = (  # from wide to narrow; in a group, one that leaves names whole is better
    (_Layout(100), _Layout(100, gap=1)),
    (_Layout(1), _Layout(1, gap=1)),
    (_Layout(1, gap=1, cut_headings=True),),
    *((_Layout(1, gap=1, cut_headings=True, left_out=groups),) for groups in ((0,), (1,), (0, 1))),
    (_Layout(0, gap=1, cut_headings=True, left_out=(0, 1)),),
)


def report_plain(report: Report) -> str:
    """Tables, captions and notes in the words of the Markdown report; ends with a newline."""
    blocks, is_told = [], False
    for table in report_tables(report):
        block, is_whole = _block(table, tell=not is_told)
        blocks.append(block)
        is_told |= not is_whole
    return "\n\n".join(blocks) + "\n"


def _block(table: Table, *, tell: bool) -> tuple[str, bool]:
    """A table with heading and notes, and whether it has every interval; if not, `tell` says so."""
    parts, notes, is_whole = [], [*table.notes], True
    if table.title:
        title = _line(table.title)
        parts.append(f"{title}\n{'=-'[table.level > 1] * min(_WIDTH, display_width(title))}")
    if table.header:
        drawn, is_whole = _table(table)
        parts.append(drawn)
        if tell and not is_whole:
            notes.append(("Intervals of the other columns: `dimo report --format markdown`.",))
    if table.caption:
        parts.append(_wrapped(_line(table.caption)))
    if notes:
        parts.append("\n".join(_wrapped(_line(note), "- ") for note in notes))
    return "\n\n".join(parts), is_whole


def _wrapped(words: str, bullet: str = "") -> str:
    return textwrap.fill(
        words,
        _WIDTH,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_on_hyphens=False,
    )


def _table(table: Table) -> tuple[str, bool]:
    """The table in the widest layout that fits, and whether it has every interval."""
    names = [_line(row[0]) for row in table.rows]
    words = [display_width(word) for name in [table.header[0], *names] for word in name.split()]
    whole = max(map(display_width, [table.header[0], *names]))
    broken = min(max(words, default=0), _LONGEST_WORD)
    tries = [(layout, n) for group in _LAYOUTS for n in (whole, broken) for layout in group]
    for layout, needed in tries:
        columns = _columns(table, layout)
        room = _WIDTH - sum(column.width + layout.gap for column in columns)
        if room >= needed:
            break
    else:  # no layout fits
        layout, room = _Layout(100), whole
        columns = _columns(table, layout)
    width = min(room, whole)
    lines = list(_body(table, names, columns, width, layout.gap))
    has_intervals = [any(map(_interval, cells)) for cells in zip(*table.rows, strict=True)]
    return "\n".join(line.rstrip() for line in lines), sum(has_intervals) <= layout.intervals


@dataclass(frozen=True)
class _Column:
    """Header lines and cells of one column, all of the same width."""

    heading: list[str]
    cells: list[str]
    width: int


def _columns(table: Table, layout: _Layout) -> list[_Column]:
    """Every column but the names."""
    columns, intervals = [], layout.intervals
    spare = dict(enumerate(table.spare))
    left_out = {index for group in layout.left_out for index in spare.get(group, ())}
    for index, heading in enumerate(table.header):
        if index == 0 or index in left_out:
            continue
        lines = [row[index] for row in table.rows]
        cells = [_cell(line, with_interval=intervals > 0) for line in lines]
        intervals -= any(map(_interval, lines))
        is_left = index in table.left
        columns.append(_column(heading, cells, is_left=is_left, cut=layout.cut_headings))
    return columns


def _column(heading: str, cells: Sequence[_Cell], *, is_left: bool, cut: bool) -> _Column:
    values = max((display_width(value) for value, _ in cells), default=0)
    ends = max((display_width(end) for _, end in cells), default=0)
    tokens = re.findall(r"[↓↑]|/\w+|[^\s()/_]+_*|_+", heading)
    if cut and not is_left:
        tokens = [f"{t[:5].rstrip('aeiou')}." if len(t) > 7 else t for t in tokens]
    width = max(values + ends, *map(display_width, tokens))

    def padded(text: str) -> str:
        space = " " * (width - display_width(text))
        return text + space if is_left else space + text

    lines = [tokens[0]]
    for token in tokens[1:]:
        space = "" if token[0] in "↓↑/" or lines[-1].endswith("_") else " "
        if display_width(lines[-1] + space + token) <= width:
            lines[-1] += space + token
        else:
            lines.append(token)
    shown = [value + end + " " * (ends - display_width(end)) for value, end in cells]
    return _Column([padded(line) for line in lines], [padded(text) for text in shown], width)


def _body(
    table: Table, names: list[str], columns: list[_Column], width: int, gap: int
) -> Iterator[str]:
    """The lines of a table."""
    between = " " * gap
    height = max((len(column.heading) for column in columns), default=1)

    def line(name: str, cells: Sequence[str]) -> str:
        return between.join([name + " " * (width - display_width(name)), *cells])

    for level in range(height):
        heads = [([" " * c.width] * height + c.heading)[-height:][level] for c in columns]
        yield line(table.header[0] if level == height - 1 else "", heads)
    full = width + sum(column.width + gap for column in columns)
    below: list[str] = []  # what is left of a long name
    for index, name in enumerate(names):
        section = table.new_section(index)
        if name or section is not None:
            yield from below
            below = []
        if section is not None:
            yield f"-- {one_line(section)} ".ljust(full, "-")
        elif index == 0:
            yield "-" * full
        if name:
            below = textwrap.wrap(name, width, break_on_hyphens=False)
        first, below = (below[0], below[1:]) if below else ("", [])
        yield line(first, [column.cells[index] for column in columns])
    yield from below


def _cell(line: Line, *, with_interval: bool) -> _Cell:
    """`0.286` and `±.045*`: ends line up below each other, and so do values."""
    value, end = "", ""
    for piece in line:
        if isinstance(piece, Styled) and piece.style == "interval":
            end = piece.text * with_interval + end
        elif isinstance(piece, Styled) and piece.style in _RANKS:
            value, end = value + piece.text, end + _RANKS[piece.style]
        else:
            value += _piece(piece)
    return value, end


def _interval(line: Line) -> bool:
    return any(isinstance(piece, Styled) and piece.style == "interval" for piece in line)


def _line(line: Line) -> str:
    return "".join(map(_piece, line))


def _piece(piece: str | Styled) -> str:
    if isinstance(piece, str):
        return piece
    if piece.style == "mark":
        return piece.text.translate(_SUPERSCRIPTS)
    if piece.style == "code":
        return f"`{piece.text}`"
    return piece.text + _RANKS.get(piece.style, "")
