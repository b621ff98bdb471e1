"""Quoted numbers: the shipped file, the paper's table in its form, and lines that are wrong."""

import dataclasses
import re
from pathlib import Path

import pytest

from bench.protocol import Protocol, load_protocol
from bench.protocol.catalog import data_dir
from bench.report import collect_report, load_published
from bench.report.markdown import report_markdown
from bench.report.quoted import QUOTED_TITLES, published_frame, quoted_beside, quoted_tables
from bench.report.table import MISSING
from dimo.errors import DimoError


def quoted_report(protocol: str) -> str:
    rows = load_published(data_dir("published") / "published.csv")
    report = collect_report([], [], rows, protocols=[load_protocol(protocol)], folder=Path())
    return report_markdown(report)


def test_the_papers_table_line_by_line(golden: Path) -> None:
    """Form of table 1 of arXiv 2503.15457, numbers as `published.csv` has them."""
    report = quoted_report("imagenet256-adm")
    begin = report.index("### Quoted: ImageNet 256 x 256, class-conditional\n")
    found = report[begin : report.index("### Quoted: ImageNet 256 x 256, class-conditional, as")]
    expected = (golden / "dimo_table1.md").read_text(encoding="utf-8")
    for number, (line, wanted) in enumerate(
        zip(found.splitlines(), expected.splitlines(), strict=False), 1
    ):
        assert line == wanted, f"line {number}"
    assert found.strip() == expected.strip()


def test_every_shipped_number_is_in_its_table() -> None:
    rows = load_published(data_dir("published") / "published.csv")
    assert {row.benchmark for row in rows} == set(QUOTED_TITLES)
    _, *tables = quoted_tables(rows)
    for table, benchmark in zip(tables, QUOTED_TITLES, strict=True):
        first = table.header.index("Steps (↓)") + 1
        pieces = [piece for row in table.rows for (piece,) in row[first:-1]]
        shown = [piece if isinstance(piece, str) else piece.text for piece in pieces]
        expected = [row.value for row in rows if row.benchmark == benchmark]
        assert sorted(value for value in shown if value != MISSING) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "benchmarks"),
    [
        ("imagenet256-clean", {"imagenet256-c2i", "imagenet256-c2i-redi", "imagenet256-c2i-other"}),
        ("geneval", {"geneval"}),
        ("hpsv2-photo", {"hpsv2-v2.0"}),
        ("digits", {"imagenet256-c2i", "imagenet256-c2i-redi", "imagenet256-c2i-other"}),
    ],
)
def test_what_is_quoted_follows_the_data(
    name: str, benchmarks: set[str], protocol: Protocol
) -> None:
    rows = load_published(data_dir("published") / "published.csv")
    beside = quoted_beside(rows, dataclasses.replace(protocol, name=name))
    assert {row.benchmark for row in beside} == benchmarks


def test_the_shipped_numbers_are_quoted_with_their_digits() -> None:
    rows = load_published(data_dir("published") / "published.csv")
    frame = published_frame(rows, "imagenet256-c2i")
    assert list(frame["section"].unique()) == ["Teacher", "Sampler", "Distill."]
    assert list(frame.loc[frame["section"] == "Teacher", "steps"]) == [16, 8, 4, 2]
    student = frame[frame["method"] == "Di[M]O"].iloc[0]
    assert (student["fid"], student["inception_score"], student["coverage"]) == (
        "6.91",
        "214.0",
        "0.967",
    )
    assert frame["source"].str.startswith("arXiv:").all()
    report = quoted_report("digits")
    assert report.count("### Quoted: ImageNet") == 3
    second_hand = [row for row in rows if row.benchmark == "imagenet256-c2i-other"]
    assert second_hand
    assert report.count(" † ") == len(published_frame(rows, "imagenet256-c2i-other")) + 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("benchmark,section", "section,benchmark", "the first line must be benchmark,section,"),
        (",6.90,", ",6.9x,", "line 2: 'value' must be a number, not '6.9x'"),
        (",6.90,", ",nan,", "line 2: 'value' must be a number, not 'nan'"),
        (",16,fid", ",0,fid", "line 3: 'steps' must be 1 or more, or empty"),
        ("Distill.", "Distilled", "line 2: 'section' must be one of Teacher, Sampler, Distill., O"),
        ("table 1,read,\n", "table 1,read\n", "line 2 has 10 fields, not 11"),
        ("table 1,read,", "table 1,,", "line 2: 'certainty' is empty"),
        ("inception_score", "fid", "line 4 gives the number of line 3 again"),
        ("table 9", '"table 9', "cannot be read"),
    ],
)
def test_a_bad_line_of_quoted_numbers_is_named(
    tmp_path: Path, published_text: str, old: str, new: str, said: str
) -> None:
    assert old in published_text
    path = tmp_path / "published.csv"
    path.write_text(published_text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DimoError, match=re.escape(said)) as caught:
        load_published(path)
    assert "\n" not in str(caught.value)


def test_no_quoted_numbers(tmp_path: Path) -> None:
    with pytest.raises(DimoError, match=r"nowhere\.csv: cannot be read"):
        load_published(tmp_path / "nowhere.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DimoError, match="the first line must be"):
        load_published(tmp_path / "empty.csv")
