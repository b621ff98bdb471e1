"""GenEval's verdicts on the page, its caption, and what its tables call the tags."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.images.codec import encode_png
from bench.protocol import load_protocol, protocol_sha256
from bench.records.record import ProtocolInfo, ResultRecord, seal
from bench.records.store import append, load_all
from bench.report import Report, collect_report, report_latex, report_markdown
from bench.report.html import render_page
from bench.report.html.pictures import row_verdicts
from bench.report.notes import _network_rules
from bench.suites.geneval.sheet import chosen, draw_sheet, thumbnail

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>",
    "two\nlines\r\nthree\u2028four",
    "\u202eright to left\u202c \x00\x1b[31m",
    "{{ 7 * 7 }} {% raw %}",
    "x" * 10_000,
)
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@pytest.fixture
def record(make_record: Callable[..., ResultRecord]) -> ResultRecord:
    protocol = load_protocol("scenes-geneval")
    info = ProtocolInfo(protocol.name, protocol.version, protocol_sha256(protocol))
    values = {f"geneval_{tag}": (0.7, 0.6, 0.8) for tag in TAGS}
    made = make_record(protocol=info, n=160, metrics={"geneval": (0.7, 0.68, 0.72), **values})
    overall = dataclasses.replace(made.metrics["geneval"], n=960)
    return seal(dataclasses.replace(made, metrics=made.metrics | {"geneval": overall}))


def report_of(records: list[ResultRecord], folder: Path) -> Report:
    protocols = [load_protocol("scenes-geneval")]
    return collect_report(records, [], [], protocols=protocols, folder=folder)


def row(number: int, **changes: object) -> dict[str, object]:
    tag = TAGS[number // 160]
    return {
        "filename": f"{number // 4:05d}/samples/{number % 4:04d}.png",
        "tag": tag,
        "prompt": f"a photo of prompt {number // 4}",
        "correct": number % 3 > 0,
        "reason": "" if number % 3 else f"expected cat>=1, found 0 ({number})",
        "metadata": "{}",
        "details": "{}",
        **changes,
    }


def keep(
    record: ResultRecord, folder: Path, rows: list[dict[str, object]], sheet: bytes = b""
) -> None:
    file = folder / "verdicts" / f"{record.run_id}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in rows))
    if sheet:
        file.with_suffix(".png").write_bytes(sheet)


def test_as_many_of_each_tag_evenly() -> None:
    tags = [TAGS[number // 160] for number in range(960)]
    rows = chosen(tags)
    assert len(rows) == 60
    assert rows[:11] == [0, 17, 34, 51, 68, 85, 102, 119, 136, 153, 160]
    assert chosen(["a", "b", "a"]) == [0, 2, 1]
    assert chosen([]) == []


def test_verdicts_and_their_pictures_stand_in_their_row(
    record: ResultRecord, tmp_path: Path
) -> None:
    rows = [row(number) for number in range(960)]
    pixels = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), dtype=np.uint8)
    names = [str(rows[i]["filename"]) for i in chosen([str(line["tag"]) for line in rows])]
    sheet = draw_sheet({name: thumbnail(p) for name, p in zip(names, pixels, strict=True)})
    keep(record, tmp_path, rows, sheet)
    append(record, tmp_path)
    records, problems = load_all(tmp_path)
    assert not problems  # the folder of verdicts is none of the records
    page = render_page(report_of(records, tmp_path))
    assert page.count('<li><svg class="tile"') == 60
    assert page.count('<use href="#v') == 60
    assert page.count("<image id=") == 1
    assert "Single 106 of 160, Two 107 of 160" in page
    assert "a photo of prompt 4<" in page
    assert "expected cat&gt;=1, found 0 (51)" in page
    assert 'aria-label="00004/samples/0001.png" viewBox="32 0 32 32"' in page


def test_large_pictures_become_small() -> None:
    pixels = np.zeros((512, 256, 3), np.uint8)
    pixels[:256] = 200
    small = thumbnail(pixels)
    assert small.shape == (64, 32, 3)
    assert (small[:32] == 200).all()
    assert not small[32:].any()
    assert thumbnail(pixels[:20, :30]).shape == (20, 30, 3)


@pytest.mark.parametrize(
    "lines",
    [
        ["{"],
        ["[1]"],
        [json.dumps(row(0, correct="yes"))],
        [json.dumps(row(0, prompt=None))],
        ["[" * 100_000],
        [],
    ],
    ids=["no JSON", "a list", "no bool", "no text", "deep", "empty"],
)
def test_damaged_files_are_not_shown(
    record: ResultRecord, tmp_path: Path, lines: list[str]
) -> None:
    keep(record, tmp_path, [])
    file = tmp_path / "verdicts" / f"{record.run_id}.jsonl"
    file.write_text("\n".join(lines))
    assert row_verdicts([record], tmp_path) == {}
    assert "Verdicts of" not in render_page(report_of([record], tmp_path))


@pytest.mark.parametrize(
    "told",
    [
        {"side": 0, "columns": 10, "files": ["a"]},
        {"side": 999, "columns": 10, "files": ["a"]},
        {"side": 8, "columns": 0, "files": ["a"]},
        {"side": 8, "columns": 10, "files": 3},
        [],
    ],
    ids=str,
)
def test_damaged_sheets_are_not_shown(record: ResultRecord, tmp_path: Path, told: object) -> None:
    sheet = encode_png(np.zeros((8, 80, 3), np.uint8), text=json.dumps(told))
    keep(record, tmp_path, [row(0)], sheet)
    page = render_page(report_of([record], tmp_path))
    assert "a photo of prompt 0" in page
    assert "<image" not in page


def test_hostile_verdicts_do_nothing(record: ResultRecord, tmp_path: Path) -> None:
    rows = []
    for number, words in enumerate(HOSTILE):
        hostile = {"filename": words, "tag": words, "prompt": words, "reason": words}
        rows += [row(0, correct=False, **hostile), row(3, tag=f"{number} {words}")]
    rows += [row(3, tag=str(number)) for number in range(300)]
    keep(record, tmp_path, rows)
    page = render_page(report_of([record], tmp_path))
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert page.count("<li><div><b>") == 120
    assert not re.search("[\u202a-\u202e\x00-\x08\x0b-\x1f]", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "x" * 500 not in page
    page.encode()


def test_the_caption_names_detector_and_prompts(record: ResultRecord, tmp_path: Path) -> None:
    report = report_of([record], tmp_path)
    for form in (report_markdown, report_latex, render_page):
        text = " ".join(form(report).split())
        for said in ("Single", "Attribution", "960 images a row", "240 prompts", "100.00"):
            assert said in text, form
        assert "resamples of the prompts" in text
        assert "N = 160" not in text
    markdown = report_markdown(report)
    assert "N = 960 images a row, 4 for each of 240 prompts of `scenes-held-out`" in markdown
    assert "objects by `scenes-detector`, right on 100.00% of known images" in markdown
    assert "features of `scenes-clip`" in markdown
    assert "reference `scenes-held-out`, 4,800 images" in markdown


def test_the_caption_names_only_what_a_protocol_has() -> None:
    rules = repr(list(_network_rules(load_protocol("geneval"))))
    assert "objects by" in rules
    assert not any(said in rules for said in ("features of", "reference", "scores of"))
