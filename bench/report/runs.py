"""Single records: listed, shown in full, compared, or checked against a reproduction.

Tables are Markdown that reads well in a terminal; a `..._summary` is the same for `--json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.records.record import ResultRecord, differences, flat
from bench.records.seeds import SINGLE_SEED, SOURCE, recipe_name
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
    """Value, interval, N and further numbers of every metric.

    `level` is that of the intervals, such as 0.95; None: not known.
    """
    body = []
    for name, metric in record.metrics.items():
        extra = ", ".join(f"{key} {number(value)}" for key, value in metric.extra.items())
        interval = _interval(metric.low, metric.high)
        body.append([_heading(name), number(metric.value), interval, f"{metric.n:,}", extra])
    title = "Interval" if level is None else f"{level:.0%} interval"
    return _table(["Metric", "Value", title, "N", ""], body, left=[0, 4])


def difference_table(
    first: ResultRecord, second: ResultRecord, differences: "Sequence[Difference]", *, level: float
) -> str:
    """What `bench.records.compare.compare` found, and a line on the training seeds behind it."""
    of_recipe = any(it.retraining for it in differences)
    rows = [_row_name(record, of_recipe=of_recipe) for record in (first, second)]
    details = [text(it) for it in cells.distinguishing([first, second], {})]
    if rows[0] == rows[1] and all(details):
        is_set = cells.setting(first, "images") is not None
        rows = details if is_set else [f"{rows[0]} ({it})" for it in details]
    names = dict(zip(("first", "second", "neither"), [*rows, cells.MISSING], strict=True))
    body = [
        [
            _heading(it.metric),
            *map(number, (it.first, it.second, it.first - it.second)),
            _interval(it.low, it.high),
            names[it.better],
        ]
        for it in differences
    ]
    interval = f"{level:.0%} interval, paired"
    header = ["Metric", *rows, "Difference", interval, "Better"]
    return _table(header, body, left=[0, 5]) + _seeds_line(differences)


def _seeds_line(differences: "Sequence[Difference]") -> str:
    """What the rows rest on; empty where no network is a student's."""
    counts = [len(s) for it in differences[:1] for s in (it.first_seeds, it.second_seeds)]
    if not any(counts):
        return ""
    if not differences[0].retraining:
        return f"\n{SINGLE_SEED} ({SOURCE}).\n"
    of = " and ".join(f"{n} training seeds" if n else "one fixed network" for n in counts)
    return f"\nMeans of {of}; the interval covers resampling images and retraining.\n"


def _row_name(record: ResultRecord, *, of_recipe: bool) -> str:
    steps = record.method.num_steps
    name = recipe_name(record) if of_recipe else record.method.name
    return text(name + (f", {steps} steps" if steps and steps > 1 else ""))


def number(value: float) -> str:
    """Five significant digits, zero without a sign: `0.28571`, `6.7309`, `12,345`."""
    rounded = round(float(f"{value:.{_DIGITS}g}"), 7) + 0.0
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
        shown = [f"{_heading(name)} {number(m.value)}" for name, m in record.metrics.items()]
        commit = (record.revision.commit or cells.MISSING)[:8]
        body.append(
            [
                record.run_id[:8],
                record.created[:16].replace("T", " "),
                text(record.protocol.name),
                text(record.method.name),
                cells.integer(record.method.num_steps),
                shown[0] if shown else cells.MISSING,
                commit + " dirty" * bool(record.revision.commit and record.revision.dirty),
            ]
        )
    header = ["Run", "Made (UTC)", "Protocol", "Method", "Steps", "First metric", "Commit"]
    return _table(header, body, left=[0, 1, 2, 3, 6])


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
    """Everything in one record; `level` as in `metric_table`."""
    facts = {"run_id": record.run_id, "created": record.created, **flat(record)}
    facts |= {"seconds": record.seconds, "content_sha256": record.content_sha256}
    body = [
        [text(key), _shown(value)]
        for key, value in facts.items()
        if value is not None and not key.startswith("method.tuning.")
    ]
    tuning = record.method.tuning
    tables = [metric_table(record, level=level), *([_tuning_table(tuning)] if tuning else [])]
    return "\n".join([*tables, _table(["Key", "Value"], body)])


def difference_page(first: ResultRecord, second: ResultRecord) -> str:
    """Metrics of two records side by side, then every other key that differs."""
    names = [record.run_id[:8] for record in (first, second)]
    metrics = []
    for name, (a, b) in difference_summary(first, second)["metrics"].items():
        shown = (a, b, None if a is None or b is None else a - b)
        texts = (cells.MISSING if value is None else number(value) for value in shown)
        metrics.append([_heading(name), *texts])
    table = _table(["Metric", *names, "Difference"], metrics, left=[0])
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


def verification_page(record: ResultRecord, verified: "Verification", *, level: float) -> str:
    """Recorded and reproduced value of each metric, and what else is different."""
    body = [
        [
            _heading(check.metric),
            number(check.recorded.value),
            _interval(check.recorded.low, check.recorded.high),
            number(check.found),
            "yes" if check.within else "**no**",
            "equal" if check.equal else f"{check.found - check.recorded.value:+.1e}",
        ]
        for check in verified.checks
    ]
    header = ["Metric", "Recorded", f"{level:.0%} interval", "Now", "Within", "Bits"]
    lines = [_table(header, body, left=[0, 4, 5])]
    if verified.same_images is not None:
        same = "the same, to the bit" if verified.same_images else "not the same to the bit"
        lines.append(f"Images: {same}.\n")
    if verified.circumstances:
        lines.append(_differing(verified.circumstances, ["Recorded", "Now"]))
    else:
        lines.append("Device, packages and commit are those of the record.\n")
    lines.append(f"{_verdict(verified)}: {text(record.method.name)}, run {record.run_id[:8]}\n")
    return "\n".join(lines)


def verification_summary(record: ResultRecord, verified: "Verification") -> dict[str, Any]:
    """The content of `verification_page`."""
    return {
        "run_id": record.run_id,
        "within": verified.holds,
        "equal": verified.equal,
        "same_images": verified.same_images,
        "metrics": {check.metric: encode(check) for check in verified.checks},
        "different": encode(verified.circumstances),
    }


def _verdict(verified: "Verification") -> str:
    if verified.equal:
        return "Verified, every value equal to the bit"
    if verified.holds:
        return "Verified, every value within its interval"
    outside = ", ".join(check.metric for check in verified.checks if not check.within)
    return f"NOT verified, outside the interval: {outside}"


def _differing(pairs: Mapping[str, tuple[Any, Any]], names: list[str]) -> str:
    if not pairs:
        return "Nothing else is different.\n"
    body = [[text(key), *map(_shown, values)] for key, values in pairs.items()]
    return _table(["Different", *names], body)


def _table(header: list[str], body: list[list[str]], *, left: Sequence[int] | None = None) -> str:
    """A table; `left` as in `pipe_table`, None: every column."""
    return pipe_table(header, body, left=range(len(header)) if left is None else left) + "\n"


def _heading(metric: str) -> str:
    return text(cells.metric_heading(metric))


def _tuning_table(tuning: Tuning) -> str:
    names, others = list(tuning.trials[0].settings), list(tuning.trials[0].other_scores or ())
    body = [
        [
            *(f"{trial.settings[name]:g}" for name in names),
            f"**{number(value)}**" if position == tuning.chosen else number(value),
            *("" if name not in trial.metrics else number(trial.metrics[name]) for name in others),
        ]
        for position, (trial, value) in enumerate(zip(tuning.trials, tuning.values, strict=True))
    ]
    label = tuning.criterion.label
    header = [*names, f"{label} on seed {tuning.seed}, {tuning.num_images:,} images"]
    return _table([*header, *map(_heading, others)], body, left=())


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, (list, tuple)):
        return text(", ".join(map(str, value)), _LONGEST) or "(none)"
    return text(value, _LONGEST)
