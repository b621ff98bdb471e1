"""Training curves of run folders as panels."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.protocol.catalog import METRICS
from bench.report.panels import (
    LONGEST_LABEL,
    MOST_LINES,
    Line,
    Panel,
    Point,
    axis_label,
    is_log,
    slug_of,
    thinned,
)
from bench.report.table import is_number
from bench.report.text import one_line
from dimo.errors import DimoError

_MOST_POINTS = 400  # of one curve; a plot has no room for more
_NOT_CURVES = ("step", "images", "seed", "seconds")


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
            line = Line(one_line(run.name, LONGEST_LABEL), style, points)
            curves.setdefault((kind, name), []).append(line)
    note = f"The {MOST_LINES} newest runs; {left_out:,} older ones are not shown." * bool(left_out)
    return tuple(_run_panel(kind, name, curves[kind, name], note) for kind, name in sorted(curves))


def _run_panel(kind: str, name: str, lines: Sequence[Line], note: str) -> Panel:
    metric = METRICS.get(name) if kind == "curve" else None
    label = metric.label if metric else one_line(name, 40).replace("_", " ")
    higher = metric.higher_is_better if metric else None
    values = [point.y for line in lines for point in line.points]
    return Panel(
        slug=f"training-{kind}-{slug_of(one_line(name, 40))}",
        kind="training",
        title=f"{label} on the selection seed" if metric else label[:1].upper() + label[1:],
        x_label="training step",
        y_label=label if higher is None else axis_label(label, higher_is_better=higher),
        lines=tuple(lines),
        higher_is_better=higher,
        log_y=higher is not None and is_log(values, higher=higher),
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
