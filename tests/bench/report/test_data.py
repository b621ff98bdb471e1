"""CSV and JSON: what a program reads is what was measured."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

from bench.records.record import ResultRecord, record_from_json, record_to_json
from bench.report import Report, report_csv, report_json
from bench.report.table import ROW_COLUMNS

RecordMaker = Callable[..., ResultRecord]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def test_a_csv_line_has_every_digit_of_its_record(study: Report) -> None:
    lines = read(report_csv(study))
    records = study.protocols[0].records
    assert len(lines) == len(records) == 7
    for line, record in zip(lines, records, strict=True):
        assert line["method"] == record.method.name
        assert line["protocol_sha256"] == record.protocol.sha256
        for name, metric in record.metrics.items():
            assert float(line[name]) == metric.value
            assert line[f"{name}_n"] == str(metric.n)
            low = line[f"{name}_low"]
            assert metric.low is None if low == "" else float(low) == metric.low
    assert lines[2]["token_counts"] == " ".join(["1"] * 16)
    assert json.loads(lines[-1]["training"]) == {"recipe": "digits", "seconds": 372.25}
    assert lines[-1]["dirty"] == "true"
    assert lines[5]["recall"] == ""
    assert not any("Quoted" in value for line in lines for value in line.values())


def test_csv_columns_are_those_of_the_frame(study: Report) -> None:
    header = report_csv(study).splitlines()[0].split(",")
    assert header[4 : 4 + len(ROW_COLUMNS)] == list(ROW_COLUMNS)
    assert len(header) == len(set(header))


def test_hostile_text_does_nothing_in_csv(hostile: Report) -> None:
    text = report_csv(hostile)
    lines = read(text)
    assert text.count("\n") == len(lines) + 1 == 3
    assert all(None not in line and None not in line.values() for line in lines)
    assert len(text) < 40_000
    ablation = report_csv(dataclasses.replace(hostile, ablation=True))
    assert ablation.count("\n") == len(read(ablation)) + 1 == 2


def test_no_cell_is_a_formula(make_record: RecordMaker, collected: Callable[..., Report]) -> None:
    formulas = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " \r\n=1", "\uff1d1"]
    records = [make_record(name, number=i) for i, name in enumerate(formulas)]
    lines = read(report_csv(collected(records)))
    assert sorted(line["method"] for line in lines) == sorted(
        "'" + name.strip() for name in formulas
    )
    assert read(report_csv(collected([make_record(metrics={"fid": -0.5})])))[0]["fid"] == "-0.5"


def test_json_holds_the_records_as_they_are(study: Report) -> None:
    content = json.loads(report_json(study), parse_constant=refuse)
    (found,) = content["protocols"]
    assert found["metrics"] == [metric.name for metric in study.protocols[0].protocol.metrics]
    for record, row, written in zip(
        study.protocols[0].records, found["rows"], found["records"], strict=True
    ):
        assert written == json.loads(record_to_json(record))
        assert record_from_json(json.dumps(written), source="report") == record
        assert row["method"] == record.method.name
        assert row["fid"] == record.metrics["fid"].value
    assert [one["kind"] for one in found["excluded"]] == ["replaced", "other protocol"]
    assert [row["value"] for row in found["quoted"]] == ["6.90", "6.60", "224.07", "7.1"]
    assert content["problems"] == list(study.problems)


def test_hostile_text_does_nothing_in_json(hostile: Report, words: str) -> None:
    text = report_json(hostile)
    assert text.isascii()
    content = json.loads(text, parse_constant=refuse)
    assert content["protocols"][0]["records"][0]["method"]["name"] == words


def refuse(constant: str) -> Any:
    raise AssertionError(constant)
