"""Records -> the report: which go in a table, which do not and why."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.protocol import Protocol, protocol_sha256
from bench.records.record import ResultRecord
from bench.report.ablation import is_ablation
from bench.report.document import Excluded, ProtocolReport, Report
from bench.report.published import PublishedRow
from bench.report.quoted import quoted_beside
from bench.report.table import comparable, ordered, results_frame

_Records = Sequence[ResultRecord]


def collect_report(
    records: Iterable[ResultRecord],
    problems: Iterable[str],
    published_rows: Iterable[PublishedRow],
    *,
    protocols: Sequence[Protocol],
    folder: Path,
    ablation: bool = False,
    now: datetime | None = None,
) -> Report:
    """Selects what each table shows.

    Args:
        records: All records, of any protocol.
        problems: One line for each file that could not be read.
        published_rows: Quoted numbers; see `load_published`. Each benchmark is quoted once.
        protocols: Those whose tables are wanted, at least one. A record of none of them is counted
            with the protocol of its name, or with the last one.
        folder: Where the records are from.
        ablation: Whether tables of ablations are wanted instead.
        now: Time of the report; None: now.
    """
    records, published_rows = list(records), list(published_rows)
    names = [protocol.name for protocol in protocols]
    hashes = {protocol_sha256(protocol): protocol for protocol in protocols}
    ours: dict[str, list[ResultRecord]] = {sha256: [] for sha256 in hashes}
    others: dict[str, list[ResultRecord]] = {name: [] for name in names}
    for record in records:
        if record.protocol.sha256 in ours:
            ours[record.protocol.sha256].append(record)
        else:
            named = record.protocol.name if record.protocol.name in others else names[-1]
            others[named].append(record)
    parts: list[ProtocolReport] = []
    quoted: set[str] = set()
    for sha256, protocol in hashes.items():
        beside = quoted_beside(published_rows, protocol)
        new = tuple(row for row in beside if row.benchmark not in quoted)
        quoted |= {row.benchmark for row in new}
        parts += _tables(protocol, sha256, ours[sha256], others[protocol.name], new)
    generated = (now or datetime.now(UTC)).astimezone(UTC)
    return Report(
        title=protocols[0].title if len(protocols) == 1 else "Results",
        generated=f"{generated:%Y-%m-%d %H:%M} UTC",
        protocols=tuple(parts),
        problems=tuple(problems),
        folder=folder,
        ablation=ablation,
    )


def with_records(protocols: Iterable[Protocol], records: Iterable[ResultRecord]) -> list[Protocol]:
    """The protocols under which any of the records was measured."""
    found = {record.protocol.sha256 for record in records}
    return [protocol for protocol in protocols if protocol_sha256(protocol) in found]


def _tables(
    protocol: Protocol,
    sha256: str,
    ours: _Records,
    others: _Records,
    quoted: tuple[PublishedRow, ...],
) -> list[ProtocolReport]:
    groups, nonconforming = comparable(ours, protocol)
    rest = [Excluded(record, "nonconforming", _nonconforming(record)) for record in nonconforming]
    rest += [Excluded(record, "other protocol", _elsewhere(record)) for record in others]
    parts = []
    for position, (measured_with, group) in enumerate((groups or {(): []}).items()):
        last = position == max(len(groups), 1) - 1
        parts.append(_table(protocol, sha256, measured_with, group, rest if last else [], quoted))
        quoted = ()
    return parts


def _table(
    protocol: Protocol,
    sha256: str,
    measured_with: tuple[str, ...],
    group: _Records,
    rest: list[Excluded],
    quoted: tuple[PublishedRow, ...],
) -> ProtocolReport:
    ablated = [record for record in group if is_ablation(record)]
    rows = ordered(record for record in group if not is_ablation(record))
    shown = {id(record) for record in (*rows, *ablated)}
    replaced = [record for record in group if id(record) not in shown]
    newer = "a newer record has the same method and settings"
    return ProtocolReport(
        protocol=protocol,
        sha256=sha256,
        measured_with=measured_with,
        frame=results_frame(rows, [metric.name for metric in protocol.metrics]),
        records=tuple(rows),
        quoted=quoted,
        excluded=(
            *(Excluded(record, "replaced", newer) for record in replaced),
            *(Excluded(record, "ablation", "one of an ablation") for record in ablated),
            *rest,
        ),
    )


def _nonconforming(record: ResultRecord) -> str:
    return "; ".join(record.evidence.nonconforming) if record.evidence else ""


def _elsewhere(record: ResultRecord) -> str:
    found = record.protocol
    return f"measured under {found.name}, version {found.version}, {found.sha256[:12]}"
