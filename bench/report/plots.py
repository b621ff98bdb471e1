"""Panels as pictures; equal panels make equal bytes.

Lines differ in colour (Okabe and Ito's palette, darkened to stand out on white), marker and dashes,
so that they stay distinguishable in grey print and for every kind of colour vision.
"""

import csv
import functools
import io
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.protocol.catalog import METRICS
from bench.report.collect import Report
from bench.report.curves import run_panels
from bench.report.panels import Line, Panel, axis_label, metric_name, protocol_panels, tuning_panels
from dimo.util.files import write_atomic
from dimo.util.terminal import Progress, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT, GRID, MUTED, PAPER = "#1b1f24", "#e3e5e8", "#6a7078", "#ffffff"
LINES = (
    *("#0072b2", "#c95400", "#007f5c", "#a8457f"),
    *("#8f6000", "#1e8fcb", "#4a4a4a", "#6d4fc4"),
)
_MARKERS = "osD^vPX*<>ph"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.5)), (0, (6, 2, 1.2, 2)))
_MOST_BARS = 20  # classes
_WIDTH, _HEIGHT = 3.9, 2.85  # inches: letters stay readable on a phone
_SETTINGS: Any = {
    "svg.hashsalt": "dimo",
    "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "text.parse_math": False,  # a name with dollars is a name
}


def write_plots(
    report: Report, folder: Path, *, runs: Path | None = None, progress: Progress = quiet
) -> list[Path]:
    """Writes every plot of a report as SVG and PNG, named after its protocol and content.

    `runs` is as in `run_panels`. Returns the files, in the order of the report.

    Raises:
        DimoError: A file cannot be written, or `runs` contains no run or a damaged one.
    """
    named: list[tuple[str, Panel]] = []
    names = [part.protocol.name for part in report.protocols]
    for part in report.protocols:
        several = names.count(part.protocol.name) > 1
        tail = "-".join(["", *(digest[:8] for digest in part.measured_with)]) if several else ""
        named += [
            (f"{part.protocol.name}{tail}-{panel.slug}", panel)
            for panel in (*protocol_panels(part), *tuning_panels(part))
        ]
    named += [(panel.slug, panel) for panel in run_panels(runs)]
    paths: list[Path] = []
    for done, (name, panel) in enumerate(named, 1):
        stem = _distinct(name, {path.stem for path in paths})
        for kind in ("svg", "png"):
            paths.append(folder / f"{stem}.{kind}")
            write_atomic(paths[-1], figure_bytes(panel, kind))
        progress("plots", done, len(named), "plots")
    return paths


def write_class_bars(table: Path) -> Path:
    """The worst classes of a `class_table` as bars, one plot a metric, in a PNG beside it."""
    classes = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    names = [name for name in classes[0] if name in METRICS and any(row[name] for row in classes)]
    shown = min(len(classes), _MOST_BARS)
    with _settings():
        size = (_WIDTH * max(len(names), 1), 0.9 + 0.19 * shown)
        figure = Figure(figsize=size, layout="constrained")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(1, len(names), place)
            higher = METRICS[name].higher_is_better
            known = [row for row in classes if row[name]]
            worst = sorted(known, key=lambda row: float(row[name]), reverse=not higher)[:_MOST_BARS]
            values = [float(row[name]) for row in worst]
            axes.barh(range(len(worst)), values, color=LINES[0])
            axes.set_yticks(range(len(worst)), [row["class"] for row in worst])
            axes.invert_yaxis()  # the worst on top
            axes.set_xlabel(axis_label(metric_name(name), higher_is_better=higher), color=TEXT)
            axes.set_ylabel("class", color=TEXT)
            axes.grid(color=GRID, axis="x")
            average = sum(float(row[name]) for row in known) / len(known)
            axes.axvline(average, color=MUTED, linestyle=(0, (1, 2)))
            words = f"{len(worst)} worst of {len(known)} classes; dotted: mean of all"
            axes.set_title(words, color=TEXT, loc="left", fontsize=8.5)
        picture = table.with_suffix(".png")
        write_atomic(picture, _saved(figure, "png", facecolor=PAPER))
    return picture


def figure_bytes(panel: Panel, kind: str) -> bytes:
    """A panel as `svg` or `png` with title and legend on white, for print."""
    with _settings():
        return _saved(_draw(panel, alone=True), kind, facecolor=PAPER)


def page_svg(panel: Panel) -> str:
    """A panel as SVG without title, legend and background, which the page has itself."""
    with _settings():
        return _saved(_draw(panel), "svg", transparent=True).decode()


@functools.cache
def swatch_svg(style: int, *, markers: bool = True) -> str:
    """One style's sample for a legend, as SVG."""
    with _settings():
        figure = Figure(figsize=(0.44, 0.19))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        look = _look(style)
        axes.plot([0.02, 0.98], [0.5, 0.5], color=look["color"], linestyle=look["linestyle"])
        if markers:
            axes.plot([0.5], [0.5], color=look["color"], marker=look["marker"])
        return _saved(figure, "svg", transparent=True).decode()


def _draw(panel: Panel, *, alone: bool = False) -> Figure:
    """Draws one panel, with title and legend if it stands alone."""
    if alone:
        height = _HEIGHT + 0.6 + 0.17 * len(panel.lines)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    else:  # equal margins, so that the axes of neighbours line up
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        figure.subplots_adjust(left=0.175, right=0.95, bottom=0.16, top=0.955)
    axes = figure.add_subplot()
    _axes(axes, panel)
    for label, value in panel.levels:
        axes.axhline(value, color=MUTED, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
        axes.annotate(
            label,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color=MUTED,
        )
    for line in panel.lines:
        _line(axes, line, panel)
    if panel.has_front:
        _pareto_front(axes, panel)
    if alone:
        axes.set_title(panel.title, color=TEXT, loc="left")
        figure.legend(loc="outside lower left", ncols=1, handlelength=3, labelcolor=TEXT)
    return figure


def _axes(axes: "Axes", panel: Panel) -> None:
    axes.set_xlabel(panel.x_label, color=TEXT)
    axes.set_ylabel(panel.y_label, color=TEXT)
    axes.grid(color=GRID)
    axes.tick_params(colors=TEXT, length=3, which="major")
    axes.tick_params(length=0, which="minor")
    for spine in axes.spines.values():
        spine.set_color(TEXT)
    xs = [point.x for line in panel.lines for point in line.points]
    ys = [y for line in panel.lines for p in line.points for y in (p.y, p.low, p.high)]
    ys += [value for _, value in panel.levels]
    if panel.log_x and min(xs) > 0:
        doubling = max(xs) <= 1024 and all(float(x).is_integer() for x in xs)
        base, subs = (2, (1.0,)) if doubling else (10, (1.0, 2.0, 5.0))
        axes.set_xscale("log", base=base)
        axes.xaxis.set_major_locator(LogLocator(base=base, subs=subs, numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(xs) / 1.3, max(xs) * 1.3)
    if panel.log_y and all(y is None or y > 0 for y in ys):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=9))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _line(axes: "Axes", line: Line, panel: Panel) -> None:
    """A line with its points and intervals; lines are side by side where x is a step count."""
    middle = sum(other.style for other in panel.lines) / len(panel.lines)
    look = _look(line.style)
    shift = 1.018 ** (line.style - middle) if panel.kind == "steps" else 1.0
    xs, ys = [shift * point.x for point in line.points], [point.y for point in line.points]
    axes.plot(xs, ys, color=look["color"], linestyle=look["linestyle"], zorder=2)
    for x, point in zip(xs, line.points, strict=True):
        if point.low is not None and point.high is not None:
            axes.plot([x, x], [point.low, point.high], color=look["color"], linewidth=1, zorder=2)
        if point.x_low is not None and point.x_high is not None:
            ends = [point.x_low, point.x_high], [point.y, point.y]
            axes.plot(*ends, color=look["color"], linewidth=1, zorder=2)
    if panel.markers:
        hollow = panel.has_front or panel.kind == "tuning"
        for x, point in zip(xs, line.points, strict=True):
            filled = point.on_front or not hollow
            axes.plot(
                [x],
                [point.y],
                color=look["color"],
                marker=look["marker"],
                markerfacecolor=look["color"] if filled else PAPER,
                linestyle="none",
                zorder=3,
            )
    axes.plot([], [], label=line.label, **(look if panel.markers else look | {"marker": None}))


def _pareto_front(axes: "Axes", panel: Panel) -> None:
    """The Pareto front as a staircase."""
    front = sorted({(p.x, p.y) for line in panel.lines for p in line.points if p.on_front})
    if len(front) < 2:
        return
    axes.plot(
        *zip(*front, strict=True),
        color=MUTED,
        linewidth=5,
        alpha=0.28,
        drawstyle="steps-pre" if panel.higher_x else "steps-post",
        solid_capstyle="round",
        zorder=1,
        label="Pareto front (filled)",
    )


def _look(style: int) -> dict[str, Any]:
    return {
        "color": LINES[style % len(LINES)],
        "marker": _MARKERS[style % len(_MARKERS)],
        "linestyle": _DASHES[style % len(_DASHES)],
    }


@contextmanager
def _settings() -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # not the user's settings
        matplotlib.rcParams.update(_SETTINGS)
        warnings.simplefilter("ignore")  # letters that the font does not have
        yield


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    """Saves a figure without dates and program names."""
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, dpi=200, **options)
    return buffer.getvalue()


def _distinct(name: str, taken: set[str]) -> str:
    """`name` as a file name, with a number if it is taken."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)[:120]
    numbered = (f"{safe}-{number}" for number in itertools.count(2))
    return safe if safe not in taken else next(name for name in numbered if name not in taken)
