"""The report as one HTML file that loads nothing from elsewhere.

Jinja escapes every text; `_line` makes the markup of styled pieces.
"""

__all__ = ["inline_svg", "render_page"]

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from bench.protocol import Protocol, list_protocols, protocol_sha256, protocol_text
from bench.report import plots
from bench.report.collect import ProtocolReport, Report
from bench.report.html.pictures import Pictures, Verdicts, row_verdicts, sample_pictures
from bench.report.html.rows import RowView, row_views
from bench.report.measured import ablation_tables, measured_tables
from bench.report.notes import caption
from bench.report.panels import Panel, protocol_panels, run_panels, thinned, tuning_panels
from bench.report.quoted import quoted_tables
from bench.report.text import LONGEST_NOTE, Line, Styled, Table, one_line
from dimo.util.schema import encode
from dimo.util.terminal import Progress, quiet

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_NUMBERS = 50  # points of a line in the table under its plot
_LONG = 40  # rows from which a table scrolls under a heading that stays


@dataclass(frozen=True)
class _Figure:
    """A panel with its picture and its numbers: (line, x, y with its interval)."""

    panel: Panel
    svg: Markup
    numbers: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class _Group:
    """Figures that share a heading, a sentence and a legend of (sample, label)."""

    title: str
    words: str
    legend: tuple[tuple[Markup, str], ...]
    figures: tuple[_Figure, ...]


@dataclass(frozen=True)
class _Part:
    """One protocol's part of the page.

    Attributes:
        key: Anchor of the part.
        columns: Headings after the name, and whether sorting begins with the largest.
        tables: What is shown below the sortable table, or in its place if there is none.
    """

    key: str
    report: ProtocolReport
    caption: Line
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[RowView, ...]
    long: bool
    tables: tuple[Table, ...]
    groups: tuple[_Group, ...]
    pictures: tuple[Pictures, ...]
    verdicts: dict[str, Verdicts]
    source: str


def render_page(report: Report, *, runs: Path | None = None, progress: Progress = quiet) -> str:
    """The page, with the training curves of `runs`, a run folder or a folder of run folders.

    `progress` is called with the number of plots drawn.

    Raises:
        DimoError: `runs` contains no run, or a damaged one.
    """
    training = _groups(run_panels(runs), "t", "plots of runs", progress)
    parts = [_part(part, f"p{i}", report, progress) for i, part in enumerate(report.protocols)]
    rows = [row for part in report.protocols for row in part.quoted]
    quoted = [] if report.ablation else quoted_tables(rows)
    links = []
    for part in parts:
        title = part.report.protocol.title
        links.append((part.key, "Measured results" if title == report.title else title))
    links += [("training", "Runs")] * bool(training) + [("quoted", "Quoted results")] * bool(quoted)
    template = _environment().get_template("page.html")
    return template.render(
        report=report,
        parts=parts,
        count=sum(len(part.rows) for part in parts),
        links=links,
        training=training,
        quoted=quoted,
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8").strip()),
        script=Markup((_TEMPLATES / "page.js").read_text(encoding="utf-8").strip()),
    )


def _part(part: ProtocolReport, key: str, report: Report, progress: Progress) -> _Part:
    tables = ablation_tables(part) if report.ablation else measured_tables(part)
    results = tables[0] if tables[0].header and not report.ablation else None
    panels: tuple[Panel, ...] = ()
    if results:
        panels = (*protocol_panels(part), *tuning_panels(part))
        tables = [Table(notes=results.notes)]  # the settings are in each row's provenance
    header = results.header[1:] if results else ()
    judged = results and part.protocol.detector
    return _Part(
        key=key,
        report=part,
        caption=caption(part.protocol),
        columns=tuple((heading, heading.endswith(("(↑)", "images/s"))) for heading in header),
        rows=row_views(part, results) if results else (),
        long=len(part.frame) > _LONG,
        tables=tuple(tables),
        groups=_groups(panels, key, f"plots of {part.protocol.name}", progress),
        pictures=sample_pictures(part, report.folder) if results else (),
        verdicts=row_verdicts(part.records, report.folder) if judged else {},
        source=_protocol_source(part.protocol),
    )


def _protocol_source(protocol: Protocol) -> str:
    """The file of a bundled protocol; the content of another one as JSON."""
    for shipped in list_protocols():
        if protocol_sha256(shipped) == protocol_sha256(protocol):
            return protocol_text(shipped.name)
    return json.dumps(encode(protocol), indent=2, ensure_ascii=False)


_GROUPS = {
    "cost": (
        "Quality against cost",
        "Filled markers and the grey band are the Pareto front: nothing else is better at the same "
        "cost or cheaper at the same quality. Vertical lines are intervals.",
    ),
    "steps": (
        "Each metric by step count",
        "Vertical lines are intervals. Methods with the same step count are drawn side by side.",
    ),
    "tuning": (
        "Tuning",
        "Sampler settings tried on the selection seed, with fewer images; the best one was then "
        "measured on the reporting seed.",
    ),
    "training": ("Training curves", "What the runs logged during training."),
}


def _groups(
    panels: Sequence[Panel], prefix: str, what: str, progress: Progress
) -> tuple[_Group, ...]:
    drawn: dict[str, list[_Figure]] = {}
    for number, panel in enumerate(panels):
        progress(what, number, len(panels), "plots")
        svg = inline_svg(plots.page_svg(panel), f"{prefix}g{number}", panel.alt)
        drawn.setdefault(panel.kind, []).append(_Figure(panel, svg, tuple(_numbers(panel))))
    if panels:
        progress(what, len(panels), len(panels), "plots")
    return tuple(
        _Group(*_GROUPS[kind], _legend(figures, f"{prefix}{kind}"), tuple(figures))
        for kind, figures in drawn.items()
    )


def _numbers(panel: Panel) -> Iterator[tuple[str, str, str]]:
    for line in panel.lines:
        for point in thinned(line.points, _MOST_NUMBERS):
            interval = "" if point.low is None else f" [{point.low:.4g}, {point.high:.4g}]"
            name = line.label + (f", {point.note}" if point.note else "")
            yield name, f"{point.x:,.6g}", f"{point.y:.5g}{interval}"


def _legend(figures: Sequence[_Figure], prefix: str) -> tuple[tuple[Markup, str], ...]:
    labels = {line.style: line.label for figure in figures for line in figure.panel.lines}
    markers = figures[0].panel.markers
    return tuple(
        (inline_svg(_swatch(style, markers), f"{prefix}{style}"), label)
        for style, label in sorted(labels.items())
    )


@functools.cache
def _swatch(style: int, markers: bool) -> str:
    return plots.swatch_svg(style, markers=markers)


_COLORS = {
    plots.TEXT: "var(--ink)",
    plots.GRID: "var(--faint)",
    plots.MUTED: "var(--muted)",
    plots.PAPER: "var(--sheet)",
    **{color: f"var(--c{index})" for index, color in enumerate(plots.LINES)},
}


def inline_svg(svg: str, prefix: str, label: str = "") -> Markup:
    """An SVG of matplotlib as part of the page, in the page's colours.

    `prefix` makes its ids unique; `label` is the picture in words, empty if it is decoration.
    """

    def tag(match: re.Match[str]) -> str:
        text = match[0].replace("xlink:href", "href")
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
        return re.sub("#[0-9a-f]{6}", lambda color: _COLORS.get(color[0], color[0]), text)

    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", re.sub("<[^>]+>", tag, svg)).strip()
    words = Markup('role="img" aria-label="{}"').format(label) if label else 'aria-hidden="true"'
    return Markup(f"<svg {words}{svg.removeprefix('<svg')}")


def _line(line: Line) -> Markup:
    return Markup("").join(_piece(piece) for piece in line)


def _cell(line: Line) -> Markup:
    """A line in a cell, with a less prominent interval after a number."""
    if len(line) == 2 and isinstance(line[1], str) and line[1].startswith(" ±"):
        return Markup("{} <s>{}</s>").format(_piece(line[0]), line[1].strip())
    return _line(line)


def _heading(heading: str) -> Markup:
    """`FID (↓)` with the direction apart from the name."""
    match = re.fullmatch(r"(.*) \(([↓↑])\)", heading)
    if match is None:
        return escape(heading)
    return Markup(
        '{}<span class="better" aria-hidden="true">{}</span>'
        '<span class="unseen">, {} is better</span>'
    ).format(match[1], match[2], "lower" if match[2] == "↓" else "higher")


_TAGS = {"code": "code", "strong": "strong", "best": "b", "second": "u"}


def _piece(piece: str | Styled) -> Markup:
    if isinstance(piece, str):
        return escape(piece)
    if piece.style in _TAGS:
        tag = _TAGS[piece.style]
        return Markup(f"<{tag}>{escape(piece.text)}</{tag}>")
    if arxiv := re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", piece.text):
        return Markup(f'<a href="https://arxiv.org/abs/{arxiv[1]}">{piece.text}</a>')
    return escape(piece.text)


def _plain(value: object, longest: int = LONGEST_NOTE) -> str:
    return one_line(str(value), longest)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"line": _line, "cell": _cell, "heading": _heading, "plain": _plain}
    return environment
