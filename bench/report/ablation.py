"""Ablations: students that differ in a few recipe keys, averaged over training seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.protocol import Protocol
from bench.records.record import ResultRecord
from bench.report import table as cells
from bench.report.collect import ProtocolReport
from bench.report.notes import caption, protocol_name
from bench.report.table import (
    best_and_second,
    decimals_of,
    higher_is_better,
    latest,
    setting,
    settings,
    varied_keys,
)
from bench.report.text import Line, Table, code, one_line, rank_legend, ranked
from dimo.util.schema import canonical_json

_NOT_VARIED = ("weights_sha256",)  # different in every run
_FACTS = ("steps", "images_seen", "seconds")  # of a run, if its record has them


@dataclass(frozen=True)
class AblationTable:
    """Students of one teacher, recipe and method that differ in the same keys.

    Attributes:
        subject: Teacher, method and recipe, as far as known.
        keys: The varied recipe keys.
        settings: Sampler settings in which the rows differ, names of `MethodInfo`.
        frame: One row per configuration: `recipe.<key>` for each of `keys`, the `settings`,
            `seeds` (number of runs), `steps`, `images_seen`, `seconds` (means over the seeds, or
            None), and per metric its mean `<metric>`, half of the range over the seeds
            `<metric>_half` (None for one seed) and the value of each seed in order
            `<metric>_values`.
    """

    subject: tuple[str, ...]
    keys: tuple[str, ...]
    settings: tuple[str, ...]
    frame: pd.DataFrame


def ablations(records: Iterable[ResultRecord], metrics: Sequence[str]) -> list[AblationTable]:
    """Groups the records of ablations by subject and varied keys.

    Of several records of one configuration and training seed, the newest counts. Records with
    different sampler settings are never averaged: each setting has its own row.

    Args:
        records: Records of one protocol; those of no ablation are ignored.
        metrics: Names of the metrics to show.
    """
    groups: dict[Any, list[ResultRecord]] = {}
    for record in latest(record for record in records if varied_keys(record)):
        groups.setdefault((_subject(record), tuple(varied_keys(record))), []).append(record)
    return [
        _table_of(subject, keys, group, metrics)
        for (subject, keys), group in sorted(groups.items(), key=lambda item: item[0])
    ]


def ablation_tables(part: ProtocolReport) -> list[Table]:
    """A table per ablation of one protocol, or a line that says how to make one."""
    tables = [
        _shown(ablation, part.protocol, part.metrics)
        for ablation in ablations(part.ablated, part.metrics)
    ]
    if tables:
        return tables
    nothing: Line = (
        "No results of an ablation under protocol ",
        *protocol_name(part.protocol),
        " yet; make its students with ",
        code("dimo distill --ablation KEY"),
        " and score them with ",
        code("dimo bench"),
        ".",
    )
    return [Table(caption=nothing)]


def _subject(record: ResultRecord) -> tuple[str, ...]:
    training = record.method.training
    return (record.method.teacher or "", *(_words(training.get(k)) for k in ("method", "recipe")))


def _table_of(
    subject: tuple[str, ...],
    keys: tuple[str, ...],
    records: list[ResultRecord],
    metrics: Sequence[str],
) -> AblationTable:
    names = [name for name in ("num_steps", *settings()) if name not in _NOT_VARIED]
    differing = [n for n in names if len({setting(record, n) for record in records}) > 1]
    rows: dict[str, dict[str, ResultRecord]] = {}
    for record in records:  # oldest first: a newer one of the same seed replaces it
        configuration = [varied_keys(record), [setting(record, name) for name in differing]]
        seeds = rows.setdefault(canonical_json(configuration), {})
        seed = record.method.training.get("seed")
        seeds[canonical_json(record.method.weights_sha256 if seed is None else seed)] = record
    lines = [
        _line_of([found for _, found in sorted(seeds.items())], keys, differing, metrics)
        for seeds in rows.values()
    ]
    varied = [*map(_column, keys), *differing]
    lines.sort(key=lambda line: [_sortable(line[name]) for name in varied])
    columns = [*varied, "seeds", *_FACTS]
    columns += [f"{name}{end}" for name in metrics for end in ("", "_half", "_values")]
    frame = pd.DataFrame(lines, columns=columns, dtype=object)
    return AblationTable(subject, keys, tuple(differing), frame.where(frame.notna(), None))


def _line_of(
    records: list[ResultRecord],
    keys: Sequence[str],
    settings: Sequence[str],
    metrics: Sequence[str],
) -> dict[str, Any]:
    first = records[0]
    line = {_column(key): varied_keys(first)[key] for key in keys}
    line |= {name: setting(first, name) for name in settings} | {"seeds": len(records)}
    for fact in _FACTS:
        known = [record.method.training.get(fact) for record in records]
        numbers = [n for n in known if isinstance(n, (int, float)) and not isinstance(n, bool)]
        line[fact] = sum(numbers) / len(numbers) if len(numbers) == len(records) else None
    for name in metrics:
        values = [record.metrics[name].value for record in records if name in record.metrics]
        if len(values) == len(records):
            line |= {name: sum(values) / len(values), f"{name}_values": values}
            line[f"{name}_half"] = (max(values) - min(values)) / 2 if len(values) > 1 else None
    return line


def _shown(found: AblationTable, protocol: Protocol, metrics: Sequence[str]) -> Table:
    rows = cells.rows(found.frame)
    columns = [*map(_column, found.keys), *found.settings]
    facts = [fact for fact in _FACTS if any(row[fact] is not None for row in rows)]
    shown = [_metric_column(found.frame[name], rows, name) for name in metrics]
    body = tuple(
        (
            *((one_line(_words(row[name]), 40),) for name in columns),
            *values,
            (cells.integer(row["seeds"]),),
            *((cells.MISSING if row[fact] is None else f"{row[fact]:,.0f}",) for fact in facts),
        )
        for row, values in zip(rows, zip(*shown, strict=True), strict=True)
    )
    varied = [one_line(key, 40) for key in found.keys]
    labels = settings()
    varied += [
        labels[name].label if name in labels else "steps of sampling" for name in found.settings
    ]
    titles = {"steps": "Training steps", "images_seen": "Images seen", "seconds": "Seconds"}
    spread: Line = (
        "A value is the mean over trainings with different seeds, ± half of their range (for two "
        "seeds that is both values); a value without ± is of one training.",
    )
    means: Line = ("Training steps, images and seconds are means over the seeds.",)
    subject = one_line(", ".join(filter(None, found.subject)) or "unnamed", 200)
    return Table(
        ("Ablation: ", subject),
        level=2,
        header=(
            *varied,
            *map(cells.metric_heading, metrics),
            "Seeds",
            *(titles[fact] for fact in facts),
        ),
        rows=body,
        left=tuple(range(len(varied))),
        caption=caption(protocol),
        notes=(spread, (*rank_legend(), ", as shown."), *[means] * bool(facts)),
    )


def _metric_column(values: "pd.Series[Any]", rows: list[dict[str, Any]], name: str) -> list[Line]:
    numbers = values.astype(float)
    decimals = decimals_of(name, numbers)
    places = best_and_second(numbers, higher_is_better=higher_is_better(name), decimals=decimals)
    column: list[Line] = []
    for row, place in zip(rows, places, strict=True):
        half = row[f"{name}_half"]
        spread = "" if half is None else " ±" + cells.half_width(half, decimals)
        mark = ranked(cells.number(row[name] or 0.0, decimals), place)
        column.append((cells.MISSING,) if row[name] is None else (mark, spread))
    return column


def _column(key: str) -> str:
    return f"recipe.{key}"


def _words(value: Any) -> str:
    """A value of a recipe in words: `0.5`, `mixed`, `[0.4, 0.8]`."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else canonical_json(value)


def _sortable(value: Any) -> tuple[int, float, str]:
    """Numbers by size before everything else by its text."""
    if isinstance(value, (int, float)):
        return (0, value, "")
    return (1, 0.0, _words(value))
