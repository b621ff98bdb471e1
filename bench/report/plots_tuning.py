"""The sweeps that chose settings, as panels: one for each setting that was varied."""

__all__ = ["tuning_panels"]

from collections.abc import Iterable

from bench.report import cells
from bench.report.document import ProtocolReport
from bench.report.plain import one_line
from bench.report.plots_data import MOST_LINES, Line, Panel, Point, row_label
from bench.selection import Criterion, Tuning

_LOG_FROM = 4.0


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
        log_y=not higher and min(ys) > 0 and max(ys) / min(ys) >= _LOG_FROM,
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
