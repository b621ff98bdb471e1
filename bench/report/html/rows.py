"""Rows of the page's table, each with its provenance."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.protocol import Protocol
from bench.protocol.catalog import ANY
from bench.records.record import MetricValue, ResultRecord
from bench.report import table as cells
from bench.report.collect import ProtocolReport
from bench.report.table import metric_label, settings
from bench.report.text import LONGEST_NAME, Line, Table, one_line

_LONGEST = 10_000  # characters of a text in a box that scrolls
_LISTED_APART = ("teacher", "seed", "weights_sha256")


@dataclass(frozen=True)
class RowView:
    """A row of the page: all cells but the first, and its provenance as term -> text."""

    section: str
    name: str
    label: str
    cells: tuple[Line, ...]
    facts: dict[str, str]
    command: str
    run_id: str


def row_views(part: ProtocolReport, table: Table) -> tuple[RowView, ...]:
    """The rows of a table of `measured_tables`."""
    views = []
    rows = zip(cells.rows(part.frame), part.records, table.rows, strict=True)
    for row, record, body in rows:
        name, label = one_line(row["method"], LONGEST_NAME), cells.row_label(row)
        facts = {
            term: one_line(" \u00b7 ".join(pieces), _LONGEST)
            for term, pieces in _facts(record, part.protocol)
            if any(pieces)
        }
        command = record.command[:_LONGEST]
        command = command if command.isprintable() else one_line(command, _LONGEST)
        views.append(RowView(row["section"], name, label, body[1:], facts, command, record.run_id))
    return tuple(views)


def _facts(record: ResultRecord, protocol: Protocol) -> Iterator[tuple[str, list[str]]]:
    """What is known of a row beyond what its protocol fixes."""
    method, evidence = record.method, record.evidence
    revision, speed = record.revision, record.speed
    yield "Values", [_metric(name, value) for name, value in record.metrics.items()]
    values = {
        setting.label: method.setting(name)
        for name, setting in settings().items()
        if name not in _LISTED_APART
    }
    yield "Settings", [f"{label} {_value(v)}" for label, v in values.items() if v is not None]
    yield "Tokens a step", [cells.token_counts(method.token_counts or ())]
    yield "How chosen", [method.selected_by.strip()]
    yield "Training", [f"{key} {_value(value)}" for key, value in method.training.items()]
    yield "Student", [method.student or ""]
    yield "Teacher", [method.teacher or ""]
    yield "Weights", [method.weights_sha256 or ""]
    yield "Seed", [] if record.seed is None else [str(record.seed)]
    batch, seconds, memory = speed.batch_size, speed.seconds_per_batch, speed.peak_memory_bytes
    machine = [speed.device]
    machine += [] if batch is None else [f"batch {batch}"]
    machine += [] if seconds is None else [f"{seconds:.4g} s a batch"]
    machine += [] if memory is None else [f"peak memory {memory / 2**20:,.0f} MiB"]
    yield "Machine", machine
    changed = {None: "", True: ", with changes (dirty)", False: ", clean"}[revision.dirty]
    commit = "unknown commit" if revision.commit is None else f"commit {revision.commit}{changed}"
    yield "Code", [commit]
    yield "Packages", [f"{name} {version}" for name, version in record.packages.items()]
    if evidence is not None:
        hashes = {
            "images": evidence.images_sha256,
            "reference": evidence.reference_sha256 if protocol.reference.sha256 == ANY else "",
            "extractor": evidence.extractor_sha256 if protocol.extractor.sha256 == ANY else "",
            "scorer": evidence.scorer_sha256,
            "detector": evidence.detector_sha256,
            "prompts": evidence.prompts_sha256,
        }
        yield "Evidence", [f"{name} {sha256}" for name, sha256 in hashes.items() if sha256]
        yield "Notes", list(evidence.notes)
    yield "Record", [record.run_id, record.created, f"took {record.seconds:,.1f} s"]


def _metric(name: str, metric: MetricValue) -> str:
    shown = f"{metric_label(name)} {metric.value:.5g}"
    if metric.low is not None:
        shown += f" [{metric.low:.5g}, {metric.high:.5g}]"
    extra = "".join(f", {key} {value:.5g}" for key, value in metric.extra.items())
    return f"{shown}, N {metric.n:,}{extra}"


def _value(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
