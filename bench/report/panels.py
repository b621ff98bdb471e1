"""What a plot shows, as numbers: panels of lines, from the frame of a report. Draws nothing.

The sweeps that chose settings, as panels: one for each setting that was varied.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.protocol.catalog import METRICS
from bench.records.selection import Criterion, Tuning
from bench.report import table as cells
from bench.report.document import ProtocolReport
from bench.report.text import LONGEST_NOTE, one_line

MOST_LINES = 12  # more methods than these cannot be told apart in one plot
_LOG_FROM = 4.0  # largest : smallest value from which a distance is drawn on a log scale
_LONGEST_LABEL = 48

Kind = Literal["cost", "steps", "tuning", "training"]


@dataclass(frozen=True)
class Point:
    """One value of a line.

    Attributes:
        x: Where.
        y: The value.
        low: Lower end of its interval, None where there is none; then `high` is None too.
        high: Upper end of its interval.
        note: What a reader of the numbers needs to know, such as the number of steps.
        on_front: Whether it is marked: nothing is better in one of x and y and no worse in the
            other, or a sweep chose it.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    on_front: bool = False


@dataclass(frozen=True)
class Line:
    """Points of one method; `style` numbers its colour, marker and dashes in all panels alike."""

    label: str
    style: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        slug: Its name in files.
        kind: What it is for.
        title: In a few words.
        x_label: Of the axis.
        y_label: Of the axis.
        lines: What is drawn, in the order of the table.
        higher_is_better: Of y; None: neither.
        log_x: Whether x doubles at equal distances.
        log_y: Whether y is on a log scale.
        levels: Horizontal lines with their names: the reference itself.
        note: What is left out of it and why; empty: nothing.
        markers: Whether each point gets a marker.
    """

    slug: str
    kind: Kind
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    higher_is_better: bool | None
    log_x: bool = False
    log_y: bool = False
    levels: tuple[tuple[str, float], ...] = ()
    note: str = ""
    markers: bool = True

    @property
    def alt(self) -> str:
        """The plot in words, for those who do not see it."""
        shown = f"{self.title}: {self.y_label} against {self.x_label}, {_count(self.lines)}."
        points = [(line, point) for line in self.lines for point in line.points]
        if points and self.higher_is_better is not None:
            choose = max if self.higher_is_better else min
            line, best = choose(points, key=lambda pair: pair[1].y)
            word = "Highest" if self.higher_is_better else "Lowest"
            shown += f" {word}: {best.y:.4g}, {line.label}{_in_brackets(best.note)}."
        marked = [f"{ln.label}{_in_brackets(p.note)}" for ln, p in points if p.on_front]
        if self.kind == "cost" and marked:
            shown += f" Pareto front: {', '.join(marked)}."
        return shown


def protocol_panels(part: ProtocolReport) -> tuple[Panel, ...]:
    """The plots of one table: its first metric against cost, and each metric against steps."""
    rows = [row for row in cells.rows(part.frame) if row["section"] != "Reference"]
    reference = [row for row in cells.rows(part.frame) if row["section"] == "Reference"]
    names = [metric.name for metric in part.protocol.metrics]
    shown, left_out = _chosen_methods(rows, names[0])
    kept = [row for row in rows if row["method"] in shown]
    panels = [_cost_panel(kept, reference, names[0], "nfe", shown, left_out)]
    device, others = _main_device(kept)
    if device is not None:
        same = [row for row in kept if _place(row) == device]
        note = f"On {one_line(device, LONGEST_NOTE)}."
        if others:
            methods = ", ".join(dict.fromkeys(one_line(row["method"], 40) for row in others))
            note += f" Speeds of other machines are left out: {methods}."
        panel = _cost_panel(same, reference, names[0], "images_per_second", shown, left_out)
        panels.append(replace(panel, note=f"{note} {panel.note}".strip()))
    panels += [_steps_panel(kept, reference, name, shown, left_out) for name in names]
    return tuple(panel for panel in panels if panel.lines)


def row_label(row: dict[str, Any]) -> str:
    """Name and steps of a row: `MaskGIT, 8 steps`."""
    steps = _steps(row["num_steps"])
    return one_line(row["method"], _LONGEST_LABEL) + (f", {steps}" if steps else "")


def pareto_front(
    points: Iterable[tuple[float, float]], *, higher_x: bool, higher_y: bool
) -> set[tuple[float, float]]:
    """The points that no other one beats: better in x or in y, and no worse in the other."""
    signed = {((-x if higher_x else x), (-y if higher_y else y)): (x, y) for x, y in points}
    front, best = set(), math.inf
    for cost, loss in sorted(signed):
        if loss < best:
            front.add(signed[cost, loss])
            best = loss
    return front


def is_better(first: float, second: float, *, higher_is_better: bool) -> bool:
    """Whether the first value is the better one."""
    return first > second if higher_is_better else first < second


def _chosen_methods(rows: Sequence[dict[str, Any]], metric: str) -> tuple[dict[str, int], int]:
    """Methods that are drawn, with the number of their style, and how many are not."""
    best: dict[str, float] = {}
    higher = METRICS[metric].higher_is_better
    for row in rows:
        if cells.is_missing(row[metric]):
            best.setdefault(row["method"], -math.inf if higher else math.inf)
            continue
        known = best.get(row["method"])
        if known is None or is_better(row[metric], known, higher_is_better=higher):
            best[row["method"]] = row[metric]
    ranked = sorted(best, key=lambda name: -best[name] if higher else best[name])
    kept = set(ranked[:MOST_LINES])
    names = [name for name in best if name in kept]
    return {name: style for style, name in enumerate(names)}, len(best) - len(kept)


def _cost_panel(
    rows: Sequence[dict[str, Any]],
    reference: Sequence[dict[str, Any]],
    metric: str,
    cost: str,
    shown: dict[str, int],
    left_out: int,
) -> Panel:
    kind = METRICS[metric]
    fast = cost == "images_per_second"
    known = [r for r in rows if not cells.is_missing(r[metric]) and not cells.is_missing(r[cost])]
    pairs = [(float(row[cost]), float(row[metric])) for row in known]
    front = pareto_front(pairs, higher_x=fast, higher_y=kind.higher_is_better)
    lines = _lines(known, metric, cost, shown, front)
    words = "images/s" if fast else "NFE"
    return Panel(
        slug=f"{_slug(metric)}-against-{'speed' if fast else 'nfe'}",
        kind="cost",
        title=f"{_title(metric)} against {'speed' if fast else 'network forwards'}",
        x_label=f"{words} ({'higher' if fast else 'lower'} is better)",
        y_label=_axis(metric),
        lines=lines,
        higher_is_better=kind.higher_is_better,
        log_x=True,
        log_y=_is_log(metric, [y for _, y in pairs]),
        levels=_levels(reference, metric, [y for _, y in pairs]),
        note=_left_out(left_out, metric),
    )


def _steps_panel(
    rows: Sequence[dict[str, Any]],
    reference: Sequence[dict[str, Any]],
    metric: str,
    shown: dict[str, int],
    left_out: int,
) -> Panel:
    kind = METRICS[metric]
    known = [
        r for r in rows if not cells.is_missing(r[metric]) and not cells.is_missing(r["num_steps"])
    ]
    values = [float(row[metric]) for row in known]
    return Panel(
        slug=f"{_slug(metric)}-against-steps",
        kind="steps",
        title=f"{_title(metric)} by step count",
        x_label="sampling steps",
        y_label=_axis(metric),
        lines=_lines(known, metric, "num_steps", shown, set()),
        higher_is_better=kind.higher_is_better,
        log_x=True,
        log_y=_is_log(metric, values),
        levels=_levels(reference, metric, values),
        note=_left_out(left_out, metric),
    )


def _lines(
    rows: Sequence[dict[str, Any]],
    metric: str,
    cost: str,
    shown: dict[str, int],
    front: set[tuple[float, float]],
) -> tuple[Line, ...]:
    points: dict[str, list[Point]] = {}
    for row in rows:
        x, y = float(row[cost]), float(row[metric])
        low, high = row[f"{metric}_low"], row[f"{metric}_high"]
        known = not cells.is_missing(low)
        points.setdefault(row["method"], []).append(
            Point(
                x,
                y,
                float(low) if known else None,
                float(high) if known else None,
                note=_steps(row["num_steps"]),
                on_front=(x, y) in front,
            )
        )
    return tuple(
        Line(one_line(name, _LONGEST_LABEL), shown[name], tuple(sorted(found, key=lambda p: p.x)))
        for name, found in sorted(points.items(), key=lambda item: shown[item[0]])
    )


def _levels(
    reference: Sequence[dict[str, Any]], metric: str, values: Sequence[float]
) -> tuple[tuple[str, float], ...]:
    """Values of the reference rows, where a line for them does not squeeze everything else."""
    if not values:
        return ()
    low, high = min(values), max(values)
    margin = 0.5 * (high - low) or abs(high)
    if _is_log(metric, values):
        low, high, margin = low / 3, high * 3, 0.0
    found: dict[float, list[str]] = {}
    for row in reference:
        if not cells.is_missing(row[metric]) and low - margin <= row[metric] <= high + margin:
            value = float(row[metric])
            near = [known for known in found if abs(known - value) < 0.04 * (high - low)]
            found.setdefault(near[0] if near else value, []).append(one_line(row["method"], 32))
    return tuple((", ".join(names), value) for value, names in found.items())


def _is_log(metric: str, values: Sequence[float]) -> bool:
    if METRICS[metric].higher_is_better or not values or min(values) <= 0:
        return False
    return max(values) / min(values) >= _LOG_FROM


def _main_device(
    rows: Sequence[dict[str, Any]],
) -> tuple[str | None, list[dict[str, Any]]]:
    """Where most rows were timed, and the rows timed elsewhere."""
    timed = [row for row in rows if not cells.is_missing(row["images_per_second"])]
    places = [_place(row) for row in timed]
    if not places:
        return None, []
    main = max(dict.fromkeys(places), key=places.count)
    return main, [row for row in timed if _place(row) != main]


def _place(row: dict[str, Any]) -> str:
    batch = row["batch_size"]
    return str(row["device"]) + ("" if cells.is_missing(batch) else f", batch {int(batch)}")


def _left_out(count: int, metric: str) -> str:
    if not count:
        return ""
    return (
        f"The {MOST_LINES} methods of best {METRICS[metric].label}; {count:,} others are only in "
        "the table."
    )


def _title(metric: str) -> str:
    """`Recall` where a table says `Rec.`."""
    label = METRICS[metric].label
    return metric.replace("_", " ").capitalize() if label.endswith(".") else label


def _axis(metric: str) -> str:
    kind = METRICS[metric]
    return f"{_title(metric)} ({'higher' if kind.higher_is_better else 'lower'} is better)"


def _steps(value: Any) -> str:
    if cells.is_missing(value):
        return ""
    return f"{int(value)} step{'s' if value > 1 else ''}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _count(lines: Sequence[Line]) -> str:
    return f"{len(lines)} line{'' if len(lines) == 1 else 's'}"


def _slug(name: str) -> str:
    return name.replace("_", "-")


_TUNING_LOG_FROM = 4.0


def tuning_panels(part: ProtocolReport) -> tuple[Panel, ...]:
    """What settings were chosen by, on the selection seed, against each setting.

    Where a sweep varied several settings at once, a line has the best of each value. The chosen
    value is marked.
    """
    swept = [
        (row_label(row), record.method.tuning)
        for row, record in zip(cells.rows(part.frame), part.records, strict=True)
        if record.method.tuning is not None
    ]
    kept, left_out = swept[:MOST_LINES], max(0, len(swept) - MOST_LINES)
    panels = dict.fromkeys(
        (tuning.criterion, name) for _, tuning in kept for name in tuning.trials[0].settings
    )
    return tuple(
        _panel(name, criterion, [pair for pair in kept if pair[1].criterion == criterion], left_out)
        for criterion, name in panels
    )


def _panel(
    name: str, criterion: Criterion, swept: list[tuple[str, Tuning]], left_out: int
) -> Panel:
    lines = tuple(
        Line(label, style, _envelope(tuning, name))
        for style, (label, tuning) in enumerate(swept)
        if name in tuning.trials[0].settings
    )
    words, higher = one_line(name, 40).replace("_", " "), criterion.higher_is_better
    ys = [point.y for line in lines for point in line.points]
    several = any(len(tuning.trials[0].settings) > 1 for _, tuning in swept)
    notes = ["Each point is the best over the other settings."] * several
    notes += [f"{left_out:,} more rows were tuned."] * bool(left_out)
    direction = "higher" if higher else "lower"
    return Panel(
        slug=f"tuning-{criterion.metric}-{name}".replace("_", "-"),
        kind="tuning",
        title=f"{criterion.label} by {words}",
        x_label=words,
        y_label=f"{criterion.label} on {_shared(swept)} ({direction} is better)",
        lines=lines,
        higher_is_better=higher,
        log_y=not higher and min(ys) > 0 and max(ys) / min(ys) >= _TUNING_LOG_FROM,
        note=" ".join(notes),
    )


def _envelope(tuning: Tuning, name: str) -> tuple[Point, ...]:
    """The best trial of each value of one setting; `on_front` is the one that was chosen."""
    tried: dict[float, list[float]] = {}
    for trial, score in zip(tuning.trials, tuning.values, strict=True):
        tried.setdefault(trial.settings[name], []).append(score)
    chosen = tuning.trials[tuning.chosen].settings[name]
    return tuple(
        Point(
            value,
            scores[tuning.criterion.best(scores)],
            note="chosen" * (value == chosen),
            on_front=value == chosen,
        )
        for value, scores in sorted(tried.items())
    )


def _shared(swept: Iterable[tuple[str, Tuning]]) -> str:
    seeds = {tuning.seed for _, tuning in swept}
    return f"seed {seeds.pop()}" if len(seeds) == 1 else "the selection seed"
