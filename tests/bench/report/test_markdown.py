"""The report: a fixed set of records against its Markdown, line by line, and hostile input."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from bench.protocol import Protocol
from bench.records.record import ProtocolInfo, ResultRecord
from bench.report import PublishedRow, Report, collect_report, results_frame
from bench.report.markdown import code, report_markdown, section_markdown, text
from bench.report.table import best_and_second, latest

RecordMaker = Callable[..., ResultRecord]
HERE = Path(__file__).parent


def markdown_of(
    records: list[ResultRecord],
    problems: list[str],
    published: list[PublishedRow],
    *,
    protocol: Protocol,
) -> str:
    folder = Path("results")
    report = collect_report(
        records, problems, published, protocols=[protocol], folder=folder, settings=True
    )
    return report_markdown(report)


def test_the_report_is_the_expected_one_line_by_line(study: Report) -> None:
    report = report_markdown(study)
    expected = (HERE / "expected.md").read_text(encoding="utf-8")
    for number, (found, wanted) in enumerate(
        zip(report.splitlines(), expected.splitlines(), strict=False), 1
    ):
        assert found == wanted, f"line {number}"
    assert report == expected


def test_the_order_of_records_does_not_matter(
    records: list[ResultRecord], protocol: Protocol
) -> None:
    report = markdown_of(records, [], [], protocol=protocol)
    assert markdown_of(records[::-1], [], [], protocol=protocol) == report


def test_in_a_page_the_settings_are_folded_away(study: Report) -> None:
    before, folded = section_markdown(study).split(
        "<details><summary>Settings of each row</summary>\n\n"
    )
    assert folded.startswith("| Method ")
    settings = folded.removesuffix("</details>\n")
    assert settings.endswith("- <sup>3</sup> Training: recipe digits, seconds 372.25.\n\n")
    assert f"{before}### Settings of each row\n\n{settings}" in report_markdown(study)


def test_settings_are_shown_on_request(study: Report) -> None:
    shown, short = (
        report_markdown(dataclasses.replace(study, settings=settings)) for settings in (True, False)
    )
    before, _, rest = shown.partition("### Settings of each row")
    assert short == before + rest[rest.index("## Quoted results") :]
    assert "Training" not in short
    assert "lowest FID on seed 2000" in short  # the settings of these rows were tuned


def test_rows_that_differ_from_most_have_footnotes(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    records = [
        make_record("A", selected_by="default"),
        make_record("B", number=2, selected_by="default", n=1797, device="GPU"),
        make_record("C", number=3, selected_by="lowest FID on seed 2000", device="GPU"),
        make_record("D", number=4, selected_by="default"),
        make_record("E", number=5, selected_by="default"),
    ]
    report = markdown_of(records, [], [], protocol=protocol)
    names = re.findall(r"^\| ([A-E]\S*) ", report.partition("### Settings")[0], re.M)
    assert names == ["A", "B<sup>1,2</sup>", "C<sup>3,2</sup>", "D", "E"]
    for note in (
        "<sup>1</sup> N = 1,797.",
        "<sup>2</sup> images/s on GPU, batch 64.",
        "<sup>3</sup> Settings tuned: lowest FID on seed 2000.",
        "images/s on CPU, 2 cores, batch 64.",
        "Every row at commit 0123456789ab.",
    ):
        assert report.count(f"- {note}\n") == 1


def test_a_name_stands_once_above_equal_ones(make_record: RecordMaker, protocol: Protocol) -> None:
    records = [
        make_record("A", number=1, num_steps=8),
        make_record("A", number=2, num_steps=4, guidance_scale=1.0),
        make_record("A", number=3, num_steps=4, guidance_scale=2.0),
        make_record("A", number=4, num_steps=2),
        make_record("A", number=5, num_steps=1),
        make_record("A", number=6, num_steps=1, section="Distill."),
    ]
    report = markdown_of(records, [], [], protocol=protocol).partition("### Settings")[0]
    names = [line[2:].partition(" |")[0].strip() for line in report.splitlines() if "0.500" in line]
    assert names == ["A", "(s=1)", "(s=2)", "A", "", "A"]
    assert "- s: guidance scale.\n" in report
    assert report.count("- Settings tuned: lowest FID on seed 2000.\n") == 1  # of every row


def test_an_empty_folder_says_what_to_do(make_record: RecordMaker, protocol: Protocol) -> None:
    report = markdown_of([], [], [], protocol=protocol)
    assert "No results under protocol `handwriting`, version 1" in report
    assert "- `dimo bench --protocol handwriting --teacher TEACHER`" in report
    foreign = make_record(protocol=ProtocolInfo("digits", 1, "ef" * 32))
    report = markdown_of([foreign], [], [], protocol=protocol)
    assert "- Not shown: 1 result measured under another protocol: `digits`, version 1" in report


def test_the_frame_has_plain_numbers(records: list[ResultRecord]) -> None:
    frame = results_frame([r for r in records if r.method.name != "Alien"], ["fid", "coverage"])
    assert list(frame["section"].unique()) == ["Reference", "Teacher", "Sampler", "Distill."]
    assert list(frame.loc[frame["section"] == "Teacher", "num_steps"]) == [16, 4, 1]
    assert frame["fid"].dtype == frame["coverage_high"].dtype == float
    row = frame.set_index("method").loc["theta-trapezoidal"]
    assert row["fid"] == 0.3124
    assert pd.isna(row["fid_low"])
    assert pd.isna(row["coverage"])
    assert row["fid_n"] == 5000


def test_a_newer_result_replaces_one_of_the_same_settings_only(make_record: RecordMaker) -> None:
    old, new = make_record(number=1), make_record(number=2)
    others = [
        make_record(number=3, guidance_scale=3.0),
        make_record(number=4, weights_sha256="ef" * 32),
        make_record(number=5, seed=1001),
        make_record(number=6, num_steps=8),
    ]
    assert latest([new, old, *others]) == [new, *others]


def test_rows_of_one_name_are_told_apart_by_what_differs(make_record: RecordMaker) -> None:
    rows = [
        make_record(number=1, guidance_scale=1.0),
        make_record(number=2, guidance_scale=2.0),
        make_record(number=3, guidance_scale=2.0, weights_sha256="ef" * 32),
        make_record(number=4, num_steps=8),
    ]
    assert list(results_frame(rows, ["fid"])["method"]) == [
        "MaskGIT",
        "MaskGIT (guidance 1, weights abababab)",
        "MaskGIT (guidance 2, weights abababab)",
        "MaskGIT (guidance 2, weights efefefef)",
    ]


def test_places_follow_what_is_shown() -> None:
    values = pd.Series([0.2121, 0.2119, 0.25, None, 0.3])
    lower = best_and_second(values, higher_is_better=False, decimals=3)
    assert list(lower) == [1, 1, 2, 0, 0]
    higher = best_and_second(values, higher_is_better=True, decimals=1)
    assert list(higher) == [2, 2, 2, 0, 1]
    assert list(best_and_second(values, higher_is_better=True, decimals=3)) == [0, 0, 2, 0, 1]


def test_nothing_is_the_best_of_one() -> None:
    for values in ([0.3], [None, 0.3]):
        places = best_and_second(pd.Series(values), higher_is_better=True, decimals=3)
        assert not places.any()


def test_hostile_text_is_shown_and_does_nothing(hostile: Report) -> None:
    for ablation, expected_tables, expected_headings in ((False, 3, 5), (True, 1, 3)):
        report = report_markdown(dataclasses.replace(hostile, ablation=ablation))
        assert len(report) < 25_000
        assert not re.search("[\u2028\u202e\x00\x1b\r]", report)

        markdown = MarkdownIt("gfm-like", {"linkify": False, "html": True})
        tokens = list(flattened(markdown.parse(report)))
        raw = {token.content for token in tokens if token.type in ("html_inline", "html_block")}
        assert raw <= {"<ins>", "</ins>", "<span>", "</span>", "<sup>", "</sup>"}
        kinds = [token.type for token in tokens]
        assert not {*kinds} & {"link_open", "image", "s_open", "fence", "code_block", "hr"}
        assert kinds.count("heading_open") == expected_headings
        tables = [block for block in report.split("\n\n") if block.startswith("|")]
        assert kinds.count("table_open") == len(tables) == expected_tables
        for table in tables:
            bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(bars) == 1


def test_rows_are_told_apart_by_schedule_and_counts(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    records = [
        make_record("A", num_steps=2, token_counts=(85, 171)),
        make_record(
            "A", number=2, num_steps=2, token_counts=(1, 255), mask_schedule="arccos-v1"
        ),
        make_record("B", number=3, num_steps=8, token_counts=(20, 21, 22, 22, 25, 28, 36, 82)),
        make_record(
            "B", number=4, num_steps=8, mask_schedule="arccos-v1",
            token_counts=(1, 18, 26, 32, 38, 43, 48, 50),
        ),
    ]  # fmt: skip
    assert list(results_frame(records, [])["method"]) == [
        "A (schedule arccos: 85 + 171 tokens)",
        "A (schedule arccos-v1: 1 + 255 tokens)",
        "B (schedule arccos: 20 + 21 + … + 82 tokens)",
        "B (schedule arccos-v1: 1 + 18 + … + 50 tokens)",
    ]
    report = markdown_of(records, [], [], protocol=protocol)
    assert report.count("| (schedule arccos-v1: 1 + 255 tokens)") == 2


def test_settings_that_no_row_has_get_no_column(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    columns = ("Final temp.", "Theta", "Random start", "Top-k", "Top-p", "Network in")
    plain = markdown_of([make_record()], [], [], protocol=protocol)
    assert not any(f"| {column} " in plain for column in columns)
    every = make_record(
        final_temperature=0.8, theta=0.4, random_start=True, top_k=7, top_p=0.9,
        network_precision="bfloat16",
    )  # fmt: skip
    report = markdown_of([every, make_record(number=2)], [], [], protocol=protocol)
    assert all(f" {column} " in report for column in columns)
    line = next(line for line in report.splitlines() if "00000001" in line)
    values = [part.strip() for part in line.split(" | ")]
    assert values[8:14] == ["0.8", "yes", "0.4", "7", "0.9", "bfloat16"]


def test_a_record_from_before_theta_was_named_is_replaced_by_one_that_names_it(
    make_record: RecordMaker,
) -> None:
    old = make_record(sampler="theta_trapezoidal")
    same = make_record(sampler="theta_trapezoidal", number=2, theta=0.5)
    other = make_record(sampler="theta_trapezoidal", number=3, theta=0.3)
    assert latest([old, same, other]) == [same, other]
    assert list(results_frame([old, other], [])["method"]) == [
        "MaskGIT (theta 0.5)",
        "MaskGIT (theta 0.3)",
    ]


def test_what_is_unknown_of_a_training_is_said(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    record = make_record(training={"recipe": "of its authors", "seconds": None, "seed": None})
    report = markdown_of([record], [], [], protocol=protocol)
    assert "recipe of its authors, seconds unknown, seed unknown" in report


def flattened(tokens: list[Any]) -> Any:
    for token in tokens:
        yield token
        yield from flattened(token.children or [])


def test_text_reads_as_it_was_written() -> None:
    markdown = MarkdownIt("gfm-like", {"linkify": False})
    for words in ("Di[M]O", "a_b_c _d_", "x < y & z", "50% | 2 * 3 \\ 4", "~8 `q`", "{0.8, 1}"):
        shown = markdown.renderInline(text(words))
        assert shown == words.replace("&", "&amp;").replace("<", "&lt;")
    assert text("Di[M]O") == "Di[M]O"  # plain in a terminal, too
    assert text("guidance_scale in {1, 2}") == "guidance_scale in {1, 2}"


def test_github_makes_no_link_and_no_formula() -> None:
    # GitHub does both on bare text, which the renderer used here does not.
    for words in ("see http://x.test", "HTTPS://x.test", "(www.x.test)", "$x$", "$$x$$"):
        shown = text(words)
        assert not re.search(r"(?i)https?:|www\.|(?<!<span>)\$", shown)
        assert re.sub("</?span>", "", shown) == words


@pytest.mark.parametrize("words", ["plain", "a`b", "``", "`", "a```b``c", "<b>"])
def test_code_spans_hold_any_text(words: str) -> None:
    shown = MarkdownIt("gfm-like", {"linkify": False}).renderInline(code(words))
    assert shown == f"<code>{words.replace('<', '&lt;').replace('>', '&gt;')}</code>"


def test_tables_line_up_in_a_terminal(
    records: list[ResultRecord], published: list[PublishedRow], protocol: Protocol
) -> None:
    report = markdown_of(records, [], published, protocol=protocol)
    for block in report.split("\n\n"):
        if block.startswith("|"):
            lengths = {len(line) for line in block.splitlines()}
            assert len(lengths) == 1
