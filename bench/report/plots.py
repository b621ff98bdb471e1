"""Panels as pictures: the one place where matplotlib is used. Equal panels make equal bytes.

Lines differ in colour (after Okabe and Ito's palette for every kind of colour vision, darkened to
stand out on white), in marker and in dashes, so that they can be told apart in grey print too.
"""

import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.report.document import Report
from bench.report.html.runs import run_panels
from bench.report.panels import Line, Panel, Point, protocol_panels, tuning_panels
from dimo.util.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Progress: TypeAlias = Callable[[str, int, int, str], None]  # what, done, total, unit

STYLES = 8  # colours; markers and dashes have longer cycles
_MARKERS = "osD^vPX*<>ph"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.5)), (0, (6, 2, 1.2, 2)))
_WIDTH, _HEIGHT = 3.9, 2.85  # inches: letters are readable where this is as wide as a phone
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


@dataclass(frozen=True)
class Ink:
    """Colours of a drawing.

    Attributes:
        text: Of letters and axes.
        faint: Of the grid.
        muted: Of what is not a method: reference levels and the front.
        paper: Inside hollow markers.
        lines: `STYLES` colours.
    """

    text: str
    faint: str
    muted: str
    paper: str
    lines: tuple[str, ...]


_PRINT = Ink(
    text="#1b1f24",
    faint="#e3e5e8",
    muted="#6a7078",
    paper="#ffffff",
    lines=(
        "#0072b2",
        "#c95400",
        "#007f5c",
        "#a8457f",
        "#8f6000",
        "#1e8fcb",
        "#4a4a4a",
        "#6d4fc4",
    ),
)


def quiet(what: str, done: int, total: int, unit: str) -> None:
    """Progress that nobody watches."""


def write_plots(
    report: Report, folder: Path, *, runs: Path | None = None, progress: Progress = quiet
) -> list[Path]:
    """Writes every plot of a report as SVG and PNG, named by protocol and by what it shows.

    Args:
        report: What to show.
        folder: Where to; made if it is not there.
        runs: A run folder or a folder of them, whose training curves are added.
        progress: Told how many plots are written.

    Returns:
        The files, in the order of the report.

    Raises:
        DimoError: A file cannot be written.
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
        svg, png = folder / f"{stem}.svg", folder / f"{stem}.png"
        write_atomic(svg, figure_bytes(panel, "svg"))
        write_atomic(png, figure_bytes(panel, "png"))
        paths += [svg, png]
        progress("plots", done, len(named), "plots")
    return paths


def figure_bytes(panel: Panel, kind: Literal["svg", "png"]) -> bytes:
    """A panel with title and legend on white, for print; the same bytes each time."""
    with _settings():
        figure = _draw(panel, _PRINT, alone=True)
        return _saved(figure, kind, facecolor=_PRINT.paper)


def inline_svg(panel: Panel, ink: Ink) -> bytes:
    """A panel without title, legend and background."""
    with _settings():
        return _saved(_draw(panel, ink), "svg", transparent=True)


def draw_swatch(style: int, ink: Ink, *, markers: bool = True) -> bytes:
    """The sign of one style in a legend, as SVG."""
    with _settings():
        figure = Figure(figsize=(0.44, 0.19))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        look = _look(style, ink)
        axes.plot([0.02, 0.98], [0.5, 0.5], color=look["color"], linestyle=look["linestyle"])
        if markers:
            axes.plot([0.5], [0.5], color=look["color"], marker=look["marker"])
        return _saved(figure, "svg", transparent=True)


def _draw(panel: Panel, ink: Ink, *, alone: bool = False) -> Figure:
    """Draws one panel.

    Args:
        panel: What to draw.
        ink: Its colours.
        alone: Whether it stands outside the page: with title, legend and note.
    """
    if alone:
        height = _HEIGHT + 0.6 + 0.17 * len(panel.lines)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    else:  # the same margins everywhere: axes of neighbours line up
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        figure.subplots_adjust(left=0.175, right=0.95, bottom=0.16, top=0.955)
    axes = figure.add_subplot()
    _axes(axes, panel, ink)
    for label, value in panel.levels:
        axes.axhline(value, color=ink.muted, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
        axes.annotate(
            label,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color=ink.muted,
        )
    for line in panel.lines:
        _line(axes, line, panel, ink)
    _front(axes, panel, ink)
    if alone:
        axes.set_title(panel.title, color=ink.text, loc="left")
        _legend(figure, ink)
    return figure


def _axes(axes: "Axes", panel: Panel, ink: Ink) -> None:
    axes.set_xlabel(panel.x_label, color=ink.text)
    axes.set_ylabel(panel.y_label, color=ink.text)
    axes.grid(color=ink.faint)
    axes.tick_params(colors=ink.text, length=3, which="major")
    axes.tick_params(length=0, which="minor")
    for spine in axes.spines.values():
        spine.set_color(ink.text)
    xs = [point.x for line in panel.lines for point in line.points]
    ys = [y for line in panel.lines for point in line.points for y in _extent(point)]
    ys += [value for _, value in panel.levels]
    if panel.log_x and min(xs) > 0:
        doubling = max(xs) <= 1024 and all(float(x).is_integer() for x in xs)
        axes.set_xscale("log", base=2 if doubling else 10)
        subs = (1.0,) if doubling else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(base=2 if doubling else 10, subs=subs, numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(xs) / 1.3, max(xs) * 1.3)
    if panel.log_y and min(ys) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=9))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _line(axes: "Axes", line: Line, panel: Panel, ink: Ink) -> None:
    """Points, intervals and what joins them; beside each other where x is a number of steps."""
    middle = sum(other.style for other in panel.lines) / len(panel.lines)
    look = _look(line.style, ink)
    shift = 1.018 ** (line.style - middle) if panel.kind == "steps" else 1.0
    xs, ys = [shift * point.x for point in line.points], [point.y for point in line.points]
    axes.plot(xs, ys, color=look["color"], linestyle=look["linestyle"], zorder=2)
    for point in line.points:
        if point.low is not None and point.high is not None:
            x = shift * point.x
            axes.plot([x, x], [point.low, point.high], color=look["color"], linewidth=1, zorder=2)
    if panel.markers:
        hollow = panel.kind in ("cost", "tuning")
        for point in line.points:
            filled = point.on_front or not hollow
            axes.plot(
                [shift * point.x],
                [point.y],
                color=look["color"],
                marker=look["marker"],
                markerfacecolor=look["color"] if filled else ink.paper,
                linestyle="none",
                zorder=3,
            )
    axes.plot([], [], label=line.label, **(look if panel.markers else look | {"marker": None}))


def _front(axes: "Axes", panel: Panel, ink: Ink) -> None:
    """The stairs below which (or above which) no method is."""
    if panel.kind != "cost":
        return
    front = sorted({(p.x, p.y) for line in panel.lines for p in line.points if p.on_front})
    if len(front) < 2:
        return
    rising = "steps-post" if panel.slug.endswith("nfe") else "steps-pre"
    axes.plot(
        [x for x, _ in front],
        [y for _, y in front],
        color=ink.muted,
        linewidth=5,
        alpha=0.28,
        drawstyle=rising,
        solid_capstyle="round",
        zorder=1,
        label="Pareto front (filled)",
    )


def _legend(figure: Figure, ink: Ink) -> None:
    legend = figure.legend(loc="outside lower left", ncols=1, handlelength=3)
    for text in legend.get_texts():
        text.set_color(ink.text)


def _look(style: int, ink: Ink) -> dict[str, Any]:
    return {
        "color": ink.lines[style % STYLES],
        "marker": _MARKERS[style % len(_MARKERS)],
        "linestyle": _DASHES[style % len(_DASHES)],
    }


def _extent(point: Point) -> tuple[float, ...]:
    return tuple(y for y in (point.y, point.low, point.high) if y is not None)


@contextmanager
def _settings() -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(_SETTINGS)
        warnings.simplefilter("ignore")  # of letters that the font does not have
        yield


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    """Without dates and names of programs."""
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, dpi=200, **options)
    return buffer.getvalue()


def _distinct(name: str, taken: set[str]) -> str:
    """`name`, made fit for a file, with a number if it is taken."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)[:120]
    numbered = (f"{safe}-{number}" for number in itertools.count(2))
    return safe if safe not in taken else next(found for found in numbered if found not in taken)
