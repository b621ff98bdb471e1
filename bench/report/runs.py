"""Records one by one: listed, shown whole, compared, or against a reproduction.

Tables read well in a terminal and are Markdown; a `..._summary` is the same for `--json`.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bench.records.record import ResultRecord, differences, flat
from bench.records.selection import Tuning
from bench.report import table as cells
from bench.report.markdown import pipe_table, text
from dimo.util.schema import encode

if TYPE_CHECKING:
    from bench.records.compare import Difference
    from bench.records.reproduce import Verification

_DIGITS = 5  # significant digits of a value alone; tables of many rows show fewer
_LONGEST = 200  # characters of a value; `--json` has it whole


def metric_table(record: ResultRecord, *, level: float | None) -> str:
    """Every metric of one record: value, interval, N and further numbers.

    Args:
        record: A record.
        level: Level of its intervals, for the heading; None: not known.
    """
    body = []
    for name, metric in record.metrics.items():
        extra = ", ".join(f"{key} {number(value)}" for key, value in metric.extra.items())
        body.append(
            [
                text(cells.metric_heading(name)),
                number(metric.value),
                _interval(metric.low, metric.high),
                f"{metric.n:,}",
                extra,
            ]
        )
    interval = "Interval" if level is None else f"{level:.0%} interval"
    header = ["Metric", "Value", interval, "N", ""]
    return pipe_table(header, body, left=[0, 4]) + "\n"


def difference_table(
    first: ResultRecord,
    second: ResultRecord,
    differences: "Iterable[Difference]",
    *,
    level: float,
) -> str:
    """Paired differences, `first` minus `second`, of `bench.records.compare.compare`.

    Args:
        first: A record.
        second: Another one of the same protocol.
        differences: One per metric.
        level: Level of the intervals.
    """
    names = {"first": _row_name(first), "second": _row_name(second), "neither": cells.MISSING}
    body = [
        [
            cells.metric_heading(found.metric),
            number(found.first),
            number(found.second),
            number(found.first - found.second),
            _interval(found.low, found.high),
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


def number(value: float) -> str:
    """`0.28571`, `6.7309`, `12,345`: five significant digits, zero without a sign."""
    rounded = float(f"{value:.{_DIGITS}g}") + 0.0
    exponent = int(f"{rounded:e}".partition("e")[2])
    return f"{rounded:,.{min(max(0, _DIGITS - 1 - exponent), 7)}f}"


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return cells.MISSING
    return f"{number(low)} to {number(high)}"


def records_table(records: Iterable[ResultRecord]) -> str:
    """A line per record, in the order given, with its first metric."""
    body = []
    for record in records:
        shown = cells.MISSING
        for name, metric in [*record.metrics.items()][:1]:
            shown = f"{text(cells.metric_heading(name))} {number(metric.value)}"
        commit = (record.revision.commit or cells.MISSING)[:8]
        body.append(
            [
                record.run_id[:8],
                record.created[:16].replace("T", " "),
                text(record.protocol.name),
                text(record.method.name),
                cells.integer(record.method.num_steps),
                shown,
                commit + " dirty" * bool(record.revision.commit and record.revision.dirty),
            ]
        )
    header = ["Run", "Made (UTC)", "Protocol", "Method", "Steps", "First metric", "Commit"]
    return pipe_table(header, body, left=[0, 1, 2, 3, 6]) + "\n"


def record_summary(record: ResultRecord) -> dict[str, Any]:
    """What `records_table` shows of a record, with its interval and revision."""
    name, metric = next(iter(record.metrics.items()), (None, None))
    return {
        "run_id": record.run_id,
        "created": record.created,
        "protocol": encode(record.protocol),
        "method": record.method.name,
        "section": record.method.section,
        "num_steps": record.method.num_steps,
        "metric": name,
        "value": metric.value if metric else None,
        "low": metric.low if metric else None,
        "high": metric.high if metric else None,
        "revision": encode(record.revision),
    }


def record_page(record: ResultRecord, *, level: float | None) -> str:
    """Everything in one record.

    Args:
        record: A record.
        level: Level of its intervals; None: its protocol is not known.
    """
    rows = {"run_id": record.run_id, "created": record.created, **flat(record)}
    rows |= {"seconds": record.seconds, "content_sha256": record.content_sha256}
    tuning = record.method.tuning
    rows = {key: value for key, value in rows.items() if not key.startswith("method.tuning.")}
    parts = [metric_table(record, level=level), _tuning_table(tuning) if tuning else ""]
    body = [[text(key), _shown(value)] for key, value in rows.items() if value is not None]
    return "\n".join(part for part in [*parts, _table(["Key", "Value"], body)] if part)


def difference_page(first: ResultRecord, second: ResultRecord) -> str:
    """Metrics of two records side by side, then every other key that differs."""
    names = [record.run_id[:8] for record in (first, second)]
    metrics = []
    for name in {**first.metrics, **second.metrics}:
        a, b = first.metrics.get(name), second.metrics.get(name)
        shown = [number(value.value) if value else cells.MISSING for value in (a, b)]
        difference = number(a.value - b.value) if a and b else cells.MISSING
        metrics.append([text(cells.metric_heading(name)), *shown, difference])
    table = pipe_table(["Metric", *names, "Difference"], metrics) + "\n"
    return table + "\n" + _differing(differences(first, second), names)


def difference_summary(first: ResultRecord, second: ResultRecord) -> dict[str, Any]:
    """The content of `difference_page`; the value of a metric is null where it is missing."""
    pair = (first, second)
    return {
        "records": [record.run_id for record in pair],
        "metrics": {
            name: [r.metrics[name].value if name in r.metrics else None for r in pair]
            for name in {**first.metrics, **second.metrics}
        },
        "different": differences(first, second),
    }


def verification_page(record: ResultRecord, found: "Verification", *, level: float) -> str:
    """Recorded and reproduced value of each metric, and what else is different."""
    body = []
    for check in found.checks:
        body.append(
            [
                text(cells.metric_heading(check.metric)),
                number(check.recorded.value),
                _interval(check.recorded.low, check.recorded.high),
                number(check.found),
                "yes" if check.within else "**no**",
                "equal" if check.equal else f"{check.found - check.recorded.value:+.1e}",
            ]
        )
    header = ["Metric", "Recorded", f"{level:.0%} interval", "Now", "Within", "Bits"]
    lines = [pipe_table(header, body, left=[0, 4, 5]) + "\n"]
    if found.same_images is not None:
        same = "the same, to the bit" if found.same_images else "not the same to the bit"
        lines.append(f"Images: {same}.\n")
    if found.circumstances:
        lines.append(_differing(found.circumstances, ["Recorded", "Now"]))
    else:
        lines.append("Device, packages and commit are those of the record.\n")
    lines.append(f"{_verdict(found)}: {text(record.method.name)}, run {record.run_id[:8]}\n")
    return "\n".join(lines)


def verification_summary(record: ResultRecord, found: "Verification") -> dict[str, Any]:
    """The content of `verification_page`."""
    return {
        "run_id": record.run_id,
        "within": found.holds,
        "equal": found.equal,
        "same_images": found.same_images,
        "metrics": {check.metric: encode(check) for check in found.checks},
        "different": encode(found.circumstances),
    }


def _verdict(found: "Verification") -> str:
    if found.equal:
        return "Verified, every value equal to the bit"
    if found.holds:
        return "Verified, every value within its interval"
    outside = ", ".join(check.metric for check in found.checks if not check.within)
    return f"NOT verified, outside the interval: {outside}"


def _differing(found: Mapping[str, tuple[Any, Any]], names: list[str]) -> str:
    if not found:
        return "Nothing else is different.\n"
    body = [[text(key), *(_shown(value) for value in values)] for key, values in found.items()]
    return _table(["Different", *names], body)


def _table(header: list[str], body: list[list[str]]) -> str:
    return pipe_table(header, body, left=range(len(header))) + "\n"


def _tuning_table(tuning: Tuning) -> str:
    names = list(tuning.trials[0].settings)
    body = [
        [
            *(f"{trial.settings[name]:g}" for name in names),
            f"**{number(value)}**" if position == tuning.chosen else number(value),
        ]
        for position, (trial, value) in enumerate(zip(tuning.trials, tuning.values, strict=True))
    ]
    label = tuning.criterion.label
    header = [*names, f"{label} on seed {tuning.seed}, {tuning.num_images:,} images"]
    return pipe_table(header, body, left=()) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, (list, tuple)):
        return text(", ".join(map(str, value)), _LONGEST) or "(none)"
    return text(value, _LONGEST)
