"""The report as GitHub Markdown: measured results first, then quoted ones, then files left out.

Every text that comes from a record or from the file of quoted numbers passes through `cells.text`
or `cells.code`: whatever it holds, it is shown and does nothing.
"""

__all__ = ["report_markdown"]

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from bench.catalog import METRICS
from bench.protocol import Protocol, protocol_sha256
from bench.record import ResultRecord
from bench.report import cells
from bench.report.published import PublishedRow
from bench.report.quoted import quoted_blocks
from bench.report.table import (
    best_and_second,
    comparable,
    latest,
    results_frame,
    under_protocol,
)

_Row = dict[str, Any]
_LONGEST_NAME = 90  # with the settings that tell a row from another one


def report_markdown(
    records: Iterable[ResultRecord],
    problems: Sequence[str],
    published_rows: Sequence[PublishedRow],
    *,
    protocol: Protocol,
) -> str:
    """The paper's table from measured records, and the quoted numbers in tables of their own.

    Args:
        records: All records, of any protocol; those of another one are counted and left out.
        problems: One line for each file that could not be read, listed at the end.
        published_rows: Quoted numbers; see `load_published`.
        protocol: The protocol whose table is wanted.

    Returns:
        Markdown that ends with a newline.
    """
    ours, others = under_protocol(records, protocol)
    blocks = [f"## {cells.text(protocol.title)}", *_measured(ours, others, protocol)]
    blocks += quoted_blocks(published_rows)
    if problems:
        listed = cells.bullets(cells.code(problem, cells.LONGEST_NOTE) for problem in problems)
        blocks += ["## Files left out", listed]
    return "\n\n".join(blocks) + "\n"


def _measured(
    ours: list[ResultRecord], others: list[ResultRecord], protocol: Protocol
) -> list[str]:
    groups, nonconforming = comparable(ours, protocol)
    left_out = [*_nonconforming_note(nonconforming), *_others_note(others)]
    if not groups:
        nothing = (
            f"No results under protocol {_protocol_name(protocol)} yet; "
            f"make them with {cells.code('dimo bench')}."
        )
        return [nothing, *([cells.bullets(left_out)] if left_out else [])]
    blocks: list[str] = []
    for position, (hashes, records) in enumerate(groups.items()):
        if len(groups) > 1:
            shown = ", ".join(cells.code(digest[:12]) for digest in hashes)
            blocks.append(f"### Measured with {shown}")
        last = position == len(groups) - 1
        blocks += _table_blocks(records, protocol, left_out if last else [])
    return blocks


def _table_blocks(
    records: list[ResultRecord], protocol: Protocol, left_out: list[str]
) -> list[str]:
    names = [metric.name for metric in protocol.metrics]
    frame = results_frame(records, names)
    rows = cells.rows(frame)
    notes = [
        _uncertainty_note(protocol),
        f"{cells.RANK_LEGEND}, as shown; Reference rows do not compete.",
        *_count_notes(rows, names, protocol),
        *_ceiling_notes(rows),
        *_selection_notes(rows),
        *_speed_notes(rows),
        *_revision_notes(rows),
        *_replaced_notes(records),
        *left_out,
    ]
    return [
        _results_table(frame, rows, names),
        _caption(protocol),
        cells.bullets(notes),
        "### Settings of each row",
        _settings_table(rows, protocol),
    ]


def _results_table(frame: pd.DataFrame, rows: list[_Row], metrics: list[str]) -> str:
    competing = frame["section"] != "Reference"
    columns = []
    for name in metrics:
        decimals = _decimals(name, frame[name].where(competing))
        places = best_and_second(
            frame[name].where(competing),
            higher_is_better=METRICS[name].higher_is_better,
            decimals=decimals,
        )
        columns.append(
            [_value(row, name, decimals, place) for row, place in zip(rows, places, strict=True)]
        )
    headings = map(cells.metric_heading, metrics)
    body = [
        [
            cells.text(row["method"], _LONGEST_NAME),
            cells.integer(row["num_steps"]),
            cells.integer(row["nfe"]),
            *values,
            cells.speed(row["images_per_second"]),
        ]
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    ]
    return cells.table(
        ["Method", "Steps (↓)", "NFE", *headings, "images/s"],
        body,
        sections=[row["section"] for row in rows],
    )


def _value(row: _Row, name: str, decimals: int, place: int) -> str:
    if cells.is_missing(row[name]):
        return cells.MISSING
    shown = cells.marked(cells.number(row[name], decimals), place)
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if cells.is_missing(low):
        return shown
    half = cells.number((high - low) / 2, decimals)
    return f"{shown} ±{half.removeprefix('0')}"  # in a narrow table the line breaks before the ±


def _decimals(name: str, values: "pd.Series[float]") -> int:
    """Digits after the point, as papers have them; a third one for Frechet distances below 1."""
    if name == "inception_score" or (name == "fid" and not values.min() < 1):
        return 2
    return 3


def _caption(protocol: Protocol) -> str:
    images, reference = protocol.images, protocol.reference
    height, width = images.resolution
    params = {key: value for metric in protocol.metrics for key, value in metric.params.items()}
    rules = [
        f"N = {images.num_images:,} images a row, {images.num_images // images.num_classes:,} "
        f"for each of {images.num_classes:,} labels, {height} x {width}, "
        f"seed {protocol.seeds.report}",
        f"features of {cells.code(protocol.extractor.name)}",
        f"reference {cells.code(reference.name)}, {reference.count:,} images",
    ]
    if "splits" in params:
        rules.append(f"IS over {params['splits']} splits")
    if "k" in params:
        rules.append(f"k = {params['k']} nearest neighbours")
    paper = cells.text(protocol.paper, cells.LONGEST_NOTE)
    return f"**Protocol** {_protocol_name(protocol)}: {'; '.join(rules)}. Source: {paper}."


def _protocol_name(protocol: Protocol) -> str:
    digest = protocol_sha256(protocol)[:12]
    return f"{cells.code(protocol.name)}, version {protocol.version}, {cells.code(digest)}"


def _uncertainty_note(protocol: Protocol) -> str:
    bootstrap = protocol.uncertainty
    return (
        f"± is half of the {bootstrap.level * 100:g}% bootstrap interval "
        f"({bootstrap.n_bootstrap:,} resamples of the generated images)."
    )


def _count_notes(rows: list[_Row], metrics: list[str], protocol: Protocol) -> list[str]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        found = [row[f"{name}_n"] for name in metrics]
        counts = {int(count) for count in found if not cells.is_missing(count)}
        if counts - {protocol.images.num_images}:
            shown = " and ".join(f"{count:,}" for count in sorted(counts))
            groups.setdefault(shown, []).append(row)
    return [f"N = {shown} for {_who(group)}." for shown, group in groups.items()]


def _ceiling_notes(rows: list[_Row]) -> list[str]:
    ceilings = sorted(
        f"{row['coverage_ceiling']:.3f}"
        for row in rows
        if row["section"] != "Reference" and not cells.is_missing(row["coverage_ceiling"])
    )
    if not ceilings:
        return []
    shown = " to ".join(dict.fromkeys((ceilings[0], ceilings[-1])))
    return [
        f"Coverage has a ceiling of {shown}: what as many images drawn from the reference's own "
        "distribution are expected to reach."
    ]


def _selection_notes(rows: list[_Row]) -> list[str]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        if row["section"] != "Reference" and row["selected_by"].strip():
            groups.setdefault(row["selected_by"].strip().rstrip("."), []).append(row)
    return [
        f"How the settings of {_who(group)} were chosen: {cells.text(words, cells.LONGEST_NOTE)}."
        for words, group in groups.items()
    ]


def _speed_notes(rows: list[_Row]) -> list[str]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        if not cells.is_missing(row["images_per_second"]):
            batch = cells.integer(row["batch_size"])
            place = cells.text(row["device"], cells.LONGEST_NOTE)
            place += "" if batch == cells.MISSING else f", batch {batch}"
            groups.setdefault(place, []).append(row)
    return _by_group("images/s", "on", groups)


def _revision_notes(rows: list[_Row]) -> list[str]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        state = "an unknown commit"
        if not cells.is_missing(row["commit"]):
            changed = not cells.is_missing(row["dirty"]) and bool(row["dirty"])
            state = f"commit {cells.code(row['commit'][:12])}" + " with changes" * changed
        groups.setdefault(state, []).append(row)
    return _by_group("Code", "at", groups)


def _by_group(what: str, preposition: str, groups: dict[str, list[_Row]]) -> list[str]:
    """A note for each group, which says whose it is only if there are several."""
    if len(groups) == 1:
        return [f"{what} {preposition} {shared}." for shared in groups]
    return [f"{what} of {_who(rows)} {preposition} {shared}." for shared, rows in groups.items()]


def _replaced_notes(ours: list[ResultRecord]) -> list[str]:
    older = len(ours) - len(latest(ours))
    if not older:
        return []
    return [f"Not shown: {_results(older)} replaced by a newer one of the same settings."]


def _nonconforming_note(records: list[ResultRecord]) -> list[str]:
    if not records:
        return []
    named = ", ".join(dict.fromkeys(cells.text(record.method.name) for record in records))
    return [
        f"Not shown: {_results(len(records))} of image sets that do not conform to the protocol: "
        f"{named}."
    ]


def _others_note(others: list[ResultRecord]) -> list[str]:
    if not others:
        return []
    counts = Counter((r.protocol.name, r.protocol.version, r.protocol.sha256) for r in others)
    named = "; ".join(
        f"{cells.code(name)}, version {version}, {cells.code(sha256[:12])} ({count})"
        for (name, version, sha256), count in sorted(counts.items())
    )
    return [f"Not shown: {_results(len(others))} measured under another protocol: {named}."]


def _settings_table(rows: list[_Row], protocol: Protocol) -> str:
    """The settings that any row has; what no row has, or the protocol gives, gets no column."""
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("sampler", "Sampler", cells.text),
        ("mask_schedule", "Schedule", cells.text),
        ("token_counts", "Tokens a step", _token_counts),
        ("guidance_scale", "Guidance", "{:g}".format),
        ("temperature", "Temp.", "{:g}".format),
        ("choice_temperature", "Choice temp.", "{:g}".format),
        ("final_temperature", "Final temp.", "{:g}".format),
        ("theta", "Theta", "{:g}".format),
        ("random_start", "Random start", lambda _: "yes"),
        ("top_k", "Top-k", cells.integer),
        ("top_p", "Top-p", "{:g}".format),
        ("network_precision", "Network in", cells.text),
        ("seed", "Seed", cells.integer),
        ("weights_sha256", "Weights", lambda value: cells.text(value[:12])),
        ("run_id", "Run", lambda value: cells.text(value[:8])),
        ("training", "Training", _training),
    ]
    kept = [column for column in columns if any(_has(row[column[0]]) for row in rows)]
    if all(row["seed"] == protocol.seeds.report for row in rows):
        kept = [column for column in kept if column[0] != "seed"]
    texts = {"sampler", "mask_schedule", "token_counts", "random_start", "network_precision"}
    texts |= {"weights_sha256", "run_id", "training"}
    left = [0, *(2 + i for i, (name, _, _) in enumerate(kept) if name in texts)]
    body = [
        [
            cells.text(row["method"], _LONGEST_NAME),
            cells.integer(row["num_steps"]),
            *(show(row[name]) if _has(row[name]) else cells.MISSING for name, _, show in kept),
        ]
        for row in rows
    ]
    header = ["Method", "Steps", *(heading for _, heading, _ in kept)]
    return cells.table(header, body, left=left, sections=[row["section"] for row in rows])


def _token_counts(counts: Sequence[int]) -> str:
    """Tokens revealed at each step, runs of one number written once: `3 x 1, 2, 11`."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return cells.text(", ".join(str(n) if times == 1 else f"{times} x {n}" for n, times in runs))


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
    return cells.text(", ".join(shown), 120)


def _who(rows: list[_Row]) -> str:
    """`MaskGIT (16, 8 steps), Di[M]O (1 step)`."""
    steps: dict[str, list[str]] = {}
    for row in rows:
        listed = steps.setdefault(cells.text(row["method"], _LONGEST_NAME), [])
        listed += [] if cells.is_missing(row["num_steps"]) else [cells.integer(row["num_steps"])]
    return ", ".join(
        f"{name} ({', '.join(numbers)} {'step' if numbers == ['1'] else 'steps'})"
        if numbers
        else name
        for name, numbers in steps.items()
    )


def _has(value: Any) -> bool:
    return not cells.is_missing(value) and value not in ((), {}, "")


def _results(count: int) -> str:
    return f"{count:,} result" if count == 1 else f"{count:,} results"
