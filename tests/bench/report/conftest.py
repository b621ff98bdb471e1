"""A small study, quoted numbers, and text that wants to do harm: for every format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.protocol import Protocol
from bench.records.record import ProtocolInfo, ResultRecord
from bench.report import PublishedRow, Report, collect_report, load_published

RecordMaker = Callable[..., ResultRecord]
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
PUBLISHED = """\
benchmark,section,method,teacher,steps,metric,value,source,location,certainty,note
imagenet256-c2i,Distill.,Di[M]O,maskgit,1,fid,6.90,arXiv:2503.15457,table 1,read,
imagenet256-c2i,Teacher,MaskGit,maskgit,16,fid,6.60,arXiv:2503.15457,table 1,read,
imagenet256-c2i,Teacher,MaskGit,maskgit,16,inception_score,224.07,arXiv:2503.15457,table 1,read,
imagenet256-c2i,Sampler,trapezoidal,maskgit,,fid,7.1,arXiv:2503.15457,plot,second-hand,a note
unquoted,Teacher,Other,,,fid,1.0,arXiv:2503.15457,table 9,read,
"""
HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a | b || c",
    "two\nlines\r\nthree\u2028four",
    "[click](javascript:alert(1)) ![x](http://x.test/y.png) [a][b] <http://x.test>",
    "http://x.test/ www.x.test ftp://x.test",
    "**bold** __bold__ *a* _a_ ~~gone~~ `code` ``",
    "back\\slash \\| \\",
    "$x^2$ $$y$$ & &amp; &lt;",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \x00\x1b[31m",
    "# heading",
    "---",
    "x" * 10_000,
    "\u96ea" * 10_000,
]


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


@pytest.fixture(scope="session")
def published_text() -> str:
    """A file of quoted numbers."""
    return PUBLISHED


@pytest.fixture
def published(tmp_path: Path) -> list[PublishedRow]:
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED, encoding="utf-8")
    return load_published(path)


@pytest.fixture
def collected(protocol: Protocol) -> Callable[..., Report]:
    """`collected(records, ablation=...)` -> their report, nothing quoted."""

    def collect(records: list[ResultRecord], **options: Any) -> Report:
        folder = Path("results")
        return collect_report(records, [], [], protocols=[protocol], folder=folder, **options)

    return collect


@pytest.fixture
def study(records: list[ResultRecord], published: list[PublishedRow], protocol: Protocol) -> Report:
    """The report of the small study, with the settings of its rows."""
    problems = ["results/a.json: not valid JSON `here`; remove it", "results/b.json: edited"]
    folder = Path("results")
    return collect_report(
        records, problems, published, protocols=[protocol], folder=folder, settings=True
    )


@pytest.fixture(params=HOSTILE, ids=lambda words: ascii(words)[:20])
def words(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def hostile(make_record: RecordMaker, protocol: Protocol, words: str) -> Report:
    """A report in which every text that a record, a file or a quotation gives is `words`."""
    texts = {"sampler": words, "mask_schedule": words, "selected_by": words}
    training = {"recipe": words, words: "x"}
    varied = {"recipe": words, "seed": 0, "ablation": {words: words, "beta": 0.5}}
    records = [
        make_record(words, section="Distill.", device=words, training=training, **texts),
        make_record(words, number=2, section="Distill.", device="other", teacher=words),
        make_record(number=3, protocol=ProtocolInfo(words, 1, words)),
        make_record(words, number=4, section="Distill.", training=varied),
    ]
    quoted = PublishedRow(
        "imagenet256-c2i", "Teacher", words, words, 1, "fid", "1.0", words, words, words, words
    )
    folder = Path("results")
    return collect_report(
        records, [words], [quoted], protocols=[protocol], folder=folder, settings=True
    )
