"""The tables of a report in order: each protocol, then quoted results, then files left out.

A protocol's tables are its results with their settings, or its ablations: students that differ in
a few recipe keys, averaged over training seeds. Markdown and LaTeX write these tables; the HTML
page has its own order.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import pandas as pd

from bench.protocol import Protocol
from bench.records.record import ResultRecord
from bench.records.seeds import grouped, mean_of_seeds, newest_of_each_seed, open_hashes
from bench.report import table as cells
from bench.report.collect import (
    DEFAULT_PROTOCOL,
    ProtocolReport,
    Report,
    metric_names,
    with_values,
)
from bench.report.notes import (
    caption,
    excluded_notes,
    noted_columns,
    protocol_name,
    row_notes,
    table_notes,
    uncertainty_note,
)
from bench.report.quoted import quoted_tables
from bench.report.table import (
    SYMBOLS,
    Setting,
    is_number,
    setting,
    settings,
    varied_keys,
)
from bench.report.text import (
    LONGEST_NAME,
    LONGEST_NOTE,
    Footnotes,
    Line,
    Styled,
    Table,
    code,
    joined,
    one_line,
    rank_legend,
    ranked,
)
from dimo.util.schema import canonical_json

_NOT_VARIED = "weights_sha256"  # different in every run
_FACTS = {"steps": "Training steps", "images_seen": "Images seen", "seconds": "Seconds"}


def report_tables(report: Report) -> list[Table]:
    """Everything; headings of level 1 are protocols, quoted results and files left out."""
    tables: list[Table] = []
    for _, parts in groupby(report.protocols, key=lambda part: part.sha256):
        of_protocol = list(parts)
        tables.append(Table((of_protocol[0].protocol.title,)))
        tables += protocol_tables(of_protocol, ablation=report.ablation, settings=report.settings)
    if not report.ablation:
        tables += quoted_tables([row for part in report.protocols for row in part.quoted])
    if report.problems:
        listed = tuple((code(problem, LONGEST_NOTE),) for problem in report.problems)
        tables.append(Table(("Files left out",), notes=listed))
    return tables


def protocol_tables(
    parts: Sequence[ProtocolReport], *, ablation: bool, settings: bool
) -> list[Table]:
    """The tables of one protocol without its title."""
    tables: list[Table] = []
    for part in parts:
        if len(parts) > 1 and part.measured_with:
            hashes = joined((code(digest[:12]),) for digest in part.measured_with)
            tables.append(Table(("Measured with ", *hashes), level=2))
        tables += ablation_tables(part) if ablation else measured_tables(part, settings=settings)
    return tables


def measured_tables(part: ProtocolReport, *, settings: bool) -> list[Table]:
    """Results, off-protocol results, settings of the rows; or how to make the first row."""
    left_out = tuple(excluded_notes(part.excluded))
    apart = _off_protocol_tables(part)
    if part.frame.empty:
        nothing = [] if apart else [_first_rows(part.protocol)]
        return [*nothing, *apart, *[Table(notes=left_out)] * bool(left_out)]
    frame, shown = part.table, part.shown
    rows = cells.rows(frame)
    marks, footnotes = row_notes(rows, part.seeds, shown)
    results = _results_table(shown, frame, part.rows, marks, is_ranked=True)
    symbols = _symbol_notes(results)
    notes = (*footnotes, *symbols, *table_notes(rows, part), *left_out)
    results = replace(results, caption=caption(part.protocol), notes=notes)
    return [results, *apart, *[_settings_table(part)] * settings]


def _first_rows(protocol: Protocol) -> Table:
    """Says that there are no rows, and the command that makes some."""
    name = protocol_name(protocol)
    command = f"dimo bench --protocol {protocol.name} --teacher TEACHER"
    if protocol.name == DEFAULT_PROTOCOL:
        command = "dimo bench --teacher digits --student digits-dimo --steps 1,4,16"
    caption = ("No results under protocol ", *name, " yet; make the first rows with")
    return Table(caption=caption, notes=((code(command, LONGEST_NOTE),),))


def _off_protocol_tables(part: ProtocolReport) -> list[Table]:
    """Results that no other may be compared with: a table per cause and N, without ranks."""

    def cause(record: ResultRecord) -> tuple[str, int]:
        return "; ".join(record.off_protocol), record.num_images

    tables: list[Table] = []
    for group in grouped(part.off_protocol, partial(open_hashes, part.protocol)).values():
        for (reason, count), records in grouped(group, cause).items():
            rows = cells.ordered(records)
            shown = with_values(part.protocol, rows)
            frame = cells.results_frame(rows, metric_names(shown))
            table = _results_table(shown, frame, rows, [()] * len(rows), is_ranked=False)
            title = (f"Off-protocol (not comparable), N = {count:,}",)
            why = ("Off-protocol: ", one_line(reason, LONGEST_NOTE), ".")
            notes = (why, *_symbol_notes(table))
            if part.frame.empty and not tables:  # else the notes above say it
                notes = (*notes, uncertainty_note(shown))
            tables.append(replace(table, title=title, level=2, notes=notes))
    return tables


def _results_table(
    protocol: Protocol,
    frame: pd.DataFrame,
    records: Sequence[ResultRecord],
    marks: Sequence[Line],
    *,
    is_ranked: bool,
) -> Table:
    """Rows of `results_frame`; a name stands once above rows of equal names, as in papers."""

    def half_interval(row: dict[str, Any], name: str) -> float | None:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return None if cells.is_missing(low) else (high - low) / 2

    rows, names = cells.rows(frame), metric_names(protocol)
    competing = (frame["section"] != "Reference") & is_ranked
    columns = [
        _metric_column(name, frame[name].where(competing), rows, half_interval) for name in names
    ]
    body = tuple(
        (
            label,
            (cells.integer(row["num_steps"]),),
            (cells.integer(row["nfe"]),),
            *values,
            (cells.speed(row["images_per_second"]),),
        )
        for label, row, values in zip(
            _names(records, marks), rows, zip(*columns, strict=True), strict=True
        )
    )
    header = ("Method", "Steps (↓)", "NFE", *map(cells.metric_heading, names), "images/s")
    return Table(
        header=header,
        rows=body,
        sections=tuple(row["section"] for row in rows),
        spare=((len(header) - 1,), _supplementary(protocol, 3)),
    )


def _supplementary(protocol: Protocol, first: int) -> tuple[int, ...]:
    """Columns of supplementary metrics, where that of the first metric is `first`."""
    return tuple(i for i, metric in enumerate(protocol.metrics, first) if metric.supplementary)


def _names(records: Sequence[ResultRecord], marks: Sequence[Line]) -> list[Line]:
    """`MaskGIT (s=1, T=1)` and its marks, without what is as in the row above."""
    names: list[Line] = []
    above: tuple[str, str, str, Line] | None = None
    all_details = cells.distinguishing(records, SYMBOLS)
    for record, details, mark in zip(records, all_details, marks, strict=True):
        this = (record.method.section, record.method.name, details, mark)
        is_known = (
            above is not None and above[:2] == this[:2] and (details or above[2:] == this[2:])
        ) and cells.setting(record, "images") is None  # one name may be two methods' images
        words = [] if is_known else [record.method.name]
        words += [f"({details})"] if details and this != above else []
        names.append((one_line(" ".join(words), LONGEST_NAME), *mark) if words else ())
        above = this
    return names


def _symbol_notes(table: Table) -> list[Line]:
    """What the letters in names stand for."""
    names = " ".join(str(piece) for row in table.rows for piece in row[0])
    used = [name for name, symbol in SYMBOLS.items() if re.search(rf"[( ]{symbol}=", names)]
    stands = ", ".join(f"{SYMBOLS[name]}: {name.replace('_', ' ')}" for name in used)
    return [(f"{stands}.",)] if used else []


def _metric_column(
    name: str,
    ranked_values: "pd.Series[float]",
    rows: list[dict[str, Any]],
    half: Callable[[dict[str, Any], str], float | None],
) -> list[Line]:
    """Values with their ranks and, where `half` gives one, half of their interval."""
    all_values = pd.Series([row[name] for row in rows], dtype="float64")
    decimals = cells.decimals_of(name, ranked_values if ranked_values.any() else all_values)
    places = cells.best_and_second(
        ranked_values, higher_is_better=cells.higher_is_better(name), decimals=decimals
    )
    column: list[Line] = []
    for row, place in zip(rows, places, strict=True):
        if cells.is_missing(row[name]):
            column.append((cells.MISSING,))
            continue
        width = half(row, name)
        shown: Line = (ranked(cells.number(row[name], decimals), place),)
        if width is not None:
            shown += (Styled(cells.uncertainty(width, decimals), "interval"),)
        column.append(shown)
    return column


def _settings_table(part: ProtocolReport) -> Table:
    """The settings of every record that at least one has; the protocol's own seed has no column."""
    rows = cells.rows(part.frame)
    columns: dict[str, Setting] = {}
    for name, column in settings().items():
        if column.heading:
            columns[name] = column
        if name == "mask_schedule":
            columns["token_counts"] = Setting("", "Tokens a step", cells.token_counts)
    columns["run_id"] = Setting("", "Run", lambda run_id: str(run_id)[:8])
    if len(part.seeds) < len(rows):  # what the means are of
        name = part.metrics[0]
        columns["training_seed"] = Setting("", "Trained with seed", cells.integer)
        columns[name] = Setting("", cells.metric_heading(name), "{:.3f}".format)
    present = {n: [row[n] for row in rows if _has(row[n])] for n in columns}
    if all(row["seed"] == part.protocol.seeds.report for row in rows):
        present["seed"] = []
    kept = [name for name in columns if present[name]]
    footnotes = Footnotes()
    noted = noted_columns(rows, footnotes)
    names = _names(part.records, [()] * len(rows))

    def cell(row: dict[str, Any], name: str) -> Line:
        return (one_line(columns[name].show(row[name]) if _has(row[name]) else cells.MISSING),)

    body = tuple(
        (
            name,
            (cells.integer(row["num_steps"]),),
            *(cell(row, name) for name in kept),
            *(column[index] for column in noted.values()),
        )
        for index, (name, row) in enumerate(zip(names, rows, strict=True))
    )
    texts = [index for index, name in enumerate(kept, 2) if not is_number(present[name][0])]
    header = ("Method", "Steps", *(columns[name].heading for name in kept), *noted)
    return Table(
        ("Settings of each row",),
        level=2,
        header=header,
        rows=body,
        left=(0, *texts, *range(2 + len(kept), len(header))),
        sections=tuple(row["section"] for row in rows),
        notes=tuple(footnotes.notes),
        folded=True,
    )


def _has(value: Any) -> bool:
    return not cells.is_missing(value) and value not in ((), {}, "")


@dataclass(frozen=True)
class AblationTable:
    """Students of one teacher, recipe and method that differ in the same recipe keys.

    `frame` has a row per configuration: `recipe.<key>` for each of `keys`, the `settings`, `seeds`
    (number of runs), `steps`, `images_seen`, `seconds` (means over the seeds), and per metric its
    mean `<metric>`, half of the range over the seeds `<metric>_half` and `<metric>_values` by seed.
    """

    subject: tuple[str, ...]  # teacher, method and recipe, as far as known
    keys: tuple[str, ...]
    settings: tuple[str, ...]  # of the sampler, in which the rows differ
    frame: pd.DataFrame


def ablations(records: Iterable[ResultRecord], metrics: Sequence[str]) -> list[AblationTable]:
    """Groups the records of ablations under one protocol by subject and varied keys.

    Of several records of one configuration and training seed, the newest counts. Records with
    different sampler settings are never averaged: each setting has its own row.
    """

    def subject_and_keys(record: ResultRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
        method, training = record.method, record.method.training
        subject = (method.teacher or "", *(_words(training.get(k)) for k in ("method", "recipe")))
        return subject, tuple(varied_keys(record))

    chosen = cells.latest(record for record in records if varied_keys(record))
    groups = grouped(chosen, subject_and_keys)
    return [_ablation(*key, groups[key], metrics) for key in sorted(groups)]


def ablation_tables(part: ProtocolReport) -> list[Table]:
    """A table per ablation of one protocol, or a line that says how to make one."""
    shown = with_values(part.protocol, part.ablated)
    tables = ablations(part.ablated, metric_names(shown))
    if tables:
        return [_ablation_table(table, shown) for table in tables]
    distill, bench = code("dimo distill --ablation KEY"), code("dimo bench")
    nothing = ("No results of an ablation under protocol ", *protocol_name(part.protocol), " yet; ")
    how = ("make its students with ", distill, " and score them with ", bench, ".")
    return [Table(caption=(*nothing, *how))]


def _ablation(
    subject: tuple[str, ...],
    keys: tuple[str, ...],
    records: list[ResultRecord],
    metrics: Sequence[str],
) -> AblationTable:
    names = [name for name in ("num_steps", *settings()) if name != _NOT_VARIED]
    differing = [n for n in names if len({setting(record, n) for record in records}) > 1]
    rows = [
        _ablation_row(seeds, keys, differing, metrics) for seeds in newest_of_each_seed(records)
    ]
    varied = [*(f"recipe.{key}" for key in keys), *differing]
    rows.sort(key=lambda row: [_sortable(row[name]) for name in varied])
    columns = [*varied, "seeds", *_FACTS]
    columns += [f"{name}{end}" for name in metrics for end in ("", "_half", "_values")]
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    return AblationTable(subject, keys, tuple(differing), frame.where(frame.notna(), None))


def _ablation_row(
    records: list[ResultRecord],
    keys: Sequence[str],
    settings: Sequence[str],
    metrics: Sequence[str],
) -> dict[str, Any]:
    mean = mean_of_seeds(records)
    row = {f"recipe.{key}": varied_keys(mean)[key] for key in keys}
    row |= {name: setting(mean, name) for name in settings} | {"seeds": len(records)}
    for fact in _FACTS:
        values = [record.method.training.get(fact, "") for record in records]
        known = [value for value in values if is_number(value)]
        row[fact] = sum(known) / len(known) if len(known) == len(records) else None
    for name in metrics:
        if (metric := mean.metrics.get(name)) is not None:
            row |= {name: metric.value, f"{name}_values": [r.metrics[name].value for r in records]}
            row[f"{name}_half"] = None
            if len(records) > 1 and metric.low is not None and metric.high is not None:
                row[f"{name}_half"] = (metric.high - metric.low) / 2
    return row


def _ablation_table(table: AblationTable, protocol: Protocol) -> Table:
    rows, metrics = cells.rows(table.frame), metric_names(protocol)
    varied = [*(f"recipe.{key}" for key in table.keys), *table.settings]
    facts = [fact for fact in _FACTS if any(row[fact] is not None for row in rows)]
    columns = [
        _metric_column(
            name, table.frame[name].astype(float), rows, lambda row, name: row[f"{name}_half"]
        )
        for name in metrics
    ]
    body = tuple(
        (
            *((one_line(_words(row[name]), 40),) for name in varied),
            *values,
            (cells.integer(row["seeds"]),),
            *((cells.MISSING if row[fact] is None else f"{row[fact]:,.0f}",) for fact in facts),
        )
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    )
    labels = {name: known.label for name, known in settings().items()}
    headings = [one_line(key, 40) for key in table.keys]
    headings += [labels.get(name, "steps of sampling") for name in table.settings]
    spread = (
        "A value is the mean over training runs with different seeds: 0.286(45) is 0.286 ± 0.045, "
        "half of their range (for two seeds that is both values); a value alone is of one run."
    )
    means = "Training steps, images and seconds are means over the seeds."
    subject = one_line(", ".join(filter(None, table.subject)) or "unnamed", 200)
    titles = [_FACTS[fact] for fact in facts]
    return Table(
        ("Ablation: ", subject),
        level=2,
        header=(*headings, *map(cells.metric_heading, metrics), "Seeds", *titles),
        rows=body,
        left=tuple(range(len(headings))),
        spare=((), _supplementary(protocol, len(headings))),
        caption=caption(protocol),
        notes=((spread,), (*rank_legend(), ", as shown."), *[(means,)] * bool(facts)),
    )


def _words(value: Any) -> str:
    """A value of a recipe in words: `0.5`, `mixed`, `[0.4, 0.8]`."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else canonical_json(value)


def _sortable(value: Any) -> tuple[int, float, str]:
    """Sorts numbers by size, before everything else by its text."""
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0.0, _words(value))
