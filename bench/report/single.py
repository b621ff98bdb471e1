"""One record, or two side by side, as a table that reads well in a terminal and as Markdown."""

__all__ = ["difference_table", "metric_table"]

from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench.record import ResultRecord
from bench.report import cells
from bench.report.markdown import pipe_table, text

if TYPE_CHECKING:
    from bench.compare import Difference

_DIGITS = 5  # significant digits of a value alone; tables of many rows show fewer


def metric_table(record: ResultRecord, *, level: float) -> str:
    """Every metric of one record: value, interval, N, and what else is known of it.

    Args:
        record: A record.
        level: Level of its intervals, for the heading.
    """
    body = []
    for name, metric in record.metrics.items():
        interval = cells.MISSING
        if metric.low is not None and metric.high is not None:
            interval = f"{_number(metric.low)} to {_number(metric.high)}"
        extra = ", ".join(f"{key} {_number(value)}" for key, value in metric.extra.items())
        body.append(
            [cells.metric_heading(name), _number(metric.value), interval, f"{metric.n:,}", extra]
        )
    header = ["Metric", "Value", f"{level:.0%} interval", "N", ""]
    return pipe_table(header, body, left=[0, 4]) + "\n"


def difference_table(
    first: ResultRecord,
    second: ResultRecord,
    differences: "Iterable[Difference]",
    *,
    level: float,
) -> str:
    """Paired differences of two rows.

    Args:
        first: The row that is subtracted from.
        second: The row that is subtracted.
        differences: From `bench.compare.compare`.
        level: Level of the intervals.
    """
    names = {"first": _row_name(first), "second": _row_name(second), "neither": cells.MISSING}
    body = [
        [
            cells.metric_heading(found.metric),
            _number(found.first),
            _number(found.second),
            _number(found.first - found.second),
            f"{_number(found.low)} to {_number(found.high)}",
            names[found.better],
        ]
        for found in differences
    ]
    header = [
        "Metric",
        names["first"],
        names["second"],
        "Difference",
        f"{level:.0%} interval, paired",
        "Better",
    ]
    return pipe_table(header, body, left=[0, 5]) + "\n"


def _row_name(record: ResultRecord) -> str:
    steps = record.method.num_steps
    return text(record.method.name + (f", {steps} steps" if steps and steps > 1 else ""))


def _number(value: float) -> str:
    """`0.28571`, `6.7309`, `12,345`: so many significant digits, and zero without a sign."""
    rounded = float(f"{value:.{_DIGITS}g}") + 0.0
    decimals = max(0, _DIGITS - 1 - _exponent(rounded))
    return f"{rounded:,.{min(decimals, 7)}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2]) if value else 0
