"""A real headless Chromium, and pages that `dimo report --format html` wrote."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from bench.images.codec import encode_png
from bench.protocol import load_protocol
from bench.protocol.catalog import data_dir
from bench.records.record import ResultRecord, load_record, record_to_json, seal
from bench.records.selection import Trial, Tuning
from dimo.cli.app import app

RECORDS = sorted((Path(__file__).parents[2] / "results").glob("*-digits-*.json"))
NASTY = {
    "script": "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>",
    "attribute": "\" onmouseover=\"document.title='owned'\" x=\"' autofocus onfocus='a()",
    "bars": "a | b\n\n# c\r\n`d` ${e} {{ 7 * 7 }} {% raw %} $x^2$ \\LaTeX & < > ]]> -->",
    "directions": "abc \u202e\u2066 dlrow \u2069 \u200f\u05e9\u05dc\u05dd \x00\x1b[31m",
    "long": "W" * 10_000,
    "spaced": "long words " * 1_000,
}


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, driven from outside."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one with CHROMIUM=...")
    with sync_playwright() as driver:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root cannot have one
        browser = driver.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


class Opened:
    """A page in a browser, with all that went wrong in it."""

    def __init__(self, context: BrowserContext, path: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page: Page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Opened]]:
    """`open_page(path, width=..., dark=...)`: without any network."""
    contexts = []

    def opened(path: Path, *, width: int = 1280, dark: bool = False) -> Opened:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            offline=True,
        )
        context.set_default_timeout(10_000)
        contexts.append(context)
        return Opened(context, path)

    yield opened
    for context in contexts:
        context.close()


def _with_everything(folder: Path) -> None:
    """The shipped records of digits, some with a sweep, all of one teacher with pictures."""
    pixels = np.random.RandomState(0).randint(0, 255, (17, 89, 3), dtype=np.uint8)
    told = {"seed": 1000, "columns": 10, "labels": [str(i % 10) for i in range(20)]}
    (folder / "pictures").mkdir()
    for path in RECORDS:
        record = load_record(path)
        if record.method.section == "Teacher":
            trials = tuple(Trial({"temperature": t}, 1 + abs(t - 1)) for t in (0.8, 1.0, 1.2))
            method = dataclasses.replace(record.method, tuning=Tuning(2000, 2000, trials, 1))
            record = seal(dataclasses.replace(record, method=method))
            picture = encode_png(pixels, text=json.dumps(told))
            (folder / "pictures" / f"{record.run_id}.png").write_bytes(picture)
        (folder / path.name).write_text(record_to_json(record))


def _runs(folder: Path) -> Path:
    for name in ("one", "two <b>"):
        (folder / name).mkdir(parents=True)
        lines = [{"step": s, "student_loss": 1 / s, "skipped": 0} for s in range(50, 500, 50)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="session")
def shipped_records() -> list[ResultRecord]:
    """Of digits: what the pages of these tests show."""
    return [load_record(path) for path in RECORDS]


@pytest.fixture(scope="session")
def shipped_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the shipped records of digits with everything a page can show."""
    folder = tmp_path_factory.mktemp("shipped")
    results = folder / "results"
    results.mkdir()
    _with_everything(results)
    (results / "broken.json").write_text("{<i>")
    return _written(folder, results, "--runs", str(_runs(folder / "runs")))


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose every text tries to be something else."""
    folder = tmp_path_factory.mktemp("hostile")
    results = folder / "results"
    results.mkdir()
    shipped = [load_record(path) for path in RECORDS]
    for number, (kind, text) in enumerate(NASTY.items()):
        (results / f"{kind}.json").write_text(record_to_json(_hostile(shipped[-1], number, text)))
    (results / "<img src=x onerror=alert(1)>.json").write_text("no record")
    return _written(folder, results)


def _hostile(record: ResultRecord, number: int, text: str) -> ResultRecord:
    method = dataclasses.replace(
        record.method,
        name=text,
        selected_by=text,
        teacher=text,
        sampler=text,
        mask_schedule=text,
        training={text[:40]: text},
    )
    return seal(
        dataclasses.replace(
            record,
            run_id=f"{number:032x}",
            method=method,
            speed=dataclasses.replace(record.speed, device=text),
            packages={"python": text},
            command=text,
        )
    )


def _written(folder: Path, results: Path, *options: str) -> Path:
    page = folder / "report.html"
    command = ["report", "--protocol", "digits", "--format", "html"]
    app([*command, "--results", str(results), "--out", str(page), *options], standalone_mode=False)
    return page


@pytest.fixture(scope="session")
def metrics() -> tuple[str, ...]:
    """Names of the metrics of the protocol, the supplementary ones too: each is on record."""
    assert data_dir("protocols").is_dir()
    return tuple(metric.name for metric in load_protocol("digits").metrics)
