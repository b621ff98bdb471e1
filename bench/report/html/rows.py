"""Rows of the page's table: cells with what they sort by, and the provenance of each."""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bench.protocol import Protocol, list_protocols, protocol_sha256, protocol_text
from bench.protocol.catalog import ANY, METRICS
from bench.records.record import MetricValue, ResultRecord, Speed
from bench.report import table as cells
from bench.report.document import ProtocolReport
from bench.report.text import Line, Table, one_line
from dimo.util.schema import encode

_LONGEST = 10_000  # of a text that is shown whole, in a box that scrolls

_SETTINGS = {  # of a sampler, as the row's own words
    "sampler": "sampler",
    "mask_schedule": "schedule",
    "guidance_scale": "guidance",
    "temperature": "temperature",
    "final_temperature": "final temperature",
    "choice_temperature": "choice temperature",
    "theta": "theta",
    "random_start": "random start",
    "top_k": "top-k",
    "top_p": "top-p",
    "network_precision": "network in",
}


@dataclass(frozen=True)
class Column:
    """A column: its heading, and whether sorting begins with the largest."""

    heading: str
    falling: bool


@dataclass(frozen=True)
class Fact:
    """One thing that is known of a row; exact text keeps its lines and is meant to be copied."""

    term: str
    text: str
    exact: bool = False


@dataclass(frozen=True)
class RowView:
    """A row.

    Attributes:
        section: Block of the table.
        name: The method's name, one line.
        label: The same with the number of steps.
        cells: All but the first cell of the row.
        facts: Its provenance.
        run_id: Of its record.
    """

    section: str
    name: str
    label: str
    cells: tuple[Line, ...]
    facts: tuple[Fact, ...]
    run_id: str


def columns_of(part: ProtocolReport) -> tuple[Column, ...]:
    """The columns after the name."""
    metrics = [metric.name for metric in part.protocol.metrics]
    return (
        Column("Steps (↓)", falling=False),
        Column("NFE", falling=False),
        *(Column(cells.metric_heading(n), METRICS[n].higher_is_better) for n in metrics),
        Column("images/s", falling=True),
    )


def row_views(part: ProtocolReport, table: Table) -> tuple[RowView, ...]:
    """The rows of a table.

    Args:
        part: Protocol and records.
        table: What `measured_blocks` made of it: the cells.
    """
    rows = cells.rows(part.frame)
    views = []
    for row, record, body in zip(rows, part.records, table.body, strict=True):
        name, steps = one_line(row["method"], 90), row["num_steps"]
        counted = "" if cells.is_missing(steps) else f", {int(steps)} steps"
        facts = tuple(_facts(record, part.protocol))
        views.append(RowView(row["section"], name, name + counted, body[1:], facts, record.run_id))
    return tuple(views)


def protocol_source(protocol: Protocol) -> str:
    """The file of a shipped protocol as it is, of another one what it says, as JSON."""
    for shipped in list_protocols():
        if protocol_sha256(shipped) == protocol_sha256(protocol):
            return protocol_text(shipped.name)
    return json.dumps(encode(protocol), indent=2, ensure_ascii=False)


def _facts(record: ResultRecord, protocol: Protocol) -> Iterator[Fact]:
    """What the protocol pins stands in its file, once, and not in every row."""
    method, evidence, revision = record.method, record.evidence, record.revision
    yield _fact("Values", *(_metric(name, value) for name, value in record.metrics.items()))
    labels = _SETTINGS | {name: knob.label for name, knob in cells.other_knobs().items()}
    settings = {label: method.setting(name) for name, label in labels.items()}
    known = [f"{label} {_value(value)}" for label, value in settings.items() if value is not None]
    if known:
        yield _fact("Settings", *known)
    if method.token_counts:
        yield _fact("Tokens a step", _counts(method.token_counts))
    if method.selected_by.strip():
        yield _fact("How chosen", method.selected_by)
    if method.training:
        yield _fact("Training", *(f"{key} {_value(v)}" for key, v in method.training.items()))
    if method.student:
        yield _fact("Student", method.student)
    if method.teacher:
        yield _fact("Teacher", method.teacher)
    if method.weights_sha256:
        yield _fact("Weights", method.weights_sha256)
    if record.seed is not None:
        yield _fact("Seed", str(record.seed))
    yield _fact("Machine", *_machine(record.speed))
    yield _fact("Code", _revision(revision.commit, revision.dirty))
    yield _fact("Packages", *(f"{name} {version}" for name, version in record.packages.items()))
    if evidence is not None:
        hashes = [f"images {evidence.images_sha256}"]
        if protocol.reference.sha256 == ANY and evidence.reference_sha256:
            hashes.append(f"reference {evidence.reference_sha256}")
        if protocol.extractor.sha256 == ANY and evidence.extractor_sha256:
            hashes.append(f"extractor {evidence.extractor_sha256}")
        if evidence.scorer_sha256:
            hashes.append(f"scorer {evidence.scorer_sha256}")
        if evidence.detector_sha256:
            hashes.append(f"detector {evidence.detector_sha256}")
        if evidence.prompts_sha256:
            hashes.append(f"prompts {evidence.prompts_sha256}")
        yield _fact("Evidence", *hashes)
        if evidence.notes:
            yield _fact("Notes", *evidence.notes)
    yield _fact("Record", record.run_id, record.created, f"took {record.seconds:,.1f} s")
    yield Fact("Repeat with", _exact(record.command), exact=True)


def _fact(term: str, *pieces: str) -> Fact:
    return Fact(term, one_line(" \u00b7 ".join(pieces), _LONGEST))


def _metric(name: str, metric: MetricValue) -> str:
    label = METRICS[name].label if name in METRICS else name
    shown = f"{label} {metric.value:.5g}"
    if metric.low is not None:
        shown += f" [{metric.low:.5g}, {metric.high:.5g}]"
    extra = "".join(f", {key} {value:.5g}" for key, value in metric.extra.items())
    return f"{shown}, N {metric.n:,}{extra}"


def _machine(speed: Speed) -> Iterator[str]:
    yield speed.device
    if speed.batch_size is not None:
        yield f"batch {speed.batch_size}"
    if speed.seconds_per_batch is not None:
        yield f"{speed.seconds_per_batch:.4g} s a batch"
    if speed.peak_memory_bytes is not None:
        yield f"peak memory {speed.peak_memory_bytes / 2**20:,.0f} MiB"


def _revision(commit: str | None, dirty: bool | None) -> str:
    if commit is None:
        return "unknown commit"
    states = {None: "", True: ", with changes (dirty)", False: ", clean"}
    return f"commit {commit}{states[dirty]}"


def _counts(counts: Sequence[int]) -> str:
    """Runs of one number written once: `3 x 1, 2, 11`."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return ", ".join(str(n) if times == 1 else f"{times} x {n}" for n, times in runs)


def _value(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _exact(text: str) -> str:
    """A text to be copied: cut, its line ends kept, what is invisible shown."""
    kept = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in kept)
