"""What plots show, as numbers: panels of lines from a report."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.records.record import MethodInfo
from bench.records.seeds import grouped
from bench.records.selection import Criterion, Trial, Tuning
from bench.report import table as cells
from bench.report.collect import ProtocolReport
from bench.report.table import higher_is_better, is_missing, metric_label
from bench.report.text import LONGEST_NOTE, one_line

MOST_LINES = 12  # more methods cannot be distinguished in one plot
_LOG_FROM = 4.0  # ratio of the largest to the smallest value from which a distance has a log scale
LONGEST_LABEL = 48
_Row = dict[str, Any]

# metrics that a setting trades for one another, each pair as x and y
_TRADE_OFFS = (("inception_score", "fid"), ("clip_score", "fid"), ("recall", "precision"))
_FEWEST_POINTS = 3  # of a trade-off

Kind = Literal["cost", "steps", "trade-off", "tuning", "sweep", "training"]


@dataclass(frozen=True)
class Point:
    """One value of a line, with the intervals of y, and of x in a trade-off, if there are any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    note: str = ""  # what a reader of the numbers needs to know, such as the number of steps
    on_front: bool = False  # on the Pareto front, or chosen by a sweep


@dataclass(frozen=True)
class Line:
    """Points of one method; `style` selects its colour, marker and dashes, equal in all panels."""

    label: str
    style: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One plot."""

    slug: str  # part of file names
    kind: Kind
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    higher_is_better: bool | None  # direction of y; None: neither
    higher_x: bool = False  # direction of x, where there is a Pareto front
    log_x: bool = False
    log_y: bool = False
    levels: tuple[tuple[str, float], ...] = ()  # horizontal lines, (name, y), of reference rows
    note: str = ""  # what is left out and why
    markers: bool = True

    @property
    def has_front(self) -> bool:
        """Whether points on the Pareto front are marked."""
        return self.kind in ("cost", "trade-off", "sweep")

    @property
    def alt(self) -> str:
        """The plot in words."""
        count = f"{len(self.lines)} line{'' if len(self.lines) == 1 else 's'}"
        shown = f"{self.title}: {self.y_label} against {self.x_label}, {count}."
        points = [(line, point) for line in self.lines for point in line.points]
        if points and self.higher_is_better is not None:
            choose = max if self.higher_is_better else min
            line, best = choose(points, key=lambda pair: pair[1].y)
            word = "Highest" if self.higher_is_better else "Lowest"
            shown += f" {word}: {best.y:.4g}, {line.label}{_in_brackets(best.note)}."
        marked = [f"{ln.label}{_in_brackets(p.note)}" for ln, p in points if p.on_front]
        if self.has_front and marked:
            shown += f" Pareto front: {', '.join(marked)}."
        return shown


def protocol_panels(part: ProtocolReport) -> tuple[Panel, ...]:
    """The plots of one table: its first metric and FID against cost, each metric against steps, and
    metrics against one another.
    """
    table = cells.rows(part.table)
    rows = [row for row in table if row["section"] != "Reference"]
    reference = [row for row in table if row["section"] == "Reference"]
    main = part.metrics[0]
    shown, left_out = _chosen_methods(rows, main)
    kept = [row for row in rows if row["method"] in shown]
    note = (
        f"The {MOST_LINES} methods of best {metric_label(main)}; the table has {left_out:,} more."
    )
    note = note * bool(left_out)
    priced = dict.fromkeys((main, *(name for name in part.metrics if name == "fid")))
    panels = [_panel(kept, reference, name, "nfe", shown, note) for name in priced]
    timed = [row for row in kept if not is_missing(row["images_per_second"])]
    machines = [_machine(row) for row in timed]
    if machines:
        machine = max(dict.fromkeys(machines), key=machines.count)
        same = [row for row in timed if _machine(row) == machine]
        speeds = f"On {one_line(machine, LONGEST_NOTE)}."
        others = dict.fromkeys(one_line(row["method"], 40) for row in timed if row not in same)
        if others:
            speeds += f" Speeds of other machines are left out: {', '.join(others)}."
        speeds = f"{speeds} {note}".strip()
        panels += [
            _panel(same, reference, name, "images_per_second", shown, speeds) for name in priced
        ]
    panels += [_panel(kept, reference, name, "num_steps", shown, note) for name in part.metrics]
    known = [pair for pair in _TRADE_OFFS if set(pair) <= set(part.metrics)]
    pairs = [_panel(kept, (), y, x, shown, note) for x, y in known]
    return tuple(panel for panel in (*panels, *filter(_is_trade_off, pairs)) if panel.lines)


def _is_trade_off(panel: Panel) -> bool:
    return sum(len(line.points) for line in panel.lines) >= _FEWEST_POINTS


def axis_label(label: str, *, higher_is_better: bool) -> str:
    """A quantity with the direction that is better."""
    return f"{label} ({'higher' if higher_is_better else 'lower'} is better)"


def thinned(points: Sequence[Point], most: int) -> tuple[Point, ...]:
    """At most `most` evenly spaced points, the last one among them."""
    every = -(-len(points) // most) or 1
    return tuple(points[::-1][::every][::-1])


def pareto_front(
    points: Iterable[tuple[float, float]], *, higher_x: bool, higher_y: bool
) -> set[tuple[float, float]]:
    """The points that no other beats: better in x or in y, and no worse in the other."""
    signed = {((-x if higher_x else x), (-y if higher_y else y)): (x, y) for x, y in points}
    front, best = set(), math.inf
    for cost, loss in sorted(signed):
        if loss < best:
            front.add(signed[cost, loss])
            best = loss
    return front


def _chosen_methods(rows: Sequence[_Row], metric: str) -> tuple[dict[str, int], int]:
    """The methods of best values with their styles, and the number of the others."""
    sign = -1.0 if higher_is_better(metric) else 1.0
    best: dict[str, float] = {}
    for row in rows:
        loss = math.inf if is_missing(row[metric]) else sign * row[metric]
        best[row["method"]] = min(loss, best.get(row["method"], math.inf))
    kept = sorted(best, key=best.__getitem__)[:MOST_LINES]
    names = (name for name in best if name in kept)
    return {name: style for style, name in enumerate(names)}, len(best) - len(kept)


_COSTS: dict[str, tuple[Kind, str, str, str]] = {  # column -> kind, slug, title, label of x
    "nfe": ("cost", "against-nfe", "against network forwards", "NFE (lower is better)"),
    "images_per_second": ("cost", "against-speed", "against speed", "images/s (higher is better)"),
    "num_steps": ("steps", "against-steps", "by step count", "sampling steps"),
}


def _panel(
    rows: Sequence[_Row],
    reference: Sequence[_Row],
    metric: str,
    cost: str,
    shown: dict[str, int],
    note: str,
) -> Panel:
    """One metric against a column of `_COSTS`, or against another metric."""
    kind, slug, title, x_label = _COSTS.get(cost) or _other_metric(cost)
    higher = higher_is_better(metric)
    higher_x = cost == "images_per_second" if cost in _COSTS else higher_is_better(cost)
    known = [row for row in rows if not is_missing(row[metric]) and not is_missing(row[cost])]
    pairs = [(float(row[cost]), float(row[metric])) for row in known]
    front = set() if kind == "steps" else pareto_front(pairs, higher_x=higher_x, higher_y=higher)
    values = [y for _, y in pairs]
    label = metric_name(metric)
    return Panel(
        slug=f"{slug_of(metric)}-{slug}",
        kind=kind,
        title=f"{label} {title}",
        x_label=x_label,
        y_label=axis_label(label, higher_is_better=higher),
        lines=_lines(known, metric, cost, shown, front),
        higher_is_better=higher,
        higher_x=higher_x,
        log_x=cost in _COSTS,
        log_y=is_log(values, higher=higher),
        levels=_levels(reference, metric, values),
        note=note,
    )


def metric_name(metric: str) -> str:
    """A metric's name where there is room: `Precision` instead of `Prec.`."""
    label = metric_label(metric)
    return metric.replace("_", " ").capitalize() if label.endswith(".") else label


def _other_metric(name: str) -> tuple[Kind, str, str, str]:
    """As a row of `_COSTS`, of a metric."""
    label = metric_name(name)
    x_label = axis_label(label, higher_is_better=higher_is_better(name))
    within = label if label == metric_label(name) else label.lower()
    return "trade-off", f"against-{slug_of(name)}", f"against {within}", x_label


def _lines(
    rows: Sequence[_Row],
    metric: str,
    cost: str,
    shown: dict[str, int],
    front: set[tuple[float, float]],
) -> tuple[Line, ...]:
    def point(row: _Row) -> Point:
        x, y = float(row[cost]), float(row[metric])
        names = (f"{name}{end}" for name in (metric, cost) for end in ("_low", "_high"))
        ends: Iterator[Any] = map(row.get, names)
        low, high, x_low, x_high = (None if is_missing(end) else float(end) for end in ends)
        note, on_front = cells.step_count(row["num_steps"]), (x, y) in front
        return Point(x, y, low, high, x_low, x_high, note, on_front)

    def place(row: _Row) -> float:
        column = cost if cost in _COSTS else "num_steps"  # a curve of steps may turn back
        return 0.0 if is_missing(row[column]) else float(row[column])

    methods = grouped(rows, lambda row: row["method"])
    return tuple(
        Line(
            one_line(name, LONGEST_LABEL),
            shown[name],
            tuple(point(row) for row in sorted(methods[name], key=place)),
        )
        for name in sorted(methods, key=shown.__getitem__)
    )


def _levels(
    reference: Sequence[_Row], metric: str, values: Sequence[float]
) -> tuple[tuple[str, float], ...]:
    """Values of the reference rows, unless their line would squeeze everything else."""
    if not values:
        return ()
    low, high = min(values), max(values)
    margin = 0.5 * (high - low) or abs(high)
    if is_log(values, higher=higher_is_better(metric)):
        low, high, margin = low / 3, high * 3, 0.0
    levels: dict[float, list[str]] = {}
    for row in reference:
        if not is_missing(row[metric]) and low - margin <= row[metric] <= high + margin:
            value = float(row[metric])
            near = (level for level in levels if abs(level - value) < 0.04 * (high - low))
            levels.setdefault(next(near, value), []).append(one_line(row["method"], 32))
    return tuple((", ".join(names), value) for value, names in levels.items())


def is_log(values: Sequence[float], *, higher: bool) -> bool:
    """Whether a metric has a logarithmic scale: one that falls over several octaves."""
    if higher or not values or min(values) <= 0:
        return False
    return max(values) / min(values) >= _LOG_FROM


def _machine(row: _Row) -> str:
    batch = row["batch_size"]
    return str(row["device"]) + ("" if is_missing(batch) else f", batch {int(batch)}")


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def slug_of(name: str) -> str:
    """A name as part of a file name."""
    return name.replace("_", "-")


def tuning_panels(part: ProtocolReport) -> tuple[Panel, ...]:
    """The sweeps that chose settings: a panel per setting, scored on the selection seed, and panels
    of metrics against one another.

    Where a sweep varied several settings, a line has the best score of each value. The chosen value
    is marked.
    """
    swept = [
        (cells.row_label(row, LONGEST_LABEL), record.method.tuning)
        for row, record in zip(cells.rows(part.frame), part.records, strict=True)
        if record.method.tuning is not None
    ]
    kept, left_out = swept[:MOST_LINES], len(swept[MOST_LINES:])
    panels = dict.fromkeys(
        (tuning.criterion, name) for _, tuning in kept for name in tuning.trials[0].settings
    )
    by_setting = [
        _tuning_panel(name, criterion, [p for p in kept if p[1].criterion == criterion], left_out)
        for criterion, name in panels
    ]
    curves = [curve for record in part.records for curve in _sweep_curves(record.method)]
    pairs = [_sweep_panel(x, y, curves, part.protocol.seeds.select) for x, y in _TRADE_OFFS]
    return (*by_setting, *filter(_is_trade_off, pairs))


def _sweep_curves(method: MethodInfo) -> Iterator[tuple[str, list[tuple[str, Trial]]]]:
    """Name and trials of each line, along which one setting changes: guidance, if it was tried."""
    if method.tuning is None:
        return
    trials, chosen = method.tuning.trials, method.tuning.trials[method.tuning.chosen]
    settings = list(chosen.settings)
    along = "guidance_scale" if "guidance_scale" in settings else settings[0]
    fixed = [name for name in settings if name != along]
    for values, group in grouped(trials, lambda t: tuple(t.settings[n] for n in fixed)).items():
        words = map(_set_to, fixed, values)
        name = ", ".join(filter(None, (method.name, cells.step_count(method.num_steps), *words)))
        group = sorted(group, key=lambda trial: trial.settings[along])
        yield (
            name,
            [(_set_to(along, t.settings[along]) + ", chosen" * (t is chosen), t) for t in group],
        )


def _set_to(setting: str, value: float) -> str:
    name = cells.SYMBOLS.get(setting) or one_line(setting, 40).replace("_", " ")
    return f"{name}={value:g}"


def _sweep_panel(
    x: str, y: str, curves: Sequence[tuple[str, list[tuple[str, Trial]]]], seed: int
) -> Panel:
    """One metric against another, of what sweeps tried."""
    directions = {"higher_x": higher_is_better(x), "higher_y": higher_is_better(y)}
    drawn = [
        [(t.metrics[x], t.metrics[y], words) for words, t in trials if {x, y} <= t.metrics.keys()]
        for _, trials in curves[:MOST_LINES]
    ]
    front = pareto_front(((a, b) for points in drawn for a, b, _ in points), **directions)
    lines = tuple(
        Line(
            one_line(name, LONGEST_LABEL),
            style,
            tuple(Point(a, b, note=words, on_front=(a, b) in front) for a, b, words in points),
        )
        for style, ((name, _), points) in enumerate(zip(curves, drawn, strict=False))
        if points
    )
    left_out = len(curves[MOST_LINES:])
    _, slug, title, x_label = _other_metric(x)
    return Panel(
        slug=f"tuning-{slug_of(y)}-{slug}",
        kind="sweep",
        title=f"{metric_name(y)} {title} on seed {seed}",
        x_label=x_label,
        y_label=axis_label(metric_name(y), higher_is_better=directions["higher_y"]),
        lines=lines,
        higher_is_better=directions["higher_y"],
        higher_x=directions["higher_x"],
        log_y=is_log([p.y for ln in lines for p in ln.points], higher=directions["higher_y"]),
        note=f"{left_out:,} more lines were swept." * bool(left_out),
    )


def _tuning_panel(
    name: str, criterion: Criterion, swept: list[tuple[str, Tuning]], left_out: int
) -> Panel:
    lines = tuple(
        Line(label, style, _envelope(tuning, name))
        for style, (label, tuning) in enumerate(swept)
        if name in tuning.trials[0].settings
    )
    words, higher = one_line(name, 40).replace("_", " "), criterion.higher_is_better
    several = any(len(tuning.trials[0].settings) > 1 for _, tuning in swept)
    notes = ["Each point is the best over the other settings."] * several
    notes += [f"{left_out:,} more rows were tuned."] * bool(left_out)
    seeds = {tuning.seed for _, tuning in swept}
    seed = f"seed {seeds.pop()}" if len(seeds) == 1 else "the selection seed"
    return Panel(
        slug=slug_of(f"tuning-{criterion.metric}-{name}"),
        kind="tuning",
        title=f"{criterion.label} by {words}",
        x_label=words,
        y_label=axis_label(f"{criterion.label} on {seed}", higher_is_better=higher),
        lines=lines,
        higher_is_better=higher,
        log_y=is_log([point.y for line in lines for point in line.points], higher=higher),
        note=" ".join(notes),
    )


def _envelope(tuning: Tuning, name: str) -> tuple[Point, ...]:
    """The best trial of each value of one setting; the chosen one is marked."""
    tried: dict[float, list[float]] = {}
    for trial, score in zip(tuning.trials, tuning.values, strict=True):
        tried.setdefault(trial.settings[name], []).append(score)
    chosen = tuning.trials[tuning.chosen].settings[name]
    points = []
    for value, scores in sorted(tried.items()):
        best, is_chosen = scores[tuning.criterion.best(scores)], value == chosen
        points.append(Point(value, best, note="chosen" * is_chosen, on_front=is_chosen))
    return tuple(points)
