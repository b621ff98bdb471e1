"""Measured rows as blocks: the table, its caption and notes, and the settings of each row."""

__all__ = ["measured_blocks"]

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from bench.catalog import METRICS
from bench.report import cells
from bench.report.blocks import Block, Bullets, Code, Heading, Line, Mark, Paragraph, Table, Words
from bench.report.document import ProtocolReport
from bench.report.notes import caption, excluded_notes, protocol_name, table_notes
from bench.report.plain import LONGEST_NAME
from bench.report.table import best_and_second, decimals_of

_Row = dict[str, Any]


def measured_blocks(part: ProtocolReport) -> list[Block]:
    """One table with all that belongs to it, or a line that says that there is nothing yet."""
    left_out = excluded_notes(part.excluded)
    if part.frame.empty:
        name = protocol_name(part.protocol)
        nothing = ("No results under protocol ", *name, " yet; make them with ")
        blocks: list[Block] = [Paragraph((*nothing, Code("dimo bench"), "."))]
        return [*blocks, *[Bullets(tuple(left_out))] * bool(left_out)]
    rows = cells.rows(part.frame)
    return [
        _results_table(part, rows),
        Bullets((*table_notes(rows, part.protocol), *left_out)),
        Heading(2, ("Settings of each row",), is_detail=True),
        _settings_table(part, rows),
    ]


def _results_table(part: ProtocolReport, rows: list[_Row]) -> Table:
    metrics = [metric.name for metric in part.protocol.metrics]
    competing = part.frame["section"] != "Reference"
    columns = []
    for name in metrics:
        values = part.frame[name].where(competing)
        decimals = decimals_of(name, values)
        places = best_and_second(
            values, higher_is_better=METRICS[name].higher_is_better, decimals=decimals
        )
        columns.append(
            [_value(row, name, decimals, place) for row, place in zip(rows, places, strict=True)]
        )
    body = tuple(
        (
            (Words(row["method"], LONGEST_NAME),),
            (cells.integer(row["num_steps"]),),
            (cells.integer(row["nfe"]),),
            *values,
            (cells.speed(row["images_per_second"]),),
        )
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    )
    headings = map(cells.metric_heading, metrics)
    return Table(
        header=("Method", "Steps (↓)", "NFE", *headings, "images/s"),
        body=body,
        sections=tuple(row["section"] for row in rows),
        caption=caption(part.protocol),
    )


def _value(row: _Row, name: str, decimals: int, place: int) -> Line:
    if cells.is_missing(row[name]):
        return (cells.MISSING,)
    shown = Mark(cells.number(row[name], decimals), place)
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if cells.is_missing(low):
        return (shown,)
    return (shown, " ±" + cells.half_width((high - low) / 2, decimals))


def _settings_table(part: ProtocolReport, rows: list[_Row]) -> Table:
    """The settings that any row has; what no row has, or the protocol gives, gets no column."""
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("sampler", "Sampler", str),
        ("mask_schedule", "Schedule", str),
        ("token_counts", "Tokens a step", _token_counts),
        ("guidance_scale", "Guidance", "{:g}".format),
        ("temperature", "Temp.", "{:g}".format),
        ("choice_temperature", "Choice temp.", "{:g}".format),
        ("final_temperature", "Final temp.", "{:g}".format),
        ("theta", "Theta", "{:g}".format),
        ("random_start", "Random start", lambda _: "yes"),
        ("top_k", "Top-k", cells.integer),
        ("top_p", "Top-p", "{:g}".format),
        ("network_precision", "Network in", str),
        ("seed", "Seed", cells.integer),
        ("weights_sha256", "Weights", lambda value: value[:12]),
        ("run_id", "Run", lambda value: value[:8]),
        ("training", "Training", _training),
    ]
    kept = [column for column in columns if any(_has(row[column[0]]) for row in rows)]
    if all(row["seed"] == part.protocol.seeds.report for row in rows):
        kept = [column for column in kept if column[0] != "seed"]
    texts = {"sampler", "mask_schedule", "token_counts", "random_start", "network_precision"}
    texts |= {"weights_sha256", "run_id", "training"}
    longest = {"training": 120}
    body = tuple(
        (
            (Words(row["method"], LONGEST_NAME),),
            (cells.integer(row["num_steps"]),),
            *(
                (Words(show(row[name]), longest.get(name, 60)),)
                if _has(row[name])
                else (cells.MISSING,)
                for name, _, show in kept
            ),
        )
        for row in rows
    )
    return Table(
        header=("Method", "Steps", *(heading for _, heading, _ in kept)),
        body=body,
        left=(0, *(2 + i for i, (name, _, _) in enumerate(kept) if name in texts)),
        sections=tuple(row["section"] for row in rows),
    )


def _token_counts(counts: Sequence[int]) -> str:
    """Tokens revealed at each step, runs of one number written once: `3 x 1, 2, 11`."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return ", ".join(str(n) if times == 1 else f"{times} x {n}" for n, times in runs)


def _training(facts: dict[str, Any]) -> str:
    """`recipe digits, seconds 372.1, images_seen 76,800`: whatever is a number, text or unknown."""
    shown = []
    for name, value in facts.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            shown.append(f"{name} {value:,.6g}" if abs(value) < 1e6 else f"{name} {value:,.0f}")
        elif isinstance(value, str):
            shown.append(f"{name} {value}")
        elif value is None:
            shown.append(f"{name} unknown")
    return ", ".join(shown)


def _has(value: Any) -> bool:
    return not cells.is_missing(value) and value not in ((), {}, "")
