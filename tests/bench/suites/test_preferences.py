"""`dimo eval` under the protocols of preference scorers: HPSv2's layout, and other prompts."""

import gzip
import json

import numpy as np
import open_clip
import pytest

from bench.features.clip import load_pickscore
from bench.images.codec import decode_image, encode_png
from bench.metrics.per_image import STYLES
from bench.protocol import load_protocol, validate_file
from bench.protocol.catalog import METRICS, data_dir
from bench.protocol.networks import SCORERS
from bench.records.store import load_all
from bench.report import collect_report, report_markdown
from dimo.errors import DimoError

EACH = 5
NAMES = [name for name, kind in SCORERS.items() if kind.suite == "preferences"]


def small(folder, name="pickscore", **changes):
    """A shipped protocol with a few prompts a style."""
    text = (data_dir("protocols") / f"{name}.toml").read_text()
    text = text.replace("3200", str(4 * EACH)).replace("= 800", f"= {EACH}")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.fixture
def made(golden, monkeypatch, tmp_path):
    """Images and prompts in HPSv2's layout and a tiny PickScore: the options of `dimo eval`."""
    config = json.loads((golden / "hpsv2_tiny_clip.config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    weights, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    packed = (golden / "pickscore_tiny.weights.safetensors.gz").read_bytes()
    weights.write_bytes(gzip.decompress(packed))
    (tmp_path / "benchmark").mkdir()
    for style in STYLES:
        texts = [f"a {style} of {number} cats" for number in range(EACH)]
        (tmp_path / "benchmark" / f"{style}.json").write_text(json.dumps(texts))
        (tmp_path / "images" / style).mkdir(parents=True)
        for number in range(EACH):
            pixels = rng.integers(0, 256, (40 + number, 36, 3), dtype=np.uint8)
            path = tmp_path / "images" / style / f"{number:05d}.png"
            path.write_bytes(encode_png(pixels))
    return {
        "--protocol": small(tmp_path), "--prompts": tmp_path / "benchmark",
        "--extractor-weights": weights, "--results": tmp_path / "results", "--device": "cpu",
    }  # fmt: skip


@pytest.fixture
def evaluate(dimo, made, tmp_path):
    def run(images=tmp_path / "images", **changes):
        given = {**made, **{f"--{key.replace('_', '-')}": value for key, value in changes.items()}}
        return dimo("eval", images, *[part for item in given.items() if item[1] for part in item])

    return run


def test_the_record_has_what_the_scorer_says(evaluate, made, tmp_path):
    code, out, said = evaluate()
    assert code == 0, said
    assert "PickScore" in out
    ((record,), problems) = load_all(tmp_path / "results")
    assert not problems
    scorer, values = load_pickscore(made["--extractor-weights"]), []
    for style in STYLES:
        files = sorted((tmp_path / "images" / style).iterdir())
        texts = json.loads((tmp_path / "benchmark" / f"{style}.json").read_text())
        values.append(scorer.score([decode_image(file.read_bytes()) for file in files], texts))
    found = record.metrics["pickscore"]
    assert found.value == pytest.approx(np.mean(values), abs=1e-4)
    assert found.n == 4 * EACH
    assert found.low < found.value < found.high
    # prompts are resampled within styles
    within = np.sqrt(np.mean([v.var(ddof=1) for v in values]) / (4 * EACH))
    assert found.high - found.low == pytest.approx(2 * 1.96 * within, rel=0.15)
    with np.load(tmp_path / "results" / "contributions" / f"{record.run_id}.npz") as file:
        np.testing.assert_allclose(file["pickscore"], np.concatenate(values), atol=1e-4)
    protocols = [validate_file(made["--protocol"])]
    report = collect_report([record], [], [], protocols=protocols, folder=tmp_path)
    text = report_markdown(report)
    assert "scores of `pickscore`" in text
    assert "resamples of the prompts" in text


def test_prompts_of_another_kind_in_a_flat_folder(evaluate, made, tmp_path):
    """The same pairs under other names and in a file give the same score."""
    assert evaluate()[0] == 0
    flat, texts = tmp_path / "flat", {}
    flat.mkdir()
    for style in STYLES:
        prompts = json.loads((tmp_path / "benchmark" / f"{style}.json").read_text())
        for number, path in enumerate(sorted((tmp_path / "images" / style).iterdir())):
            (flat / f"{style[::-1]}_{number}.png").write_bytes(path.read_bytes())
            texts[f"{style[::-1]}_{number}.png"] = prompts[number]
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    code, _, said = evaluate(flat, prompts=tmp_path / "prompts.json")
    assert code == 0, said
    (first, second), _ = load_all(tmp_path / "results")
    assert second.metrics["pickscore"].value == pytest.approx(first.metrics["pickscore"].value)
    assert first.evidence.prompts_sha256 == second.evidence.prompts_sha256


def test_what_is_missing_or_wrong_is_one_line(evaluate, made, tmp_path):
    photo, prompts = tmp_path / "images" / "photo", tmp_path / "benchmark" / "photo.json"
    for changes, said in (
        ({"prompts": None}, "needs the prompts of the images (HPDv2 benchmark)"),
        ({"extractor_weights": None}, "needs model.safetensors of yuvalkirstain/PickScore_v1"),
        ({"extractor_weights": tmp_path / "no"}, "no file"),
        ({"images": tmp_path / "no"}, "is no folder; give the folder of images"),
        ({"labels": "filename"}, "--labels filename is not used"),
        ({"clip_weights": photo}, "--clip-weights"),
    ):
        code, _, error = evaluate(**changes)
        assert code == 2, changes
        assert said in error
    other = small(tmp_path, **{'"any"  # model': f'"{"0" * 64}"  # model'})
    assert "the protocol names 000000000000" in evaluate(protocol=other)[2]
    small(tmp_path)
    (photo / "00004.png").rename(photo / "5.png")
    assert "has none for 1 of 20 images ('photo/5.png')" in evaluate()[2]
    (photo / "5.png").unlink()
    assert "19 images do not match 20 captions" in evaluate()[2]
    prompts.write_text("[]")
    assert "photo.json: 0 prompts instead of 5; give a folder with anime.json" in evaluate()[2]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"any"  # model', '"any"\nmodel = "ViT-H-14" # ', "'scorer.model' must be left out"),
        ('"any"  # model', '"any"\npreprocessing = "pil" # ', "preprocessing' must be left out"),
        ("[0, 0]", "[512, 512]", "'images.resolution' must be [0, 0] for 'pickscore'"),
        ('name = "pickscore"\nhigher', 'name = "hps"\nhigher', "'pickscore' gives pickscore"),
        ("higher_is_better = true", "higher_is_better = false", "must be true for 'pickscore'"),
        (
            "[[metrics]]",
            '[extractor]\nname = "digits-cnn"\nsha256 = "any"\n[reference]\nname = "digits-all"\n'
            'sha256 = "any"\ncount = 20\n[[metrics]]\nname = "fid"\nhigher_is_better = false\n'
            "[[metrics]]",
            "'metrics' must have only those of the scorer 'pickscore'",
        ),
    ],
)
def test_protocols_that_contradict_themselves(tmp_path, old, new, said):
    with pytest.raises(DimoError) as caught:
        validate_file(small(tmp_path, **{old: new}))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_protocols_share_images_and_prompts_with_hps(name):
    protocol, hps = load_protocol(name), load_protocol("hpsv2-v2.1")
    assert (protocol.images, protocol.prompts) == (hps.images, hps.prompts)
    (metric,) = protocol.metrics
    assert (metric.name,) == SCORERS[name].metrics
    assert METRICS[metric.name].higher_is_better
