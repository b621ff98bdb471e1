"""Records -> a `Report`: which records each table shows, and why the others are left out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import pandas as pd

from bench.protocol import Metric, Protocol, list_protocols, load_protocol, protocol_sha256
from bench.protocol.catalog import data_dir
from bench.records.record import ResultRecord
from bench.records.seeds import grouped, mean_of_seeds, open_hashes
from bench.records.store import load_all
from bench.report.quoted import PublishedRow, load_published, quoted_beside
from bench.report.table import ordered, results_frame, seed_rows, varied_keys

DEFAULT_FOLDER, DEFAULT_PROTOCOL = Path("results"), "digits"  # of `dimo bench`, too


@dataclass(frozen=True)
class Excluded:
    """A valid record that the table does not show; those of two kinds have tables of their own."""

    record: ResultRecord
    kind: Literal["replaced", "off-protocol", "other protocol", "ablation"]
    reason: str  # the kind in one sentence


@dataclass(frozen=True)
class ProtocolReport:
    """One table of measured rows."""

    protocol: Protocol
    sha256: str  # of the protocol
    measured_with: tuple[str, ...]  # `open_hashes` of these rows; each combination has a table
    frame: pd.DataFrame  # of `results_frame`: one row per record
    records: tuple[ResultRecord, ...]  # in the order of `frame`
    seeds: tuple[list[ResultRecord], ...]  # behind each row that is shown: one of each seed
    quoted: tuple[PublishedRow, ...]  # published rows that belong next to the table, never in it
    excluded: tuple[Excluded, ...]  # records that are not in `frame`

    @cached_property
    def shown(self) -> Protocol:
        """The protocol with the metrics of the table."""
        return with_values(self.protocol, self.records)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of the table, in its order."""
        return metric_names(self.shown)

    @property
    def ablated_metrics(self) -> list[str]:
        """Those of the ablation tables."""
        return metric_names(with_values(self.protocol, self.ablated))

    @cached_property
    def rows(self) -> list[ResultRecord]:
        """The rows of the table that is shown; see `mean_of_seeds`."""
        return [mean_of_seeds(records) for records in self.seeds]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The values of `rows`, in the columns of `frame`."""
        return results_frame(self.rows, self.metrics)

    @property
    def ablated(self) -> list[ResultRecord]:
        return [one.record for one in self.excluded if one.kind == "ablation"]

    @property
    def off_protocol(self) -> list[ResultRecord]:
        return [one.record for one in self.excluded if one.kind == "off-protocol"]


@dataclass(frozen=True)
class Report:
    """Everything a report shows; every format is rendered from it."""

    title: str
    generated: str  # time, `2026-01-31 23:59 UTC`
    protocols: tuple[ProtocolReport, ...]  # at least one; those of one protocol are neighbours
    problems: tuple[str, ...]  # one line per results file that could not be used
    folder: Path  # of the results; pictures and verdicts are read from it
    ablation: bool = False  # whether to show the ablation tables instead
    settings: bool = False  # whether to show the settings of each row, too; a page always does


def read_report(
    results: Path,
    protocol: str = "",
    *,
    ablation: bool = False,
    settings: bool = False,
    weights_sha256: str = "",
) -> Report:
    """Reads a results folder and the bundled published numbers.

    `protocol` is a name or a file; empty: every bundled protocol that has results. The default
    folder need not exist yet. `weights_sha256` selects the rows of one network, of which those
    that are part of an ablation are rows like others.
    """
    nothing_yet = results == DEFAULT_FOLDER and not results.exists()
    records, problems = ([], []) if nothing_yet else load_all(results)
    if weights_sha256:
        records = [_alone(r) for r in records if r.method.weights_sha256 == weights_sha256]
    protocols = [load_protocol(protocol)] if protocol else with_records(list_protocols(), records)
    return collect_report(
        records,
        problems,
        load_published(data_dir("published") / "published.csv"),
        protocols=protocols or [load_protocol(DEFAULT_PROTOCOL)],
        folder=results,
        ablation=ablation,
        settings=settings,
    )


def _alone(record: ResultRecord) -> ResultRecord:
    """The record without the ablation that it is part of."""
    training = {key: value for key, value in record.method.training.items() if key != "ablation"}
    return replace(record, method=replace(record.method, training=training))


def collect_report(
    records: Iterable[ResultRecord],
    problems: Iterable[str] = (),
    published_rows: Iterable[PublishedRow] = (),
    *,
    protocols: Sequence[Protocol],
    folder: Path = Path(),
    ablation: bool = False,
    settings: bool = False,
    now: datetime | None = None,
) -> Report:
    """Selects what each table shows.

    Args:
        records: Records of any protocol.
        problems: One line per file that could not be read.
        published_rows: Quoted numbers, see `load_published`; each benchmark is quoted once.
        protocols: At least one. A record of none of them is listed as left out under the protocol
            of the same name, or under the last one.
        folder, ablation, settings: As in `Report`.
        now: Time of the report; None: now.
    """
    published_rows = list(published_rows)
    hashes = {protocol_sha256(protocol): protocol for protocol in protocols}
    ours: dict[str, list[ResultRecord]] = {sha256: [] for sha256 in hashes}
    others: dict[str, list[ResultRecord]] = {protocol.name: [] for protocol in protocols}
    for record in records:
        name = record.protocol.name if record.protocol.name in others else protocols[-1].name
        ours.get(record.protocol.sha256, others[name]).append(record)
    parts: list[ProtocolReport] = []
    quoted: set[str] = set()
    for sha256, protocol in hashes.items():
        beside = quoted_beside(published_rows, protocol)
        new = tuple(row for row in beside if row.benchmark not in quoted)
        quoted |= {row.benchmark for row in new}
        conforming, left_out = [], []
        for record in ours[sha256]:
            if record.off_protocol:
                left_out.append(Excluded(record, "off-protocol", "; ".join(record.off_protocol)))
            else:
                conforming.append(record)
        for record in others[protocol.name]:
            used = record.protocol
            reason = f"measured under {used.name}, version {used.version}, {used.sha256[:12]}"
            left_out.append(Excluded(record, "other protocol", reason))
        alike = grouped(conforming, partial(open_hashes, protocol))
        tables = [
            _table(protocol, sha256, measured_with, group)
            for measured_with, group in (alike or {(): []}).items()
        ]
        tables[0] = replace(tables[0], quoted=new)
        tables[-1] = replace(tables[-1], excluded=(*tables[-1].excluded, *left_out))
        parts += tables
    generated = (now or datetime.now(UTC)).astimezone(UTC)
    return Report(
        title=protocols[0].title if len(protocols) == 1 else "Results",
        generated=f"{generated:%Y-%m-%d %H:%M} UTC",
        protocols=tuple(parts),
        problems=tuple(problems),
        folder=folder,
        ablation=ablation,
        settings=settings,
    )


def with_records(protocols: Iterable[Protocol], records: Iterable[ResultRecord]) -> list[Protocol]:
    """The protocols that any of the records was measured under."""
    measured = {record.protocol.sha256 for record in records}
    return [protocol for protocol in protocols if protocol_sha256(protocol) in measured]


def with_values(protocol: Protocol, records: Sequence[ResultRecord]) -> Protocol:
    """The protocol without the supplementary metrics that no record has; its hash is the same.

    Values of one that was measured with several parameters do not compare: it is left out, too.
    """

    def is_shown(metric: Metric) -> bool:
        found = [r.metrics[metric.name].extra for r in records if metric.name in r.metrics]
        return bool(found) and all(metric.params.items() <= extra.items() for extra in found)

    shown = tuple(m for m in protocol.metrics if not m.supplementary or is_shown(m))
    return replace(protocol, metrics=shown)


def metric_names(protocol: Protocol) -> list[str]:
    return [metric.name for metric in protocol.metrics]


def _table(
    protocol: Protocol,
    sha256: str,
    measured_with: tuple[str, ...],
    group: Sequence[ResultRecord],
) -> ProtocolReport:
    ablated = [record for record in group if varied_keys(record)]
    rows = ordered(record for record in group if not varied_keys(record))
    shown = {id(record) for record in (*rows, *ablated)}
    newer = "a newer record has the same method and settings"
    return ProtocolReport(
        protocol=protocol,
        sha256=sha256,
        measured_with=measured_with,
        frame=results_frame(rows, metric_names(with_values(protocol, rows))),
        records=tuple(rows),
        seeds=tuple(seed_rows(rows)),
        quoted=(),
        excluded=(
            *(Excluded(r, "replaced", newer) for r in group if id(r) not in shown),
            *(Excluded(record, "ablation", "part of an ablation") for record in ablated),
        ),
    )
