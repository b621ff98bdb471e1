"""The report for programs: CSV of the measured rows, JSON of everything.

The JSON is one object, ASCII, without NaN:

    format      1, the version of this layout
    title, generated, folder, problems   as in `Report`
    protocols   a list, one entry per table:
        protocol        the content of the protocol file
        sha256, measured_with
        metrics         names, in the order of the table
        rows            one per record: a list of objects with the columns of
                        `bench.report.table.results_frame`, null for what is missing
        records         the record behind each row, in the same order, as in its file
        means           rows of the other formats that are means of training seeds: `run_ids`,
                        `method`, `num_steps`, each metric with the seeds' range, `_low` to `_high`
        quoted          published rows that belong next to the table: lines of published.csv
        ablations       a list of tables: subject, keys, settings and rows, see
                        `bench.report.measured.AblationTable`
        excluded        run_id, method, kind and reason of each record that is in no row
"""

import csv
import dataclasses
import io
import json
from typing import Any

from bench.records.record import record_to_json
from bench.report import table as cells
from bench.report.collect import ProtocolReport, Report
from bench.report.measured import ablations
from bench.report.text import one_line
from dimo.util.schema import canonical_json, encode

_FORMAT = 1
_LONGEST_TEXT = 1000
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # spreadsheets act on them


def report_csv(report: Report) -> str:
    """One line per measured row, with numbers in full precision.

    Columns: `protocol`, `protocol_version`, `protocol_sha256`, `measured_with`, then those of
    `results_frame` (of an ablation: of `AblationTable`); a missing value is empty. Items of a list
    are separated by spaces, tables are JSON. A text has one line of at most 1,000 characters, and
    begins with a `'` where a spreadsheet would take it for a formula.
    """
    lines: list[dict[str, Any]] = []
    columns: dict[str, None] = {}
    for part in report.protocols:
        of_protocol = {
            "protocol": part.protocol.name,
            "protocol_version": part.protocol.version,
            "protocol_sha256": part.sha256,
            "measured_with": part.measured_with,
        }
        tables = ablations(part.ablated, part.ablated_metrics)
        for frame in [table.frame for table in tables] if report.ablation else [part.frame]:
            columns |= dict.fromkeys([*of_protocol, *map(str, frame.columns)])
            lines += [of_protocol | row for row in cells.rows(frame)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_csv_text(name) for name in columns])
    writer.writerows([_csv_cell(line.get(name)) for name in columns] for line in lines)
    return file.getvalue()


def report_json(report: Report) -> str:
    """Records, tables, quoted rows and what was left out, as one JSON object."""
    content = {
        "format": _FORMAT,
        "title": report.title,
        "generated": report.generated,
        "folder": str(report.folder),
        "protocols": [_protocol(part) for part in report.protocols],
        "problems": list(report.problems),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _protocol(part: ProtocolReport) -> dict[str, Any]:
    shown = {f"{name}{end}" for name in part.metrics for end in ("", "_low", "_high")}
    shown |= {"method", "num_steps"}
    return {
        "protocol": encode(part.protocol),
        "sha256": part.sha256,
        "measured_with": list(part.measured_with),
        "metrics": part.metrics,
        "rows": [_plain(row) for row in cells.rows(part.frame)],
        "records": [json.loads(record_to_json(record)) for record in part.records],
        "means": [
            {"run_ids": [record.run_id for record in seeds]}
            | {name: value for name, value in _plain(row).items() if name in shown}
            for row, seeds in zip(cells.rows(part.table), part.seeds, strict=True)
            if len(seeds) > 1
        ],
        "quoted": [dataclasses.asdict(row) for row in part.quoted],
        "ablations": [
            {
                "subject": list(table.subject),
                "keys": list(table.keys),
                "settings": list(table.settings),
                "rows": [_plain(row) for row in cells.rows(table.frame)],
            }
            for table in ablations(part.ablated, part.ablated_metrics)
        ],
        "excluded": [
            {
                "run_id": one.record.run_id,
                "method": one.record.method.name,
                "kind": one.kind,
                "reason": one.reason,
            }
            for one in part.excluded
        ],
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if cells.is_missing(value) else value for name, value in row.items()}


def _csv_cell(value: Any) -> str:
    if cells.is_missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return " ".join(_csv_cell(item) for item in value)
    return _csv_text(canonical_json(value) if isinstance(value, dict) else str(value))


def _csv_text(text: str) -> str:
    line = one_line(text, _LONGEST_TEXT)
    return f"'{line}" if line.startswith(_FORMULA) else line
