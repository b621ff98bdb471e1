"""What every format of the report is rendered from: read once, selected once, formatted nowhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from bench.protocol import Protocol
from bench.records.record import ResultRecord
from bench.report.published import PublishedRow


@dataclass(frozen=True)
class Excluded:
    """A valid record that the table does not show.

    Attributes:
        record: The record.
        kind: `replaced`: a newer one has the same method and settings; `nonconforming`: its images
            are not what the protocol asks for; `other protocol`: measured under another one, or
            another version of this one; `ablation`: one of an ablation, which has a table of its
            own.
        reason: The same in words, one sentence.
    """

    record: ResultRecord
    kind: Literal["replaced", "nonconforming", "other protocol", "ablation"]
    reason: str


@dataclass(frozen=True)
class ProtocolReport:
    """One table of measured rows.

    Attributes:
        protocol: What the rows were measured under.
        sha256: Its hash.
        measured_with: Where the protocol takes any reference or any weights of its extractor: the
            hashes of those that these rows share. One protocol then has several tables, side by
            side in the report. Otherwise empty.
        frame: A row for each method, see `bench.report.table.results_frame`; may be empty.
        records: The record behind each row of `frame`, in the same order.
        quoted: Published rows that belong beside the table, never in it.
        excluded: Records that are not in `frame`, each with the reason.
    """

    protocol: Protocol
    sha256: str
    measured_with: tuple[str, ...]
    frame: pd.DataFrame
    records: tuple[ResultRecord, ...]
    quoted: tuple[PublishedRow, ...]
    excluded: tuple[Excluded, ...]


@dataclass(frozen=True)
class Report:
    """Everything a report shows.

    Attributes:
        title: Of the whole, one line.
        generated: When, UTC, as `2026-01-31 23:59 UTC`.
        protocols: One entry a table, at least one; those of one protocol are neighbours.
        problems: One line for each file of results that could not be used.
        folder: The folder of results.
        ablation: The tables asked for are those of ablations, see `bench.report.ablation`.
    """

    title: str
    generated: str
    protocols: tuple[ProtocolReport, ...]
    problems: tuple[str, ...]
    folder: Path
    ablation: bool = False
