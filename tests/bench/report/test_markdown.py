"""The report: a fixed set of records against its Markdown, line by line, and hostile input."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from bench.paths import data_dir
from bench.protocol import Protocol, load_protocol
from bench.record import ProtocolInfo, ResultRecord
from bench.report import PublishedRow, collect_report, load_published, results_frame
from bench.report.markdown import code, report_markdown, text
from bench.report.published import published_frame
from bench.report.table import best_and_second, latest
from dimo.errors import DimoError

RecordMaker = Callable[..., ResultRecord]
HERE = Path(__file__).parent
NAMES = ("fid", "inception_score", "precision", "recall", "density", "coverage", "class_accuracy")
NO_SETTINGS: dict[str, Any] = {
    "section": "Reference",
    "sampler": None,
    "num_steps": None,
    "nfe": None,
    "mask_schedule": None,
    "token_counts": None,
    "guidance_scale": None,
    "temperature": None,
    "choice_temperature": None,
    "selected_by": "nothing to select",
    "weights_sha256": None,
    "images_per_second": None,
    "batch_size": None,
    "n": 1797,
}
STUDENT: dict[str, Any] = {
    "section": "Distill.",
    "sampler": "one_step",
    "num_steps": 1,
    "nfe": 1,
    "mask_schedule": None,
    "token_counts": (16,),
    "guidance_scale": None,
    "choice_temperature": None,
    "temperature": 0.8,
    "weights_sha256": "cd" * 32,
}


def markdown_of(
    records: list[ResultRecord],
    problems: list[str],
    published: list[PublishedRow],
    *,
    protocol: Protocol,
) -> str:
    report = collect_report(
        records, problems, published, protocols=[protocol], folder=Path("results")
    )
    return report_markdown(report)


def metrics(*values: float) -> dict[str, tuple[float, float, float]]:
    """Values in the order of the protocol, each with an interval of a tenth of it, skewed."""
    named = zip(NAMES, values, strict=True)
    return {
        name: (value, value - abs(value) * 0.04, value + abs(value) * 0.06) for name, value in named
    }


@pytest.fixture
def records(make_record: RecordMaker) -> list[ResultRecord]:
    """The rows of a small study, and some that must not be in its table."""
    by_fid = "lowest FID on seed 2000, 2000 images, over guidance_scale in {1, 2}."
    study = [
        make_record("Real data", metrics=metrics(-1e-13, 9.8, 1, 1, 1, 1, 1), **NO_SETTINGS),
        make_record(
            "Tokenizer", number=2, metrics=metrics(0.17, 9.6, 0.98, 0.97, 0.96, 0.97, 0.99),
            **NO_SETTINGS,
        ),
        make_record(
            "Di[M]O", number=9, metrics=metrics(0.312, 9.44, 0.95, 0.79, 1.01, 0.94, 0.991),
            images_per_second=21234.5, dirty=True, training={"recipe": "digits", "seconds": 372.25},
            selected_by="lowest FID on seed 2000, 2000 images, over temperature in {0.8, 1}",
            **STUDENT,
        ),
        make_record(
            "theta-trapezoidal", number=8, section="Sampler", sampler="theta_trapezoidal",
            num_steps=8, nfe=16, metrics={"fid": 0.3124}, images_per_second=None, selected_by="",
        ),
    ]  # fmt: skip
    teacher = [
        (16, (1,) * 16, 0.212, 9.55, 0.93, 0.88, 0.95, 0.94, 0.985),
        (4, (1, 3, 3, 9), 0.541, 9.2, 0.87, 0.82, 0.8, 0.88, 0.96),
        (1, (16,), 3.59, 6.6, 0.56, 0.5, 0.33, 0.44, 0.77),
    ]
    for number, (steps, counts, *values) in enumerate(teacher, 3):
        study.append(
            make_record(
                "MaskGIT", number=number, num_steps=steps, nfe=2 * steps, token_counts=counts,
                metrics=metrics(*values), images_per_second=12345.6 / steps, selected_by=by_fid,
            )
        )  # fmt: skip
    replaced = make_record("MaskGIT", num_steps=16, nfe=32, metrics=metrics(*[0.9] * 7))
    foreign = make_record("Alien", number=30, protocol=ProtocolInfo("old | er", 7, "ef" * 32))
    return [*study, replaced, foreign]


PUBLISHED = """\
benchmark,section,method,teacher,steps,metric,value,source,location,certainty,note
imagenet256-c2i,Distill.,Di[M]O,maskgit,1,fid,6.90,arXiv:2503.15457,table 1,read,
imagenet256-c2i,Teacher,MaskGit,maskgit,16,fid,6.60,arXiv:2503.15457,table 1,read,
imagenet256-c2i,Teacher,MaskGit,maskgit,16,inception_score,224.07,arXiv:2503.15457,table 1,read,
imagenet256-c2i,Sampler,trapezoidal,maskgit,,fid,7.1,arXiv:2503.15457,plot,second-hand,a note
unquoted,Teacher,Other,,,fid,1.0,arXiv:2503.15457,table 9,read,
"""


@pytest.fixture
def published(tmp_path: Path) -> list[PublishedRow]:
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED, encoding="utf-8")
    return load_published(path)


def test_the_report_is_the_expected_one_line_by_line(
    records: list[ResultRecord], published: list[PublishedRow], protocol: Protocol
) -> None:
    problems = ["results/a.json: not valid JSON `here`; remove it", "results/b.json: edited"]
    report = markdown_of(records, problems, published, protocol=protocol)
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


def test_an_empty_folder_says_what_to_do(make_record: RecordMaker, protocol: Protocol) -> None:
    report = markdown_of([], [], [], protocol=protocol)
    assert "No results under protocol `handwriting`, version 1" in report
    assert "make them with `dimo bench`" in report
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


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b || c",
    "two\nlines\r\nthree\u2028four",
    "[click](javascript:alert(1)) ![x](http://x.test/y.png) [a][b] <http://x.test>",
    "http://x.test/ www.x.test ftp://x.test",
    "**bold** __bold__ *a* _a_ ~~gone~~ `code` ``",
    "back\\slash \\| \\",
    "$x^2$ $$y$$ & &amp; &lt;",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \x00\x1b[31m",
    "# heading",
    "- item",
    "---",
    "x" * 10_000,
    "\u96ea" * 10_000,
]


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(
    make_record: RecordMaker, protocol: Protocol, words: str
) -> None:
    first = make_record(
        words,
        section="Distill.",
        sampler=words,
        mask_schedule=words,
        selected_by=words,
        device=words,
        training={"recipe": words, words: "x"},
        protocol=make_record().protocol,
    )
    second = make_record(words, number=2, section="Distill.", device="other", teacher=words)
    foreign = make_record(number=3, protocol=ProtocolInfo(words, 1, words))
    quoted = PublishedRow(
        "imagenet256-c2i", "Teacher", words, words, 1, "fid", "1.0", words, words, words, words
    )
    report = markdown_of([first, second, foreign], [words], [quoted], protocol=protocol)
    assert len(report) < 25_000
    assert not re.search("[\u2028\u202e\x00\x1b\r]", report)

    markdown = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    tokens = list(flattened(markdown.parse(report)))
    raw = {token.content for token in tokens if token.type in ("html_inline", "html_block")}
    assert raw <= {"<ins>", "</ins>", "<span>", "</span>"}
    kinds = {token.type for token in tokens}
    assert not kinds & {"link_open", "image", "s_open", "fence", "code_block", "hr"}
    headings = [i for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 5
    tables = [block for block in report.split("\n\n") if block.startswith("|")]
    assert [token.type for token in tokens].count("table_open") == len(tables) == 3
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
    assert report.count("| A (schedule arccos-v1: 1 + 255 tokens) ") == 2


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
    assert values[8:14] == ["0.8", "0.4", "yes", "7", "0.9", "bfloat16"]


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


def test_two_thousand_records_take_moments(make_record: RecordMaker, protocol: Protocol) -> None:
    records = [make_record(number=i, num_steps=1 + i % 700, seed=i % 3) for i in range(2000)]
    start = time.process_time()
    report = markdown_of(records, [], [], protocol=protocol)
    assert time.process_time() - start < 3
    assert report.count("| MaskGIT (seed") == 2 * 2000


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
    report = markdown_of([], [], rows, protocol=load_protocol("digits"))
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
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in PUBLISHED
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DimoError, match=re.escape(said)) as caught:
        load_published(path)
    assert "\n" not in str(caught.value)


def test_no_quoted_numbers(tmp_path: Path) -> None:
    with pytest.raises(DimoError, match=r"nowhere\.csv: cannot be read"):
        load_published(tmp_path / "nowhere.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DimoError, match="the first line must be"):
        load_published(tmp_path / "empty.csv")
