"""`dimo eval` under the protocols of HPS: a benchmark of ten prompts a style and a tiny CLIP."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bench.images.codec import decode_image, encode_png
from bench.metrics.per_image import STYLES
from bench.protocol import load_protocol, protocol_sha256, validate_file
from bench.protocol.catalog import data_dir
from bench.protocol.networks import SCORERS
from bench.records.store import load_all, load_contributions
from bench.report import collect_report, metric_table, report_latex, report_markdown
from bench.report.html import render_page
from bench.suites.hps import load_hps
from dimo.errors import DimoError

WEIGHTS = SCORERS["hps"].versions
EACH = 10


def small(folder, version, **changes):
    """The shipped protocol with ten prompts a style."""
    text = (data_dir("protocols") / f"hpsv2-{version}.toml").read_text()
    text = text.replace("3200", str(4 * EACH)).replace("= 800", f"= {EACH}")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / f"hpsv2-{version}.toml"
    path.write_text(text)
    return path


@pytest.fixture
def images(tmp_path):
    """The official layout; style `photo` as JPEG."""
    rng = np.random.default_rng(0)
    for style in STYLES:
        folder = tmp_path / "images" / style
        folder.mkdir(parents=True)
        for number in range(EACH):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            if style == "photo":  # names as others write them
                name = f"{number:05d}.{('jpg', 'jpeg', 'JPG')[number % 3]}"
                Image.fromarray(pixels).save(folder / name, format="JPEG", quality=95)
                (folder / f"._{name}").write_bytes(b"of macOS")
            else:
                (folder / f"{number:05d}.png").write_bytes(encode_png(pixels))
    return tmp_path / "images"


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for style in STYLES:
        texts = [f"a {style} of {number} cats" for number in range(EACH)]
        (folder / f"{style}.json").write_text(json.dumps(texts))
    return folder


@pytest.fixture
def evaluate(dimo, tiny_clip, images, prompts, tmp_path):
    """`evaluate(version, ...)` -> what the command did; results are in `tmp_path / "results"`."""

    def run(version, *more, weights=None, **changes):
        file = tiny_clip(tmp_path / WEIGHTS[weights or version])
        return dimo(
            "eval", images, "--protocol", small(tmp_path, version, **changes), "--prompts",
            prompts, "--extractor-weights", file, "--results", tmp_path / "results",
            "--device", "cpu", *more,
        )  # fmt: skip

    return run


def test_the_record_has_what_the_scorer_says(evaluate, images, prompts, tmp_path):
    code, out, said = evaluate("v2.1", "--name", "Mine", "--steps", "4")
    assert code == 0, said
    assert "Concept art" in out
    ((record,), problems) = load_all(tmp_path / "results")
    assert not problems
    weights = tmp_path / WEIGHTS["v2.1"]
    scorer = load_hps(
        weights, version="v2.1", preprocessing="tensor-antialias", sha256="any",
        device=torch.device("cpu"),
    )  # fmt: skip
    every = []
    for style in STYLES:
        files = sorted((images / style).glob("[!.]*"))
        texts = json.loads((prompts / f"{style}.json").read_text())
        values = scorer.score([decode_image(file.read_bytes()) for file in files], texts)
        found = record.metrics[f"hps_{style.replace('-', '_')}"]
        assert found.value == pytest.approx(values.mean(), abs=1e-4)
        assert found.extra["std"] == pytest.approx(values.std(), abs=1e-4)  # groups of one
        assert found.n == EACH
        assert found.low < found.value < found.high
        every.append(values)
    total = record.metrics["hps"]
    assert total.value == pytest.approx(np.mean(every), abs=1e-4)
    assert total.n == 4 * EACH
    width = 2 * 1.96 * np.sqrt(np.mean([v.var(ddof=1) for v in every]) / (4 * EACH))
    assert total.high - total.low == pytest.approx(width, rel=0.15)  # within styles
    assert list(record.metrics) == ["hps", *SCORERS["hps"].metrics[1:]]
    assert (record.method.name, record.method.num_steps) == ("Mine", 4)
    assert record.evidence.scorer_sha256 == scorer.sha256
    assert record.evidence.notes == ("10 images are stored with a loss (jpeg)",)
    with np.load(tmp_path / "results" / "contributions" / f"{record.run_id}.npz") as file:
        np.testing.assert_allclose(file["hps_photo"], every[3], atol=1e-4)
    assert load_contributions(record, tmp_path / "results")


def test_two_ranks_give_what_one_gives(evaluate, eval_on_two_ranks, images, prompts, tmp_path):
    assert evaluate("v2.1")[0] == 0
    ((one,), _) = load_all(tmp_path / "results")
    two = eval_on_two_ranks(
        images, "--protocol", tmp_path / "hpsv2-v2.1.toml", "--prompts", prompts,
        "--extractor-weights", tmp_path / WEIGHTS["v2.1"], "--results", tmp_path / "two",
        "--device", "cpu",
    )  # fmt: skip
    for name, metric in one.metrics.items():
        assert two["metrics"][name]["value"] == pytest.approx(metric.value, rel=1e-9)
    assert two["evidence"]["images_sha256"] == one.evidence.images_sha256
    assert two["evidence"]["notes"] == list(one.evidence.notes)
    assert len(list((tmp_path / "two").glob("*.json"))) == 1


def test_weights_of_the_other_version_are_refused(evaluate, tmp_path):
    code, out, said = evaluate("v2.0", weights="v2.1")
    assert (code, out) == (2, "")
    assert "is the checkpoint of HPS v2.1, but v2.0 is declared" in said
    assert not (tmp_path / "results").exists()


def test_versions_weights_and_prompts_never_share_a_table(evaluate, prompts, tmp_path):
    for version in WEIGHTS:
        assert evaluate(version, "--name", f"of {version}")[0] == 0
    (prompts / "photo.json").write_text(json.dumps([f"another {n}" for n in range(EACH)]))
    assert evaluate("v2.1", "--name", "other prompts")[0] == 0
    records, _ = load_all(tmp_path / "results")
    protocols = [validate_file(small(tmp_path, version)) for version in WEIGHTS]
    report = collect_report(records, [], [], protocols=protocols, folder=tmp_path)
    tables = [[record.method.name for record in part.records] for part in report.protocols]
    assert tables == [["of v2.0"], ["of v2.1"], ["other prompts"]]
    assert all(len(set(part.measured_with)) == 2 for part in report.protocols)
    for record in records:
        assert "Anime" in metric_table(record, level=0.95)


def test_the_caption_names_the_scorer_and_nothing_that_is_not_there(evaluate, tmp_path):
    assert evaluate("v2.1")[0] == 0
    records, _ = load_all(tmp_path / "results")
    protocols = [validate_file(small(tmp_path, "v2.1"))]
    report = collect_report(records, [], [], protocols=protocols, folder=tmp_path)
    for form in (report_markdown, report_latex, render_page):
        text = " ".join(form(report).split())
        assert "none" not in text.partition("scores of ")[0].rpartition("N = 40")[2]
        assert "features of" not in text
        assert "tensor-antialias" in text
        assert "resamples of the prompts" in text
        assert "N = 10" not in text  # as the protocol has it
    shown = records[0].metrics["hps"].value
    assert f"{shown:.2f}" in report_markdown(report)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda i, p: (i / "anime" / "00003.JPEG").write_bytes(b"x"), "00003.JPEG and 00003.png"),
        (lambda i, p: (i / "anime" / "10.png").write_bytes(b"x"), "the first is 10.png; remove"),
        (lambda i, p: (i / "anime" / "00003.png").unlink(), "lacks anime/00003.png (or .jpg)"),
        (lambda i, p: (p / "photo.json").unlink(), "photo.json: cannot read prompts"),
        (lambda i, p: (p / "photo.json").write_text("[]"), "0 prompts instead of 10"),
        (
            lambda i, p: (i / "anime" / "00003.png").write_bytes(b"x"),
            "00003.png: not an image (allowed: PNG, JPEG, WebP, BMP, TIFF); make the image again",
        ),
    ],
)
def test_incomplete_sets_are_one_error(evaluate, images, prompts, tmp_path, spoil, said):
    spoil(images, prompts)
    code, _, error = evaluate("v2.1")
    assert code == 2
    assert said in error
    assert not (tmp_path / "results").exists()


def test_what_is_missing_is_named(dimo, images, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("DIMO_WEIGHTS", str(tmp_path / "weights"))
    protocol = small(tmp_path, "v2.1")
    for more, said in (
        ([], "needs the prompts of the images (HPDv2 benchmark); give them with --prompts"),
        (["--prompts", prompts], "hps-v2.1"),
        (["--prompts", prompts, images], "2 paths; allowed: one"),
    ):
        code, _, error = dimo("eval", images, "--protocol", protocol, *more)
        assert code == 2
        assert said in error
    code, _, error = dimo("eval", images, "--protocol", "digits", "--prompts", prompts)
    assert code == 2
    assert "is not used under 'digits'" in error
    more = ["--prompts", prompts, "--labels", "filename"]
    code, _, error = dimo("eval", images, "--protocol", protocol, *more)
    assert code == 2
    assert "--labels filename is not used" in error


def test_prompts_of_another_hash(evaluate):
    code, _, error = evaluate(
        "v2.1", **{'sha256 = "any"\nimages': f'sha256 = "{"0" * 64}"\nimages'}
    )
    assert code == 2
    assert "the protocol names 000000000000...; give the prompts HPDv2 benchmark" in error


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"v2.1"\nmodel', '"v3"\nmodel', "unknown 'scorer.version' 'v3'"),
        ('"ViT-H-14"', '"ViT-B-32"', "'scorer.model' must be 'ViT-H-14'"),
        ('"tensor-antialias"', '"bicubic"', "unknown 'scorer.preprocessing' 'bicubic'"),
        ('name = "hps"\nversion', 'name = "hp"\nversion', "unknown 'scorer.name' 'hp'"),
        (
            "anime = 10\nconcept-art = 10",
            "concept-art = 10\nanime = 10",
            "'prompts.tags' must be anime, concept-art",
        ),
        ('model = "', 'scale = "cosine"\nmodel = "', "'scorer.scale' must be left out"),
        ('model = "', 'prefix = "A "\nmodel = "', "'scorer.prefix' must be left out"),
        ('name = "hps_photo"', 'name = "clip_score"', "the scorer 'hps' gives hps, hps_anime"),
    ],
)
def test_protocols_that_contradict_themselves(tmp_path, old, new, said):
    with pytest.raises(DimoError) as caught:
        validate_file(small(tmp_path, "v2.1", **{old: new}))
    assert said in str(caught.value)


def test_the_shipped_protocols():
    first, second = (load_protocol(f"hpsv2-{version}") for version in WEIGHTS)
    assert protocol_sha256(first) != protocol_sha256(second)
    for protocol in (first, second):
        assert protocol.prompts.tags == dict.fromkeys(STYLES, 800)
        assert [metric.name for metric in protocol.metrics] == list(SCORERS["hps"].metrics)
    assert SCORERS["hps"].tags == STYLES
