"""What plots show, as numbers: panels of lines from a report and from run folders."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.protocol.catalog import METRICS
from bench.records.seeds import grouped
from bench.records.selection import Criterion, Tuning
from bench.report import table as cells
from bench.report.collect import ProtocolReport
from bench.report.table import higher_is_better, is_missing, is_number, metric_label
from bench.report.text import LONGEST_NOTE, one_line
from dimo.errors import DimoError

MOST_LINES = 12  # more methods cannot be distinguished in one plot
_LOG_FROM = 4.0  # ratio of the largest to the smallest value from which a distance has a log scale
_LONGEST_LABEL = 48
_MOST_POINTS = 400  # of one training curve; a plot has no room for more
_NOT_CURVES = ("step", "images", "seed", "seconds")
_Row = dict[str, Any]

Kind = Literal["cost", "steps", "tuning", "training"]


@dataclass(frozen=True)
class Point:
    """One value of a line, with the interval of y if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
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
    log_x: bool = False
    log_y: bool = False
    levels: tuple[tuple[str, float], ...] = ()  # horizontal lines, (name, y), of reference rows
    note: str = ""  # what is left out and why
    markers: bool = True

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
        if self.kind == "cost" and marked:
            shown += f" Pareto front: {', '.join(marked)}."
        return shown


def protocol_panels(part: ProtocolReport) -> tuple[Panel, ...]:
    """The plots of one table: its first metric against cost, and each metric against steps."""
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
    panels = [_panel(kept, reference, main, "nfe", shown, note)]
    timed = [row for row in kept if not is_missing(row["images_per_second"])]
    machines = [_machine(row) for row in timed]
    if machines:
        machine = max(dict.fromkeys(machines), key=machines.count)
        same = [row for row in timed if _machine(row) == machine]
        speeds = f"On {one_line(machine, LONGEST_NOTE)}."
        others = dict.fromkeys(one_line(row["method"], 40) for row in timed if row not in same)
        if others:
            speeds += f" Speeds of other machines are left out: {', '.join(others)}."
        panels.append(
            _panel(same, reference, main, "images_per_second", shown, f"{speeds} {note}".strip())
        )
    panels += [_panel(kept, reference, name, "num_steps", shown, note) for name in part.metrics]
    return tuple(panel for panel in panels if panel.lines)


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
    """One metric against a column of `_COSTS`."""
    kind, slug, title, x_label = _COSTS[cost]
    higher = higher_is_better(metric)
    known = [row for row in rows if not is_missing(row[metric]) and not is_missing(row[cost])]
    pairs = [(float(row[cost]), float(row[metric])) for row in known]
    front = set()
    if kind == "cost":
        front = pareto_front(pairs, higher_x=cost == "images_per_second", higher_y=higher)
    values = [y for _, y in pairs]
    label = metric_label(metric)
    if label.endswith("."):  # an abbreviation of tables
        label = metric.replace("_", " ").capitalize()
    return Panel(
        slug=f"{_slug(metric)}-{slug}",
        kind=kind,
        title=f"{label} {title}",
        x_label=x_label,
        y_label=axis_label(label, higher_is_better=higher),
        lines=_lines(known, metric, cost, shown, front),
        higher_is_better=higher,
        log_x=True,
        log_y=_is_log(values, higher=higher),
        levels=_levels(reference, metric, values),
        note=note,
    )


def _lines(
    rows: Sequence[_Row],
    metric: str,
    cost: str,
    shown: dict[str, int],
    front: set[tuple[float, float]],
) -> tuple[Line, ...]:
    def point(row: _Row) -> Point:
        x, y = float(row[cost]), float(row[metric])
        ends = (row[f"{metric}_low"], row[f"{metric}_high"])
        low, high = (None if is_missing(end) else float(end) for end in ends)
        return Point(x, y, low, high, cells.step_count(row["num_steps"]), (x, y) in front)

    methods = grouped(rows, lambda row: row["method"])
    return tuple(
        Line(
            one_line(name, _LONGEST_LABEL),
            shown[name],
            tuple(sorted(map(point, methods[name]), key=lambda p: p.x)),
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
    if _is_log(values, higher=higher_is_better(metric)):
        low, high, margin = low / 3, high * 3, 0.0
    levels: dict[float, list[str]] = {}
    for row in reference:
        if not is_missing(row[metric]) and low - margin <= row[metric] <= high + margin:
            value = float(row[metric])
            near = (level for level in levels if abs(level - value) < 0.04 * (high - low))
            levels.setdefault(next(near, value), []).append(one_line(row["method"], 32))
    return tuple((", ".join(names), value) for value, names in levels.items())


def _is_log(values: Sequence[float], *, higher: bool) -> bool:
    if higher or not values or min(values) <= 0:
        return False
    return max(values) / min(values) >= _LOG_FROM


def _machine(row: _Row) -> str:
    batch = row["batch_size"]
    return str(row["device"]) + ("" if is_missing(batch) else f", batch {int(batch)}")


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _slug(name: str) -> str:
    return name.replace("_", "-")


def tuning_panels(part: ProtocolReport) -> tuple[Panel, ...]:
    """The sweeps that chose settings: a panel per setting, scored on the selection seed.

    Where a sweep varied several settings, a line has the best score of each value. The chosen value
    is marked.
    """
    swept = [
        (cells.row_label(row, _LONGEST_LABEL), record.method.tuning)
        for row, record in zip(cells.rows(part.frame), part.records, strict=True)
        if record.method.tuning is not None
    ]
    kept, left_out = swept[:MOST_LINES], len(swept[MOST_LINES:])
    panels = dict.fromkeys(
        (tuning.criterion, name) for _, tuning in kept for name in tuning.trials[0].settings
    )
    return tuple(
        _tuning_panel(name, criterion, [p for p in kept if p[1].criterion == criterion], left_out)
        for criterion, name in panels
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
        slug=_slug(f"tuning-{criterion.metric}-{name}"),
        kind="tuning",
        title=f"{criterion.label} by {words}",
        x_label=words,
        y_label=axis_label(f"{criterion.label} on {seed}", higher_is_better=higher),
        lines=lines,
        higher_is_better=higher,
        log_y=_is_log([point.y for line in lines for point in line.points], higher=higher),
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


def run_panels(folder: Path | None) -> tuple[Panel, ...]:
    """Training curves of a run folder or a folder of them: one panel per logged scalar.

    They show the losses of `metrics.jsonl` and the scores of `curve.jsonl`; None: no panels.

    Raises:
        DimoError: There is no run, or a file of a run is damaged.
    """
    if folder is None:
        return ()
    runs = [path for path in (folder, *sorted(folder.glob("*"))) if _logs(path)]
    if not runs:
        raise DimoError(
            f"{folder} contains no run: no metrics.jsonl or curve.jsonl in it or its subfolders; "
            "give a folder that dimo distill wrote, or the folder above several of them"
        )
    runs = sorted(runs, key=lambda path: max(f.stat().st_mtime for f in _logs(path)))
    kept, left_out = runs[-MOST_LINES:], len(runs[:-MOST_LINES])
    curves: dict[tuple[str, str], list[Line]] = {}
    for style, run in enumerate(sorted(kept)):
        for kind, name, points in _curves(run):
            line = Line(one_line(run.name, _LONGEST_LABEL), style, points)
            curves.setdefault((kind, name), []).append(line)
    note = f"The {MOST_LINES} newest runs; {left_out:,} older ones are not shown." * bool(left_out)
    return tuple(_run_panel(kind, name, curves[kind, name], note) for kind, name in sorted(curves))


def _run_panel(kind: str, name: str, lines: Sequence[Line], note: str) -> Panel:
    metric = METRICS.get(name) if kind == "curve" else None
    label = metric.label if metric else one_line(name, 40).replace("_", " ")
    higher = metric.higher_is_better if metric else None
    values = [point.y for line in lines for point in line.points]
    return Panel(
        slug=f"training-{kind}-{_slug(one_line(name, 40))}",
        kind="training",
        title=f"{label} on the selection seed" if metric else label[:1].upper() + label[1:],
        x_label="training step",
        y_label=label if higher is None else axis_label(label, higher_is_better=higher),
        lines=tuple(lines),
        higher_is_better=higher,
        log_y=higher is not None and _is_log(values, higher=higher),
        note=note,
        markers=kind == "curve",
    )


def _logs(run: Path) -> list[Path]:
    return [path for name in ("curve", "metrics") if (path := run / f"{name}.jsonl").is_file()]


def _curves(run: Path) -> Iterator[tuple[str, str, tuple[Point, ...]]]:
    for path in _logs(run):
        curves: dict[str, list[Point]] = {}
        for line in _read_log(path):
            for name, value in line.items():
                if name not in _NOT_CURVES and is_number(value) and math.isfinite(value):
                    curves.setdefault(name, []).append(Point(float(line["step"]), float(value)))
        for name, points in curves.items():
            # a scalar that stays at 0, such as `skipped`, is no curve; a score may stay at 0
            if path.stem == "curve" or any(point.y != 0 for point in points):
                yield path.stem, name, thinned(points, _MOST_POINTS)


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(line["step"], int) for line in lines):
            return lines
        raise ValueError("a step is not a whole number")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DimoError(
            f"{path} is damaged: {error}; continue the run to write it again, or move it away"
        ) from error
