"""The report as GitHub Markdown. Whatever a text holds, it is shown and does nothing.

Tables inside a hand-written Markdown page that a report keeps up to date.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.report.document import Report
from bench.report.outline import measured_part, report_blocks
from bench.report.text import (
    Block,
    Bullets,
    Code,
    Heading,
    Line,
    Mark,
    Paragraph,
    Piece,
    Source,
    Strong,
    Words,
    one_line,
)
from dimo.errors import DimoError

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "<span>$</span>"}
_ACTIVE = re.compile(r"[\\`*|~#&<>$_\]:.]")  # whatever may have to be escaped has one of these


def report_markdown(report: Report) -> str:
    """Measured results first, then quoted ones, then files left out; ends with a newline."""
    return _joined(_block(block, top=2) for block in report_blocks(report))


def section_markdown(report: Report) -> str:
    """The measured part alone, to stand in a page that has its own headings around it.

    Details are folded away, as GitHub shows `<details>`.
    """
    return _joined(_folded(measured_part(report), top=3))


def text(value: object, longest: int = 60) -> str:
    """Any text on one line, cut to `longest` characters, with nothing in it that Markdown or HTML
    would act on. Brackets are left as they are (`Di[M]O`) unless they could make a link.
    """
    return _escaped(one_line(str(value), longest))


def code(value: object, longest: int = 60) -> str:
    """Any text as a code span of one line. Not for table cells: a bar would end the cell."""
    line = one_line(str(value), longest)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def pipe_table(
    header: Sequence[str],
    body: Iterable[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    sections: Sequence[str] | None = None,
) -> str:
    """A table whose columns also line up as plain text.

    Args:
        header: Column headings, escaped.
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


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _folded(blocks: Iterable[Block], top: int) -> Iterator[str]:
    """The text of each block, from the heading of a detail to the next heading in `<details>`."""
    inside = False
    for block in blocks:
        if not isinstance(block, Heading):
            yield _block(block, top)
            continue
        if inside:
            yield "</details>"
        inside = block.is_detail
        yield f"<details><summary>{_line(block.line)}</summary>" if inside else _block(block, top)
    if inside:
        yield "</details>"


def _block(block: Block, top: int) -> str:
    if isinstance(block, Heading):
        return f"{'#' * (block.level + top - 1)} {_line(block.line)}"
    if isinstance(block, Paragraph):
        return _line(block.line)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_line(item)}" for item in block.items)
    table = pipe_table(
        [_escaped(heading) for heading in block.header],
        [[_line(cell) for cell in cells] for cells in block.body],
        left=block.left,
        sections=block.sections,
    )
    return f"{table}\n\n{_line(block.caption)}" if block.caption else table


def _line(line: Line) -> str:
    return "".join(_piece(piece) for piece in line)


def _piece(piece: Piece) -> str:
    if isinstance(piece, str):
        return _escaped(piece)
    if isinstance(piece, Words):
        return text(piece.value, piece.longest)
    if isinstance(piece, Code):
        return code(piece.value, piece.longest)
    if isinstance(piece, Strong):
        return f"**{_escaped(piece.words)}**"
    if isinstance(piece, Mark):
        shown = _escaped(piece.shown)
        return {1: f"**{shown}**", 2: f"<ins>{shown}</ins>"}.get(piece.place, shown)
    return _source(piece)


def _source(source: Source) -> str:
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", source.name)
    if found is None:
        return text(source.name)
    return f"[{source.name}](https://arxiv.org/abs/{found[1]})"


def _escaped(line: str) -> str:
    if not _ACTIVE.search(line):
        return line
    special = r"\\`*|~#&<>$" + (r"\[\]" if re.search(r"\][(\[:]", line) else "")
    line = re.sub(f"[{special}]", lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line)
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    return re.sub(r"(?i)\b(https?|ftp|www)(?=[:.])", r"\1<span></span>", line)  # no automatic link


def _padded(cell: str, width: int, left: bool) -> str:
    padding = " " * (width - _width(cell))
    return cell + padding if left else padding + cell


def _width(cell: str) -> int:
    """Columns that a text takes in a terminal."""
    if cell.isascii():
        return len(cell)
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in cell
    )


_BLOCK = re.compile(
    r"^<!-- dimo report --protocol (\S+)( --ablation)? -->\n(.*?)^<!-- dimo report end -->$",
    re.M | re.S,
)


def renewed(page: str, section: Callable[[str, bool], str]) -> str:
    """The page with each table between its marks made again, and all else as it was.

    Args:
        page: Text with blocks between the lines `<!-- dimo report --protocol NAME -->` and
            `<!-- dimo report end -->`; ` --ablation` may follow the name.
        section: Protocol name, and whether of its ablations -> Markdown that ends with a newline.

    Raises:
        DimoError: There is no such block, or a line that begins or ends one stands alone.
    """
    begin, end = "<!-- dimo report --protocol ", "<!-- dimo report end -->"
    blocks = len(_BLOCK.findall(page))
    if not blocks or not page.count(begin) == page.count(end) == blocks:
        raise DimoError(
            f"the page has {blocks} whole tables between {begin}NAME --> and {end}, each on a line "
            f"of its own, {page.count(begin)} beginnings and {page.count(end)} ends; correct it"
        )

    def again(found: re.Match[str]) -> str:
        name, ablation = found[1], found[2] or ""
        return f"{begin}{name}{ablation} -->\n{section(name, bool(ablation))}{end}"

    return _BLOCK.sub(again, page)
