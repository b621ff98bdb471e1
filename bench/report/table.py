"""Records -> the data frame behind every format, and how its cells are written.

A frame has one row per method, in table order, with the columns of `ROW_COLUMNS`, the knobs of
samplers, then `<metric>`, `<metric>_low`, `<metric>_high` and `<metric>_n` for each metric.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from bench.protocol.catalog import METRICS
from bench.records.record import MethodInfo, ResultRecord, Section
from bench.records.seeds import across_seeds, age, grouped, mean_of_seeds, training_seed
from bench.report.text import LONGEST_NAME, one_line
from dimo.samplers import all_knobs

SECTIONS: tuple[str, ...] = get_args(Section)
# `method` is the name, plus the settings that distinguish rows of the same name and steps.
ROW_COLUMNS = (
    *("section", "method", "teacher", "sampler", "num_steps", "nfe", "mask_schedule"),
    *("token_counts", "guidance_scale", "temperature", "choice_temperature", "final_temperature"),
    *("theta", "random_start", "top_k", "top_p", "network_precision", "selected_by"),
    *("weights_sha256", "training", "training_seed", "seed", "images_per_second", "batch_size"),
    *("device", "commit", "dirty", "run_id", "coverage_ceiling"),
)
MISSING = "\u2013"
SYMBOLS = {"guidance_scale": "s", "temperature": "T"}  # of settings, in narrow tables


def metric_label(name: str) -> str:
    """Name of a metric in tables and plots; an unregistered metric keeps its own."""
    return METRICS[name].label if name in METRICS else name


def metric_heading(name: str) -> str:
    """Column heading of a metric with the direction that is better, if it is registered."""
    if name not in METRICS:
        return name
    return f"{METRICS[name].label} ({'↑' if METRICS[name].higher_is_better else '↓'})"


def higher_is_better(name: str) -> bool:
    """Direction of a metric; true for published metrics that are not registered."""
    return name not in METRICS or METRICS[name].higher_is_better


def number(value: float, decimals: int) -> str:
    """Fixed-point text, without a minus sign before zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def uncertainty(half: float, decimals: int) -> str:
    """Half of an interval: `±.045`, or `±1.08` from 1 on."""
    shown = number(half, decimals)
    return f"±{shown.removeprefix('0') if decimals else shown}"


def integer(value: Any) -> str:
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


def row_label(row: Mapping[str, Any], longest: int = LONGEST_NAME) -> str:
    """Name and steps of a row: `MaskGIT, 8 steps`."""
    return ", ".join(filter(None, (one_line(row["method"], longest), step_count(row["num_steps"]))))


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame, with plain Python values."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def is_missing(value: Any) -> bool:
    """Whether a cell of a data frame holds None, NaN or NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Setting:
    """How a setting is written: label in a row's name, heading (empty: no column) and value."""

    label: str
    heading: str
    show: Callable[[Any], str] = str


def settings() -> dict[str, Setting]:
    """Every setting that distinguishes rows, in the order of columns."""
    return {
        "teacher": Setting("teacher", ""),
        "sampler": Setting("sampler", "Sampler"),
        **{name: Setting(k.label, k.heading, k.show) for name, k in all_knobs().items()},
        "network_precision": Setting("network in", "Network in"),
        "seed": Setting("seed", "Seed", integer),
        "weights_sha256": Setting("weights", "Weights", lambda sha256: str(sha256)[:12]),
        "images": Setting("images", ""),  # of sets in files, by hash
    }


def _other_knobs() -> list[str]:
    """Knobs of samplers without a field in `MethodInfo`."""
    return [name for name in all_knobs() if name not in MethodInfo.__dataclass_fields__]


# Settings that older records do not state, because a sampler had only this value at the time.
_IMPLIED = {("theta_trapezoidal", "theta"): 0.5}


def varied_keys(record: ResultRecord) -> dict[str, Any]:
    """Recipe keys varied by `dimo distill --ablation KEY`, with values; empty: no ablation."""
    varied = record.method.training.get("ablation")
    return {key: varied[key] for key in sorted(varied)} if isinstance(varied, dict) else {}


def latest(records: Iterable[ResultRecord]) -> list[ResultRecord]:
    """The newest record of each method and settings, oldest first."""
    by_time = sorted(records, key=age)
    newest = {(*_name_and_steps(r), *(setting(r, name) for name in settings())): r for r in by_time}
    return sorted(newest.values(), key=age)


def ordered(records: Iterable[ResultRecord]) -> list[ResultRecord]:
    """The records behind the rows of `results_frame`."""
    return sorted(latest(records), key=_table_order)


def seed_rows(records: Iterable[ResultRecord]) -> list[list[ResultRecord]]:
    """The records behind each row of a table that shows the mean of training seeds, in order."""
    rows = across_seeds(latest(records))
    return sorted(rows, key=lambda row: _table_order(mean_of_seeds(row)))


def results_frame(records: Iterable[ResultRecord], metrics: Sequence[str]) -> pd.DataFrame:
    """One row per method: the newest of its records under one protocol.

    Sections are in the order of `SECTIONS`, rows of a section by teacher, name and decreasing
    number of steps, reference rows by time.
    """
    chosen = ordered(records)
    integers = ["num_steps", "nfe", "training_seed", "seed", "batch_size"]
    integers += [f"{name}_n" for name in metrics]
    floats = ["images_per_second", "coverage_ceiling"]
    floats += [f"{name}{end}" for name in metrics for end in ("", "_low", "_high")]
    columns = [*ROW_COLUMNS, *_other_knobs()]
    columns += [f"{name}{end}" for name in metrics for end in ("", "_low", "_high", "_n")]
    frame = pd.DataFrame([_row(record, metrics) for record in chosen], columns=columns)
    frame = frame.astype(dict.fromkeys(integers, "Int64") | dict.fromkeys(floats, "float64"))
    frame["method"] = [
        f"{record.method.name} ({details})" if details else record.method.name
        for record, details in zip(chosen, distinguishing(chosen, {}), strict=True)
    ]
    return frame


def best_and_second(
    values: "pd.Series[float]", *, higher_is_better: bool, decimals: int
) -> "pd.Series[int]":
    """Place of each value as it is shown: 1 (best), 2 (second), or 0 for the others and NaN.

    A value without another to compare it with is no best: 0.
    """
    ranks = values.round(decimals).rank(method="dense", ascending=not higher_is_better)
    return ranks.where((ranks <= 2) & (values.count() > 1), 0).fillna(0).astype(int)


def decimals_of(name: str, values: "pd.Series[float]") -> int:
    """Digits after the point of a column; 3 for an unregistered metric."""
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
        **{name: method.setting(name) for name in _other_knobs()},
        "method": method.name,
        "training_seed": training_seed(record),
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
        if (metric := record.metrics.get(name)) is not None:
            row |= {name: metric.value, f"{name}_low": metric.low, f"{name}_high": metric.high}
            row[f"{name}_n"] = metric.n
    return row


def setting(record: ResultRecord, name: str) -> Any:
    """A record's value for a name of `settings()` or a field of its method."""
    if name == "seed":
        return record.seed
    if name == "images":
        return record.evidence.images_sha256 if record.evidence and _paths(record) else None
    value = record.method.setting(name)
    return _IMPLIED.get((record.method.sampler or "", name)) if value is None else value


def _name_and_steps(record: ResultRecord) -> tuple[Any, ...]:
    return (record.method.section, record.method.name, record.method.num_steps)


def _table_order(record: ResultRecord) -> tuple[Any, ...]:
    method, section = record.method, SECTIONS.index(record.method.section)
    if method.section == "Reference":
        return (section, age(record))
    steps, guidance = method.num_steps or 0, method.guidance_scale or 0.0
    return (section, method.teacher or "", method.name, -steps, guidance, age(record))


def distinguishing(records: Sequence[ResultRecord], symbols: Mapping[str, str]) -> list[str]:
    """The settings that differ among rows of one name and number of steps, empty if none does.

    `guidance 2, temperature 0.8`, or `s=2, T=0.8` with `SYMBOLS`.
    """
    groups = grouped(records, _name_and_steps)
    varying = {
        key: [s for s in settings() if len({setting(record, s) for record in group}) > 1]
        for key, group in groups.items()
    }
    sets = {run: words for group in groups.values() for run, words in _image_sets(group).items()}
    return [
        ", ".join(
            sets[record.run_id]
            if name == "images" and record.run_id in sets
            else _detail(record, name, symbols)
            for name in varying[_name_and_steps(record)]
        )
        for record in records
    ]


def _paths(record: ResultRecord) -> tuple[str, ...]:
    """Paths of a row of images in files; empty for images made here."""
    return record.evidence.images if record.evidence else ()


def _image_sets(records: Sequence[ResultRecord]) -> dict[str, str]:
    """What tells the paths of image sets apart, by run id: `modelA` of modelA/samples.

    Empty if nothing does.
    """
    paths = {
        r.run_id: [Path(path).parts or (".",) for path in _paths(r)] for r in records if _paths(r)
    }
    every = [parts for it in paths.values() for parts in it]
    lengths = [len(parts) for parts in every] or [1]
    shortest, longest = min(lengths), max(lengths)
    differing = (n for n in range(1, shortest) if len({parts[-n] for parts in every}) > 1)
    end = next(differing, shortest) - 1  # components that all have at their end
    for length in range(1, longest + 1):
        ends = {
            run: " + ".join("/".join(parts[-length - end : len(parts) - end]) for parts in it)
            for run, it in paths.items()
        }
        if len(set(ends.values())) == len(ends):
            return ends
    return {}


def _detail(record: ResultRecord, name: str, symbols: Mapping[str, str]) -> str:
    """`temperature 0.9`; a schedule includes its tokens per step, shortened to the outer steps."""
    value = _short(setting(record, name))
    if name in symbols:
        return f"{symbols[name]}={value}"
    words = f"{settings()[name].label} {value}"
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
