"""The report as text for a terminal: it lines up, and it is narrow."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.records.record import ResultRecord
from bench.report import Report, report_plain
from bench.report.text import display_width

RecordMaker = Callable[..., ResultRecord]
SEVEN = dict.fromkeys(
    ("fid", "inception_score", "precision", "recall", "density", "coverage", "class_accuracy"),
    (0.512, 0.487, 0.537),
)


def test_the_report_is_the_expected_one_line_by_line(study: Report) -> None:
    shown = report_plain(dataclasses.replace(study, settings=False))
    expected = (Path(__file__).parent / "expected.txt").read_text(encoding="utf-8")
    for number, (found, wanted) in enumerate(
        zip(shown.splitlines(), expected.splitlines(), strict=False), 1
    ):
        assert found == wanted, f"line {number}"
    assert shown == expected


@pytest.fixture
def table(collected: Callable[..., Report]) -> Callable[..., list[str]]:
    """`table(records)`: the lines of the first table."""

    def lines(records: list[ResultRecord]) -> list[str]:
        return report_plain(collected(records)).split("\n\n")[1].splitlines()

    return lines


def test_a_long_name_continues_below_itself(
    make_record: RecordMaker, table: Callable[..., list[str]]
) -> None:
    name = "Di[M]O (a-student-of-a-long-name and-another-word)"
    records = [make_record(name, number=n, num_steps=n, metrics=SEVEN) for n in (4, 2, 1)]
    parts = ["Di[M]O", "(a-student-of-a-long-name", "and-another-word)"]
    shown = table(records)
    assert [line.split()[:2] for line in shown[-3:]] == [
        [part, steps] for part, steps in zip(parts, "421", strict=True)
    ]
    assert max(map(len, shown)) <= 100
    alone = table(records[:1])
    assert [line.split()[0] for line in alone[-3:]] == parts


def test_a_wide_table_keeps_the_intervals_of_its_first_metric(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    note = "- Intervals of the other columns: `dimo report --format markdown`."
    two = {name: SEVEN[name] for name in ("fid", "recall")}
    narrow = report_plain(collected([make_record(metrics=two)]))
    assert re.findall(r"0\.5\S+", narrow.splitlines()[6]) == ["0.512±.025", "0.512±.025"]
    assert note not in narrow
    wide = report_plain(collected([make_record("Di[M]O (digits-dimo)", metrics=SEVEN)]))
    found = re.findall(r"0\.5\S+", wide.splitlines()[6])
    assert found == ["0.512±.025", "0.51", *["0.512"] * 5]
    assert note in wide


def test_hostile_text_is_shown_and_does_nothing(hostile: Report) -> None:
    for ablation in (False, True):
        shown = report_plain(dataclasses.replace(hostile, ablation=ablation))
        assert len(shown) < 30_000
        assert not re.search("[\u2028\u202e\x00\x1b\r]", shown)
        for block in shown.split("\n\n"):
            rules = {display_width(line) for line in block.splitlines() if line.startswith("-- ")}
            assert len(rules) <= 1
