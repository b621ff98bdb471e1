"""Blocks of a report as HTML. Every piece is escaped here; nowhere else is HTML made of text."""

__all__ = ["Markup", "block_kind", "cell_html", "heading_html", "line_html", "one_line_html"]

import re

from markupsafe import Markup, escape

from bench.report.blocks import Block, Code, Line, Mark, Piece, Source, Strong, Words
from bench.report.plain import LONGEST_NOTE, one_line


def one_line_html(value: object, longest: int = LONGEST_NOTE) -> Markup:
    """Any text on one line; a direction of its own stays inside it."""
    shown = one_line(str(value), longest)
    return escape(shown) if shown.isascii() else Markup(f"<bdi>{escape(shown)}</bdi>")


def line_html(line: Line) -> Markup:
    """A line of pieces."""
    return Markup("".join(_piece(piece) for piece in line))


def cell_html(line: Line) -> Markup:
    """A line in a cell: the interval after a number stands back."""
    if len(line) == 2 and isinstance(line[1], str) and line[1].startswith(" ±"):
        return Markup(f"{_piece(line[0])} <s>{escape(line[1].strip())}</s>")
    return line_html(line)


def heading_html(heading: str) -> Markup:
    """`FID (↓)`: the direction that is better, apart from the name."""
    found = re.fullmatch(r"(.*) \(([↓↑])\)", heading)
    if found is None:
        return escape(heading)
    better = "lower" if found[2] == "↓" else "higher"
    return Markup(
        f'{escape(found[1])}<span class="better" aria-hidden="true">{found[2]}</span>'
        f'<span class="unseen">, {better} is better</span>'
    )


def block_kind(block: Block) -> str:
    """Name of the kind of a block, for templates."""
    return type(block).__name__


def _piece(piece: Piece) -> Markup:
    if isinstance(piece, str):
        return escape(piece)
    if isinstance(piece, Words):
        return one_line_html(piece.value, piece.longest)
    if isinstance(piece, Code):
        return Markup(f"<code>{one_line_html(piece.value, piece.longest)}</code>")
    if isinstance(piece, Mark):
        tag = {1: "b", 2: "u"}.get(piece.place)
        return Markup(f"<{tag}>{escape(piece.shown)}</{tag}>") if tag else escape(piece.shown)
    if isinstance(piece, Strong):
        return Markup(f"<strong>{escape(piece.words)}</strong>")
    assert isinstance(piece, Source)
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", piece.name)
    if found is None:
        return one_line_html(piece.name)
    return Markup(f'<a href="https://arxiv.org/abs/{found[1]}">{escape(piece.name)}</a>')
