"""The page as text: whole, escaped and without anything from elsewhere. How it looks and works in
a browser is tested in `tests/browser`.
"""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.images.codec import encode_png
from bench.report import Report
from bench.report.html import render_page
from bench.report.text import one_line

VOID = {"meta", "input", "img", "br"}
TAGS = """
a b body code dd details div dl dt figcaption figure footer h1 h2 h3 h4 head header html i input
label li link main meta nav p pre s script section small span strong style summary table tbody td th
thead title tr u ul sup svg g path use text defs clippath rect
"""
IMPLIED = {"td", "th", "tr", "dt", "dd"}  # HTML lets these end by themselves


class Reader(HTMLParser):
    """Tags and attributes of a page, and its texts; complains of an end that opens nothing."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag:
            assert self.open.pop() in IMPLIED, (tag, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def allowed() -> set[str]:
    """Attributes that the page uses; nothing that runs or loads."""
    html = "aria-hidden aria-label aria-sort alt charset checked class colspan content data-falling"
    html += " height hidden href http-equiv id lang name role scope src tabindex type width"
    svg = "clip-path d fill font-size opacity preserveaspectratio stroke stroke-dasharray "
    svg += "stroke-linecap stroke-linejoin stroke-opacity stroke-width text-anchor transform "
    svg += "viewbox x y fill-opacity style version xmlns xmlns:xlink"
    return set(f"{html} {svg}".split())


def test_rows_values_and_provenance_are_there(study: Report) -> None:
    page = render_page(study)
    assert page.count('<tbody class="r">') == len(study.protocols[0].frame)
    assert "<b>0.212</b><s>±.011</s>" in page
    assert "<u>0.312</u>" in page
    assert "commit 0123456789abcdef0123456789abcdef01234567 \u00b7 dirty yes" in page
    assert "<pre>dimo bench --teacher digits</pre>" in page
    assert study.protocols[0].sha256 in page
    assert "not measured here" in page
    measured, quoted = page.split('id="quoted"')
    assert "arXiv:2503.15457, table 1" in quoted
    assert "table 1" not in measured


def test_the_page_is_well_formed_and_loads_nothing(study: Report) -> None:
    page = render_page(study)
    reader = Reader(page)
    policy = next(a["content"] for t, a in reader.tags if a.get("http-equiv")) or ""
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("style", "script"):
        (code,) = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert "http" not in code
    links = [a["href"] or "" for t, a in reader.tags if t == "a"]
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in links)


def test_hostile_text_is_shown_and_does_nothing(
    hostile: Report, words: str, allowed: set[str]
) -> None:
    for ablation in (False, True):
        page = render_page(dataclasses.replace(hostile, ablation=ablation))
        reader = Reader(page)
        tags = [tag for tag, _ in reader.tags]
        assert set(tags) <= set(TAGS.split())
        assert {name for _, attributes in reader.tags for name in attributes} <= allowed
        assert tags.count("script") == 1
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x08\x0b-\x1f]", page)
        page.encode()
        assert one_line(words, 400)[:40] in "".join(reader.texts)


def test_the_same_report_makes_the_same_page(study: Report) -> None:
    assert render_page(study) == render_page(study)


def test_an_empty_folder_says_what_to_do(study: Report) -> None:
    part = study.protocols[0]
    empty = dataclasses.replace(part, frame=part.frame.iloc[:0], records=())
    page = render_page(dataclasses.replace(study, protocols=(empty,)))
    assert "No results under protocol" in page
    assert "<code>dimo bench --protocol handwriting --teacher TEACHER</code>" in page
    assert "<svg" not in page


def test_pictures_beside_records_are_shown_whole_or_not_at_all(
    study: Report, tmp_path: Path
) -> None:
    teachers = [r for r in study.protocols[0].records if r.method.section == "Teacher"]
    (tmp_path / "pictures").mkdir()
    pixels = np.full((17, 26, 3), 90, np.uint8)
    text = json.dumps({"seed": 7, "columns": 3, "labels": ["cat", "<b>", "dog"]})
    good, cut, foreign = (tmp_path / "pictures" / f"{r.run_id}.png" for r in teachers)
    good.write_bytes(encode_png(pixels, text=text))
    cut.write_bytes(encode_png(pixels, text=text)[:-30])
    foreign.write_bytes(encode_png(pixels))
    page = render_page(dataclasses.replace(study, folder=tmp_path))
    (shown,) = (a for tag, a in Reader(page).tags if tag == "img")
    assert shown["alt"] == "3 images of MaskGIT, 16 steps"
    assert (shown["width"], shown["height"]) == ("26", "17")
    data = base64.b64decode((shown["src"] or "").removeprefix("data:image/png;base64,"))
    assert data == good.read_bytes()
    assert "seed 7, labels from left to right: cat, &lt;b&gt;, dog" in page
    with Image.open(good) as image:
        assert image.size == (26, 17)
