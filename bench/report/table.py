"""Records -> the data frame behind every format, and how its cells are written.

A frame has one row per method, in the order in which tables show them, with the columns of
`ROW_COLUMNS`, then `<metric>`, `<metric>_low`, `<metric>_high` and `<metric>_n` for each metric.

The rest of the report asks this module for what the registries know of metrics and settings.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, get_args

import pandas as pd

from bench.protocol import Protocol
from bench.protocol.catalog import ANY, METRICS, NONE
from bench.records.record import MethodInfo, ResultRecord, Section
from dimo.samplers import all_knobs

SECTIONS: tuple[str, ...] = get_args(Section)
ROW_COLUMNS = (
    "section",
    "method",  # the name, with whatever tells it from another row of the same name and steps
    "teacher",
    "sampler",
    "num_steps",
    "nfe",
    "mask_schedule",
    "token_counts",
    "guidance_scale",
    "temperature",
    "choice_temperature",
    "final_temperature",
    "theta",
    "random_start",
    "top_k",
    "top_p",
    "network_precision",
    "selected_by",
    "weights_sha256",
    "training",
    "seed",
    "images_per_second",
    "batch_size",
    "device",
    "commit",
    "dirty",
    "run_id",
    "coverage_ceiling",
)

MISSING = "\u2013"


def metric_label(name: str) -> str:
    """Name of a metric in tables and plots; a metric that is not registered keeps its own."""
    return METRICS[name].label if name in METRICS else name


def metric_heading(name: str) -> str:
    """Column heading of a metric with the direction that is better, if it is registered."""
    if name not in METRICS:
        return name
    return f"{METRICS[name].label} ({'↑' if METRICS[name].higher_is_better else '↓'})"


def higher_is_better(name: str) -> bool:
    """Direction of a metric; of the published ones that are not registered, higher is better."""
    return name not in METRICS or METRICS[name].higher_is_better


def number(value: float, decimals: int) -> str:
    """A number with this many decimals, without a minus sign before zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def half_width(value: float, decimals: int) -> str:
    """Half of an interval without its leading zero, `.045`, which keeps columns narrow."""
    return number(value, decimals).removeprefix("0") or "0"


def integer(value: Any) -> str:
    """An integer, or the sign for a missing value."""
    return MISSING if is_missing(value) else f"{int(value)}"


def speed(value: Any) -> str:
    """Images per second with at least three digits."""
    if is_missing(value):
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def token_counts(counts: Sequence[int]) -> str:
    """Tokens revealed at each step, equal neighbours written once: `3 x 1, 2, 11`."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return ", ".join(str(n) if times == 1 else f"{times} x {n}" for n, times in runs)


def step_count(steps: Any) -> str:
    """`1 step`, `8 steps`; empty if the number is missing."""
    return "" if is_missing(steps) else f"{int(steps)} step{'' if int(steps) == 1 else 's'}"


def training_cost(training: Mapping[str, Any]) -> str:
    """What a training run took, `15.9 min, 768,000 images seen`; empty if unknown.

    Args:
        training: `training` of a record's method, with numbers under `seconds` and `images_seen`.
    """
    parts = []
    for key, factor, form in (
        ("seconds", 60, "{:,.1f} min"),
        ("images_seen", 1, "{:,.0f} images seen"),
    ):
        value = training.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(form.format(value / factor))
    return ", ".join(parts)


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame as dicts of plain Python values."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def is_missing(value: Any) -> bool:
    """Whether a cell of a data frame holds None, NaN or NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class Setting:
    """How a setting of a row is written.

    Attributes:
        label: In the name of a row.
        heading: Of its column; empty: it has none.
        show: Value -> text in that column.
    """

    label: str
    heading: str
    show: Callable[[Any], str] = str


def settings() -> dict[str, Setting]:
    """Every setting that distinguishes rows, in the order of columns.

    A newer record with equal settings replaces an older one.
    """
    return {
        "teacher": Setting("teacher", ""),
        "sampler": Setting("sampler", "Sampler"),
        **{name: Setting(k.label, k.heading, k.show) for name, k in all_knobs().items()},
        "network_precision": Setting("network in", "Network in"),
        "seed": Setting("seed", "Seed", integer),
        "weights_sha256": Setting("weights", "Weights", lambda sha256: str(sha256)[:12]),
    }


def _own_knobs() -> list[str]:
    """Knobs of samplers without a field in `MethodInfo`."""
    return [name for name in all_knobs() if name not in MethodInfo.__dataclass_fields__]


# What older records of a sampler used where they do not say: the only value there was at the time.
_IMPLIED = {("theta_trapezoidal", "theta"): 0.5}


def varied_keys(record: ResultRecord) -> dict[str, Any]:
    """The recipe keys that an ablation varied, with their values; empty: it is no ablation.

    `dimo distill --ablation KEY` notes them under `ablation` in the student's `training`.
    """
    varied = record.method.training.get("ablation")
    return {key: varied[key] for key in sorted(varied)} if isinstance(varied, dict) else {}


def is_ablation(record: ResultRecord) -> bool:
    """Whether a record belongs to an ablation."""
    return bool(varied_keys(record))


def comparable(
    records: Iterable[ResultRecord], protocol: Protocol
) -> tuple[dict[tuple[str, ...], list[ResultRecord]], list[ResultRecord]]:
    """Groups records of one protocol into those that may share a table.

    Where a protocol takes any reference or any weights of its networks, only rows with the same
    ones compare.

    Returns:
        Records by the hashes that the protocol leaves open (none: one group, key `()`), and those
        of image sets that do not conform to it, which no table shows.
    """
    groups: dict[tuple[str, ...], list[ResultRecord]] = {}
    nonconforming = []
    parts = (
        ("extractor", protocol.extractor),
        ("reference", protocol.reference),
        ("scorer", protocol.scorer),
        ("prompts", protocol.prompts),
        ("detector", protocol.detector),
    )
    open_parts = [
        name
        for name, part in parts
        if part is not None and part.sha256 == ANY and part.name != NONE
    ]
    for record in records:
        if record.evidence is not None and record.evidence.nonconforming:
            nonconforming.append(record)
            continue
        key = tuple(getattr(record.evidence, f"{name}_sha256", None) or "" for name in open_parts)
        groups.setdefault(key, []).append(record)
    return groups, nonconforming


def latest(records: Iterable[ResultRecord]) -> list[ResultRecord]:
    """The newest record of each method and settings, oldest first."""
    newest: dict[Any, ResultRecord] = {}
    for record in sorted(records, key=lambda record: (record.created, record.run_id)):
        newest[_identity(record)] = record
    return sorted(newest.values(), key=lambda record: (record.created, record.run_id))


def ordered(records: Iterable[ResultRecord]) -> list[ResultRecord]:
    """The records behind the rows of `results_frame`, in its order."""
    return sorted(latest(records), key=_table_order)


def results_frame(records: Iterable[ResultRecord], metrics: Sequence[str]) -> pd.DataFrame:
    """One row per method: its newest record, in the order of the paper's table.

    Sections are in the order of `SECTIONS`, rows of a section by teacher, name and decreasing
    number of steps, reference rows by time.

    Args:
        records: Records of one protocol.
        metrics: Names of the metrics to show.
    """
    chosen = ordered(records)
    columns = [*ROW_COLUMNS, *_own_knobs()]
    for name in metrics:
        columns += [name, f"{name}_low", f"{name}_high", f"{name}_n"]
    rows = [_row(record, metrics) for record in chosen]
    frame = pd.DataFrame(rows, columns=columns).astype(
        {"num_steps": "Int64", "nfe": "Int64", "seed": "Int64", "batch_size": "Int64"}
    )
    for column in (
        "images_per_second",
        "coverage_ceiling",
        *columns[len(ROW_COLUMNS) + len(_own_knobs()) :],
    ):
        frame[column] = frame[column].astype("Int64" if column.endswith("_n") else float)
    frame["method"] = _distinct_names(chosen)
    return frame


def best_and_second(
    values: "pd.Series[float]", *, higher_is_better: bool, decimals: int
) -> "pd.Series[int]":
    """Place of each value: 1 for the best, 2 for the second, 0 for the others and for NaN.

    Values are compared as they are shown, so equal numbers in a table get equal marks.
    """
    shown = values.round(decimals)
    ranks = shown.rank(method="dense", ascending=not higher_is_better)
    return ranks.where(ranks <= 2, 0).fillna(0).astype(int)


def decimals_of(name: str, values: "pd.Series[float]") -> int:
    """Digits after the point, as the metric's row says; 3 for metrics of other versions."""
    kind = METRICS.get(name)
    if kind is None:
        return 3
    return kind.decimals + int(kind.more_below_one and values.min() < 1)


def _row(record: ResultRecord, metrics: Sequence[str]) -> dict[str, Any]:
    method, speed, revision = record.method, record.speed, record.revision
    row: dict[str, Any] = {
        name: getattr(method, name) for name in MethodInfo.__dataclass_fields__ if name != "name"
    }
    row |= {
        **{name: method.setting(name) for name in _own_knobs()},
        "method": method.name,
        "seed": record.seed,
        "images_per_second": speed.images_per_second,
        "batch_size": speed.batch_size,
        "device": speed.device,
        "commit": revision.commit,
        "dirty": revision.dirty,
        "run_id": record.run_id,
    }
    if "coverage" in record.metrics:
        row["coverage_ceiling"] = record.metrics["coverage"].extra.get("ceiling")
    for name in metrics:
        metric = record.metrics.get(name)
        if metric is not None:
            row |= {name: metric.value, f"{name}_low": metric.low, f"{name}_high": metric.high}
            row[f"{name}_n"] = metric.n
    return row


def setting(record: ResultRecord, name: str) -> Any:
    """What a record was made with, for a name of `settings()` or a field of its method."""
    if name == "seed":
        return record.seed
    value = record.method.setting(name)
    return _IMPLIED.get((record.method.sampler or "", name)) if value is None else value


def _name_and_steps(record: ResultRecord) -> tuple[Any, ...]:
    return (record.method.section, record.method.name, record.method.num_steps)


def _identity(record: ResultRecord) -> tuple[Any, ...]:
    return (*_name_and_steps(record), *(setting(record, name) for name in settings()))


def _table_order(record: ResultRecord) -> tuple[Any, ...]:
    method, time = record.method, (record.created, record.run_id)
    section = SECTIONS.index(method.section)
    if method.section == "Reference":
        return (section, time)
    steps, guidance = method.num_steps or 0, method.guidance_scale or 0.0
    return (section, method.teacher or "", method.name, -steps, guidance, time)


def _distinct_names(records: Sequence[ResultRecord]) -> list[str]:
    """Names, with the settings that differ among rows of the same name and steps."""
    groups: dict[Any, list[ResultRecord]] = {}
    for record in records:
        groups.setdefault(_name_and_steps(record), []).append(record)
    varying = {
        key: [s for s in settings() if len({setting(record, s) for record in group}) > 1]
        for key, group in groups.items()
    }
    names = []
    for record in records:
        details = ", ".join(_detail(record, name) for name in varying[_name_and_steps(record)])
        names.append(f"{record.method.name} ({details})" if details else record.method.name)
    return names


def _detail(record: ResultRecord, name: str) -> str:
    """A setting in words; a schedule with the tokens of each step, of many steps the outer ones."""
    words = f"{settings()[name].label} {_short(setting(record, name))}"
    counts = [str(count) for count in record.method.token_counts or ()]
    if name != "mask_schedule" or not counts:
        return words
    shown = counts if len(counts) <= 4 else [*counts[:2], "…", counts[-1]]
    return f"{words}: {' + '.join(shown)} tokens"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if value is True:
        return "on"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text[:8] if len(text) == 64 else text  # a hash
