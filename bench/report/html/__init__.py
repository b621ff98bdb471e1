"""The report as one HTML file that needs nothing else: no network, no style or script but its own.

Every text passes through Jinja's escaping or `page_blocks`; the page's own security policy forbids
every script and style but the two it names by hash, so that what slips through does nothing.

Blocks of a report as HTML. Every piece is escaped here; nowhere else is HTML made of text.
"""

__all__ = [
    "Markup",
    "block_kind",
    "cell_html",
    "heading_html",
    "line_html",
    "one_line_html",
    "render_page",
]

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from bench.report.ablation import ablation_blocks
from bench.report.document import ProtocolReport, Report
from bench.report.html.pictures import Pictures, sample_pictures
from bench.report.html.rows import Column, RowView, columns_of, protocol_source, row_views
from bench.report.html.runs import run_panels
from bench.report.html.svg import PAGE_INK, inline
from bench.report.html.verdicts import Verdicts, row_verdicts
from bench.report.notes import caption, measured_blocks
from bench.report.panels import Panel, protocol_panels, tuning_panels
from bench.report.plots import Progress, draw_swatch, inline_svg, quiet
from bench.report.quoted import quoted_blocks
from bench.report.text import (
    LONGEST_NOTE,
    Block,
    Bullets,
    Code,
    Line,
    Mark,
    Piece,
    Source,
    Strong,
    Table,
    Words,
    one_line,
)


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


_TEMPLATES = Path(__file__).parent / "templates"
_MOST_NUMBERS = 50  # of one line below its plot
_LONG = 40  # rows from which a table scrolls by itself, under a heading that stays


@dataclass(frozen=True)
class _Figure:
    """A panel with its picture and its numbers: line, x, y with its interval."""

    panel: Panel
    svg: Markup
    numbers: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class _Group:
    """Figures that share a heading, a sentence and a legend."""

    title: str
    words: str
    legend: tuple[tuple[Markup, str], ...]
    figures: tuple[_Figure, ...]


@dataclass(frozen=True)
class _Part:
    """One protocol's part of the page."""

    key: str
    report: ProtocolReport
    caption: Line
    columns: tuple[Column, ...]
    rows: tuple[RowView, ...]
    long: bool
    blocks: tuple[Block, ...]
    groups: tuple[_Group, ...]
    pictures: tuple[Pictures, ...]
    verdicts: dict[str, Verdicts]
    source: str


def render_page(report: Report, *, runs: Path | None = None, progress: Progress = quiet) -> str:
    """The page.

    Args:
        report: What to show.
        runs: A run folder or a folder of them, whose training curves are shown.
        progress: Told how many plots are drawn.

    Raises:
        DimoError: `runs` holds no run, or a damaged one.
    """
    training = _groups(run_panels(runs), "t", "plots of runs", progress)
    parts = tuple(_part(part, f"p{i}", report, progress) for i, part in enumerate(report.protocols))
    quoted = [row for part in report.protocols for row in part.quoted]
    style, script = _asset("page.css"), _asset("page.js")
    quoted_tables = [] if report.ablation else quoted_blocks(quoted)
    titles = [part.report.protocol.title for part in parts]
    links = [
        (part.key, "Measured results" if title == report.title else title)
        for part, title in zip(parts, titles, strict=True)
    ]
    links += [("training", "Runs")] * bool(training) + [("quoted", "Quoted results")] * bool(
        quoted_tables
    )
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            parts=parts,
            count=sum(len(part.rows) for part in parts),
            links=links,
            training=training,
            quoted=quoted_tables,
            style=style,
            script=script,
            policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
            f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'",
        )
    )


def _part(part: ProtocolReport, key: str, report: Report, progress: Progress) -> _Part:
    blocks = ablation_blocks(part) if report.ablation else measured_blocks(part)
    table = next((block for block in blocks if isinstance(block, Table)), None)
    whole = table is not None and not report.ablation
    panels = (*protocol_panels(part), *tuning_panels(part)) if whole else ()
    return _Part(
        key=key,
        report=part,
        caption=caption(part.protocol),
        columns=columns_of(part),
        rows=row_views(part, table) if whole and table else (),
        long=len(part.frame) > _LONG,
        blocks=tuple(block for block in blocks if isinstance(block, Bullets) or not whole),
        groups=_groups(panels, key, f"plots of {part.protocol.name}", progress),
        pictures=sample_pictures(part, report.folder) if whole else (),
        verdicts=row_verdicts(part.records, report.folder)
        if whole and part.protocol.detector
        else {},
        source=protocol_source(part.protocol),
    )


_GROUPS = {
    "cost": (
        "Quality against cost",
        "Filled markers and the grey band are the Pareto front: nothing else is better at the same "
        "cost or cheaper at the same quality. Vertical lines are intervals.",
    ),
    "steps": (
        "Each metric by step count",
        "Vertical lines are intervals. Methods of one step count are drawn beside each other.",
    ),
    "tuning": (
        "Tuning",
        "Sampler settings tried on the selection seed, with fewer images; the best one was then "
        "measured on the reporting seed.",
    ),
    "training": ("Training curves", "What the runs logged while they trained."),
}


def _groups(
    panels: Sequence[Panel], prefix: str, what: str, progress: Progress
) -> tuple[_Group, ...]:
    drawn: dict[str, list[_Figure]] = {}
    for number, panel in enumerate(panels):
        progress(what, number, len(panels), "plots")
        svg = inline(inline_svg(panel, PAGE_INK), prefix=f"{prefix}g{number}", label=panel.alt)
        drawn.setdefault(panel.kind, []).append(_Figure(panel, Markup(svg), _numbers(panel)))
    if panels:
        progress(what, len(panels), len(panels), "plots")
    return tuple(
        _Group(*_GROUPS[kind], _legend(figures, f"{prefix}{kind}"), tuple(figures))
        for kind, figures in drawn.items()
    )


def _numbers(panel: Panel) -> tuple[tuple[str, str, str], ...]:
    shown = []
    for line in panel.lines:
        every = -(-len(line.points) // _MOST_NUMBERS)
        for point in line.points[::-1][::every][::-1]:
            interval = "" if point.low is None else f" [{point.low:.4g}, {point.high:.4g}]"
            name = line.label + (f", {point.note}" if point.note else "")
            shown.append((name, f"{point.x:,.6g}", f"{point.y:.5g}{interval}"))
    return tuple(shown)


def _legend(figures: Sequence[_Figure], prefix: str) -> tuple[tuple[Markup, str], ...]:
    labels = {line.style: line.label for figure in figures for line in figure.panel.lines}
    markers = figures[0].panel.markers
    return tuple(
        (Markup(inline(_swatch(style, markers), prefix=f"{prefix}{style}")), label)
        for style, label in sorted(labels.items())
    )


@functools.cache
def _swatch(style: int, markers: bool) -> bytes:
    return draw_swatch(style, PAGE_INK, markers=markers)


def _asset(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8").strip())


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "line": line_html,
        "cell": cell_html,
        "heading": heading_html,
        "plain": one_line_html,
        "kind": block_kind,
    }
    return environment
