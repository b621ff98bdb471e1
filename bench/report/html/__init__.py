"""The report as one HTML file that loads nothing from elsewhere.

Jinja escapes every text; `_line` makes the markup of styled pieces.
"""

__all__ = ["inline_svg", "render_page"]

import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bench.protocol import Protocol, list_protocols, protocol_sha256, protocol_text
from bench.records.record import MetricValue, ResultRecord, flat
from bench.report import plots
from bench.report import table as cells
from bench.report.collect import ProtocolReport, Report
from bench.report.curves import run_panels
from bench.report.html.pictures import row_verdicts, sample_pictures
from bench.report.measured import ablation_tables, measured_tables
from bench.report.notes import caption, row_notes
from bench.report.panels import Panel, protocol_panels, thinned, tuning_panels
from bench.report.quoted import quoted_tables
from bench.report.table import SYMBOLS, metric_label
from bench.report.text import LONGEST_NAME, LONGEST_NOTE, Line, Styled, Table, one_line
from dimo.util.schema import encode
from dimo.util.terminal import Progress, quiet

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_NUMBERS = 50  # points of a line in the table under its plot
_LONGEST_TEXT = 10_000  # characters of a text in a box that scrolls
_LONG = 40  # rows from which a table scrolls under a heading that stays


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
        title = part["report"].protocol.title
        links.append((part["key"], "Measured results" if title == report.title else title))
    links += [("training", "Runs")] * bool(training) + [("quoted", "Quoted results")] * bool(quoted)
    template = _environment().get_template("page.html")
    return template.render(
        report=report,
        parts=parts,
        count=sum(len(part["rows"]) for part in parts),
        links=links,
        training=training,
        quoted=quoted,
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8").strip()),
        script=Markup((_TEMPLATES / "page.js").read_text(encoding="utf-8").strip()),
    )


def _part(part: ProtocolReport, key: str, report: Report, progress: Progress) -> dict[str, Any]:
    """One protocol's part of the page; `key` is its anchor.

    `columns` are the headings after the name and whether sorting begins with the largest, `tables`
    is shown below the sortable table, or in its place if there is none.
    """
    tables = ablation_tables(part) if report.ablation else measured_tables(part, settings=True)
    results = None if part.frame.empty or report.ablation else tables[0]
    panels: tuple[Panel, ...] = ()
    if results:
        panels = (*protocol_panels(part), *tuning_panels(part))
        tables = [Table(notes=results.notes), *tables[1:]]
    header = results.header[1:] if results else ()
    judged = results and part.protocol.detector
    return {
        "key": key,
        "report": part,
        "caption": caption(part.protocol),
        "columns": [(heading, heading.endswith(("(↑)", "images/s"))) for heading in header],
        "rows": _rows(part, results) if results else [],
        "long": len(part.seeds) > _LONG,
        "tables": tables,
        "groups": _groups(panels, key, f"plots of {part.protocol.name}", progress),
        "pictures": sample_pictures(part, report.folder) if results else (),
        "verdicts": row_verdicts(part.records, report.folder) if judged else {},
        "source": _protocol_source(part.protocol),
    }


def _rows(part: ProtocolReport, table: Table) -> list[dict[str, Any]]:
    """The rows of a table of `measured_tables`, each with its provenance as term -> text."""
    views = []
    rows, means = cells.rows(part.table), part.rows
    details = cells.distinguishing(means, SYMBOLS)
    marks, _ = row_notes(rows, part.seeds, part.shown)
    for index, (row, words, mark) in enumerate(zip(rows, details, marks, strict=True)):
        name = means[index].method.name + f" ({words})" * bool(words)
        view = {"section": row["section"], "name": (one_line(name, LONGEST_NAME), *mark)}
        view |= {"label": cells.row_label(row), "cells": table.rows[index][1:]}
        views.append(view | {"runs": [*map(_run, part.seeds[index])]})
    return views


def _run(record: ResultRecord) -> dict[str, Any]:
    """Everything in a record by part, as `dimo results show` names it, and its command."""
    parts = {"values": [_metric(name, value) for name, value in record.metrics.items()]}
    for key, value in flat(record).items():
        part, _, field = key.partition(".")
        if value not in (None, "", []) and not key.startswith(("command", "method.tuning.")):
            parts.setdefault(part, []).append(f"{field} {_value(value)}".strip())
    parts["run"] = [record.run_id, record.created, f"took {record.seconds:,.1f} s"]
    facts = {part: one_line(" \u00b7 ".join(it), _LONGEST_TEXT) for part, it in parts.items() if it}
    command = record.command[:_LONGEST_TEXT]
    command = command if command.isprintable() else one_line(command, _LONGEST_TEXT)
    return {"facts": facts, "command": command, "run_id": record.run_id}


def _metric(name: str, metric: MetricValue) -> str:
    shown = f"{metric_label(name)} {metric.value:.5g}"
    if metric.low is not None:
        shown += f" [{metric.low:.5g}, {metric.high:.5g}]"
    extra = "".join(f", {key} {value:.5g}" for key, value in metric.extra.items())
    return f"{shown}, N {metric.n:,}{extra}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _protocol_source(protocol: Protocol) -> str:
    """The file of a bundled protocol; the content of another one as JSON."""
    for bundled in list_protocols():
        if protocol_sha256(bundled) == protocol_sha256(protocol):
            return protocol_text(bundled.name)
    return json.dumps(encode(protocol), indent=2, ensure_ascii=False)


_GROUPS = {
    "cost": (
        "Quality against cost",
        "Filled markers and the grey band are the Pareto front: nothing else is better at the same "
        "cost or cheaper at the same quality. Vertical lines are intervals, of a mean the range "
        "of its training seeds.",
    ),
    "steps": (
        "Each metric by step count",
        "Vertical lines are intervals, of a mean the range of its training seeds. Methods with the "
        "same step count are drawn side by side.",
    ),
    "trade-off": (
        "Trade-offs",
        "One metric against another; a line joins the step counts of a method. Filled markers and "
        "the grey band are the Pareto front: nothing else is better in one metric and no worse in "
        "the other. Crosses are intervals, of a mean the range of its training seeds.",
    ),
    "tuning": (
        "Tuning",
        "Sampler settings tried on the selection seed, with fewer images; the best one was then "
        "measured on the reporting seed.",
    ),
    "sweep": (
        "Trade-offs of sampler settings",
        "What the sweeps tried on the selection seed, with fewer images than a row of the table; a "
        "line joins the guidance scales (s), or else the values of one setting, at fixed others. "
        "Filled markers and the grey band are the Pareto front.",
    ),
    "training": ("Training curves", "What the runs logged during training."),
}


def _groups(
    panels: Sequence[Panel], prefix: str, what: str, progress: Progress
) -> list[dict[str, Any]]:
    """Figures by kind, each kind with a title, a sentence and a legend of (sample, label)."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    for number, panel in enumerate(panels):
        progress(what, number, len(panels), "plots")
        svg = inline_svg(plots.page_svg(panel), f"{prefix}g{number}", panel.alt)
        figure = {"panel": panel, "svg": svg, "numbers": list(_numbers(panel))}
        drawn.setdefault(panel.kind, []).append(figure)
    if panels:
        progress(what, len(panels), len(panels), "plots")
    groups = []
    for kind, figures in drawn.items():
        title, words = _GROUPS[kind]
        legend = _legend([figure["panel"] for figure in figures], f"{prefix}{kind}")
        groups.append({"title": title, "words": words, "legend": legend, "figures": figures})
    return groups


def _numbers(panel: Panel) -> Iterator[tuple[str, str, str]]:
    """Line, x, and y with its interval, of the table under a plot."""
    for line in panel.lines:
        for point in thinned(line.points, _MOST_NUMBERS):
            interval = "" if point.low is None else f" [{point.low:.4g}, {point.high:.4g}]"
            name = line.label + (f", {point.note}" if point.note else "")
            yield name, f"{point.x:,.6g}", f"{point.y:.5g}{interval}"


def _legend(panels: Sequence[Panel], prefix: str) -> list[tuple[Markup, str]]:
    labels, swatch = {ln.style: ln.label for p in panels for ln in p.lines}, plots.swatch_svg
    return [
        (inline_svg(swatch(style, markers=panels[0].markers), f"{prefix}{style}"), label)
        for style, label in sorted(labels.items())
    ]


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


def _heading(heading: str) -> Markup:
    """`FID (↓)` with the direction apart from the name."""
    match = re.fullmatch(r"(.*) \(([↓↑])\)", heading)
    if match is None:
        return escape(heading)
    return Markup(
        '{}<span class="better" aria-hidden="true">{}</span>'
        '<span class="unseen">, {} is better</span>'
    ).format(match[1], match[2], "lower" if match[2] == "↓" else "higher")


_TAGS = {
    **{"code": "code", "strong": "strong", "best": "b", "second": "u"},
    **{"mark": "sup", "interval": "s"},
}


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
    environment.filters |= {"line": _line, "heading": _heading, "plain": _plain}
    return environment
