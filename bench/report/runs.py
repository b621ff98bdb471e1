"""Records one by one: a list of them, all of one, what two differ in, and one run again."""

__all__ = ["difference_page", "record_page", "records_table", "verification_page"]

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bench.differences import differences, flat
from bench.record import ResultRecord, Revision, Tuning
from bench.report import cells
from bench.report.markdown import pipe_table, text
from bench.report.single import metric_table, number

if TYPE_CHECKING:
    from bench.verify import Verification

_LONGEST = 200  # characters of a value; `--json` has them whole
_ABSENT = "(none)"


def records_table(records: Iterable[ResultRecord]) -> str:
    """A line for each record, in the order given: what it is, and its first metric."""
    body = []
    for record in records:
        name, metric = next(iter(record.metrics.items()), ("", None))
        body.append(
            [
                record.run_id[:8],
                record.created[:16].replace("T", " "),
                text(record.protocol.name),
                text(record.method.name),
                cells.integer(record.method.num_steps),
                f"{text(cells.metric_heading(name))} {number(metric.value)}"
                if metric
                else cells.MISSING,
                _commit(record.revision),
            ]
        )
    header = ["Run", "Made (UTC)", "Protocol", "Method", "Steps", "First metric", "Commit"]
    return pipe_table(header, body, left=[0, 1, 2, 3, 6]) + "\n"


def record_page(record: ResultRecord, *, level: float | None) -> str:
    """Everything that one record says.

    Args:
        record: A record.
        level: Level of its intervals; None: its protocol is not known here.
    """
    rows = {"run_id": record.run_id, "created": record.created, **flat(record)}
    rows |= {"seconds": record.seconds, "content_sha256": record.content_sha256}
    tuning = record.method.tuning
    rows = {key: value for key, value in rows.items() if not key.startswith("method.tuning.")}
    parts = [metric_table(record, level=level), _tuning_table(tuning) if tuning else ""]
    body = [[text(key), _shown(value)] for key, value in rows.items() if value is not None]
    return "\n".join(part for part in [*parts, _table(["Key", "Value"], body)] if part)


def difference_page(first: ResultRecord, second: ResultRecord) -> str:
    """Metrics of two records side by side, then every other key in which they differ."""
    names = [record.run_id[:8] for record in (first, second)]
    metrics = []
    for name in {**first.metrics, **second.metrics}:
        a, b = first.metrics.get(name), second.metrics.get(name)
        shown = [number(value.value) if value else cells.MISSING for value in (a, b)]
        difference = number(a.value - b.value) if a and b else cells.MISSING
        metrics.append([text(cells.metric_heading(name)), *shown, difference])
    table = pipe_table(["Metric", *names, "Difference"], metrics) + "\n"
    return table + "\n" + _differing(differences(first, second), names)


def verification_page(record: ResultRecord, found: "Verification", *, level: float) -> str:
    """Metric by metric what was recorded and what is found, and what else is different."""
    body = []
    for check in found.checks:
        low, high = check.recorded.low, check.recorded.high
        interval = cells.MISSING
        if low is not None and high is not None:
            interval = f"{number(low)} to {number(high)}"
        body.append(
            [
                text(cells.metric_heading(check.metric)),
                number(check.recorded.value),
                interval,
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
        return _ABSENT
    if isinstance(value, (list, tuple)):
        return text(", ".join(map(str, value)), _LONGEST) or _ABSENT
    return text(value, _LONGEST)


def _commit(revision: Revision) -> str:
    if revision.commit is None:
        return cells.MISSING
    return revision.commit[:8] + (" dirty" if revision.dirty else "")
