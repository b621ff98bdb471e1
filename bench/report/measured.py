"""The tables of a report in order: each protocol, then quoted results, then files left out.

Markdown and LaTeX write these tables; the HTML page has an order of its own.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from bench.report import table as cells
from bench.report.ablation import ablation_tables
from bench.report.collect import ProtocolReport, Report
from bench.report.notes import caption, excluded_notes, protocol_name, table_notes
from bench.report.quoted import quoted_tables
from bench.report.table import Setting, best_and_second, decimals_of, higher_is_better, settings
from bench.report.text import (
    LONGEST_NAME,
    LONGEST_NOTE,
    Line,
    Table,
    code,
    joined,
    one_line,
    ranked,
)

_LONGEST_TRAINING = 120


def report_tables(report: Report) -> list[Table]:
    """Everything; headings of level 1 are protocols, quoted results and files left out."""
    tables: list[Table] = []
    for _, parts in groupby(report.protocols, key=lambda part: part.sha256):
        alike = list(parts)
        tables.append(Table((alike[0].protocol.title,)))
        tables += protocol_tables(alike, ablation=report.ablation)
    if not report.ablation:
        tables += quoted_tables([row for part in report.protocols for row in part.quoted])
    if report.problems:
        listed = tuple((code(problem, LONGEST_NOTE),) for problem in report.problems)
        tables.append(Table(("Files left out",), notes=listed))
    return tables


def protocol_tables(parts: Sequence[ProtocolReport], *, ablation: bool) -> list[Table]:
    """The tables of one protocol without its title."""
    tables: list[Table] = []
    for part in parts:
        if len(parts) > 1 and part.measured_with:
            hashes = joined((code(digest[:12]),) for digest in part.measured_with)
            tables.append(Table(("Measured with ", *hashes), level=2))
        tables += ablation_tables(part) if ablation else measured_tables(part)
    return tables


def measured_tables(part: ProtocolReport) -> list[Table]:
    """Results and settings of the rows, or a line that says that there are none yet."""
    left_out = tuple(excluded_notes(part.excluded))
    if part.frame.empty:
        name = protocol_name(part.protocol)
        nothing = ("No results under protocol ", *name, " yet; make them with ")
        return [Table(caption=(*nothing, code("dimo bench"), "."), notes=left_out)]
    rows = cells.rows(part.frame)
    notes = (*table_notes(rows, part.protocol), *left_out)
    return [_results_table(part, rows, notes), _settings_table(part, rows)]


def _results_table(
    part: ProtocolReport, rows: list[dict[str, Any]], notes: tuple[Line, ...]
) -> Table:
    competing = part.frame["section"] != "Reference"
    columns = []
    for name in part.metrics:
        values = part.frame[name].where(competing)
        decimals = decimals_of(name, values)
        places = best_and_second(values, higher_is_better=higher_is_better(name), decimals=decimals)
        columns.append(
            [_value(row, name, decimals, place) for row, place in zip(rows, places, strict=True)]
        )
    body = tuple(
        (
            (one_line(row["method"], LONGEST_NAME),),
            (cells.integer(row["num_steps"]),),
            (cells.integer(row["nfe"]),),
            *values,
            (cells.speed(row["images_per_second"]),),
        )
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    )
    headings = map(cells.metric_heading, part.metrics)
    return Table(
        header=("Method", "Steps (↓)", "NFE", *headings, "images/s"),
        rows=body,
        sections=tuple(row["section"] for row in rows),
        caption=caption(part.protocol),
        notes=notes,
    )


def _value(row: dict[str, Any], name: str, decimals: int, place: int) -> Line:
    if cells.is_missing(row[name]):
        return (cells.MISSING,)
    shown = ranked(cells.number(row[name], decimals), place)
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if cells.is_missing(low):
        return (shown,)
    return (shown, " ±" + cells.half_width((high - low) / 2, decimals))


def _settings_table(part: ProtocolReport, rows: list[dict[str, Any]]) -> Table:
    """The settings that at least one row has; the protocol's own seed gets no column."""
    columns: dict[str, Setting] = {}
    for name, setting in settings().items():
        if setting.heading:
            columns[name] = setting
        if name == "mask_schedule":
            columns["token_counts"] = Setting("", "Tokens a step", cells.token_counts)
    columns["run_id"] = Setting("", "Run", lambda run_id: str(run_id)[:8])
    columns["training"] = Setting("", "Training", _training)
    present = {n: [row[n] for row in rows if _has(row[n])] for n in columns}
    if all(row["seed"] == part.protocol.seeds.report for row in rows):
        present["seed"] = []
    kept = [name for name in columns if present[name]]
    body = []
    for row in rows:
        line: list[Line] = [(one_line(row["method"], LONGEST_NAME),)]
        line.append((cells.integer(row["num_steps"]),))
        for name in kept:
            longest = _LONGEST_TRAINING if name == "training" else 60
            shown = columns[name].show(row[name]) if _has(row[name]) else cells.MISSING
            line.append((one_line(shown, longest),))
        body.append(tuple(line))
    texts = [not _is_number(present[name][0]) for name in kept]
    return Table(
        ("Settings of each row",),
        level=2,
        header=("Method", "Steps", *(columns[name].heading for name in kept)),
        rows=tuple(body),
        left=(0, *(index for index, is_text in enumerate(texts, 2) if is_text)),
        sections=tuple(row["section"] for row in rows),
        folded=True,
    )


def _training(facts: dict[str, Any]) -> str:
    """`recipe digits, seconds 372.1, images_seen 76,800`: numbers, texts and what is unknown."""
    shown = []
    for name, value in facts.items():
        if _is_number(value):
            shown.append(f"{name} {value:,.6g}" if abs(value) < 1e6 else f"{name} {value:,.0f}")
        elif value is None or isinstance(value, str):
            shown.append(f"{name} {'unknown' if value is None else value}")
    return ", ".join(shown)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has(value: Any) -> bool:
    return not cells.is_missing(value) and value not in ((), {}, "")
