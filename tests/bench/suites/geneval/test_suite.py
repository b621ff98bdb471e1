"""`dimo eval` under protocols with a detector, from folders of pictures to the record."""

import json
import shutil

import numpy as np
import pytest
import torch

from bench.features import Features
from bench.images.codec import encode_png
from bench.metrics.scores import metric_values
from bench.protocol import load_protocol, validate_file
from bench.records.store import load_all
from bench.report import collect_report, report_markdown
from bench.suites.base import Assets, ImageOrigin, load_suite
from bench.suites.captions import pair_scores
from bench.suites.geneval.layout import contradictions, read_results
from bench.suites.geneval.prompts import bundled_prompts, list_sha256
from bench.suites.geneval.scores import geneval_scores, image_counts, load_secondary
from dimo.cli import main
from dimo.data.scenes import batch
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError

RUNTIME = Runtime(torch.device("cpu"))


def measure(path, protocol, assets=None, **options):
    return load_suite(protocol, RUNTIME, assets, **options).measure_paths([path], ImageOrigin("x"))


@pytest.fixture(scope="module")
def protocol():
    return load_protocol("scenes-geneval")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory, write_prompts):
    """All held-out prompts, four pictures each: the first three right, the fourth of the next."""
    path = tmp_path_factory.mktemp("rendered")
    images, _ = batch(21, torch.arange(960), "held-out")
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    write_prompts(path, bundled_prompts())
    for number in range(240):
        folder = path / f"{number:05d}" / "samples"
        folder.mkdir()
        for sample in range(4):
            row = 240 * sample + (number if sample < 3 else (number + 37) % 240)
            (folder / f"{sample:04d}.png").write_bytes(encode_png(pixels[row]))
    return path


@pytest.fixture(scope="module")
def measured(rendered, protocol):
    return measure(rendered, protocol)


def test_a_whole_set(measured, protocol):
    record = measured.record
    assert list(record.metrics) == [metric.name for metric in protocol.metrics]
    asked = [metric.name for metric in protocol.metrics if metric.name.startswith("geneval")]
    for name in asked:
        metric = record.metrics[name]
        assert 0.74 < metric.value < 0.85  # three of four, and what the fourth shows by chance
        assert metric.low < metric.value < metric.high or metric.value == 0.75
        assert metric.extra["detector_accuracy"] >= 0.98
        assert metric.n == (960 if name == "geneval" else 160)
    overall = record.metrics["geneval"]
    tags = [record.metrics[name].value for name in asked[1:]]
    assert overall.value == pytest.approx(sum(tags) / 6)
    assert overall.extra["prompts"] >= 0.99
    evidence = record.evidence
    assert evidence.nonconforming == ()
    assert (evidence.extractor, evidence.reference) == ("scenes-clip", "scenes-held-out")
    assert evidence.extractor_sha256 == protocol.extractor.sha256
    assert evidence.reference_sha256 == protocol.reference.sha256
    assert evidence.detector_sha256 == protocol.detector.sha256
    assert evidence.scorer_sha256 == protocol.scorer.sha256
    assert evidence.prompts_sha256 == protocol.prompts.sha256
    for name in ("fid", "clip_score"):
        metric = record.metrics[name]
        assert metric.low < metric.value < metric.high
        assert metric.n == 960


def test_other_pictures_of_a_prompt_lower_the_clip_score(measured, protocol):
    """The same pictures, a fourth with another's prompt: FID does not see it, CLIP score does."""
    shuffled = measured.record
    images, labels = batch(21, torch.arange(960), "held-out")
    secondary = load_secondary(protocol, RUNTIME.device)
    texts = [prompt["prompt"] for prompt in bundled_prompts()]
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    seen = secondary.look(list(pixels), texts * 4)
    fits, features = seen.pop("fits"), Features(**seen)
    tags = [prompt["tag"] for prompt in bundled_prompts()] * 4
    right = secondary.scores(protocol, features, fits, labels.tolist(), tags)
    assert list(right) == ["fid", "kid", "mind", "clip_score"]
    assert right["clip_score"].value > shuffled.metrics["clip_score"].high
    assert shuffled.metrics["fid"].value == pytest.approx(right["fid"].value, rel=1e-3)


def test_the_clip_scores_interval_resamples_prompts(protocol):
    """All images of a prompt alike: a contribution a prompt, the mean of its images' scores."""
    prompts = [number for number in range(240) for _ in range(4)]
    tags = [p["tag"] for p in bundled_prompts() for _ in range(4)]
    values = np.random.RandomState(0).rand(960)
    (score,) = pair_scores(protocol, values, prompts, tags).values()
    np.testing.assert_allclose(score.contributions, values.reshape(240, 4).mean(axis=1))
    assert score.value == pytest.approx(score.contributions.mean())
    assert np.bincount(score.labels).tolist() == [40] * 6
    (uneven,) = pair_scores(protocol, values[:950], prompts[:950], tags[:950]).values()
    assert uneven.value == pytest.approx(uneven.contributions.mean())


def test_without_networks_beside_the_detector_nothing_is_looked_at(protocol, tmp_path):
    wanted = official(tmp_path, protocol)
    secondary = load_secondary(wanted, RUNTIME.device)
    seen = secondary.look([np.zeros((3, 5, 3), dtype=np.uint8)], ["a dog"])
    assert seen == {}
    assert secondary.scores(wanted, None, None, [0], ["counting"]) == {}


def lines_of(measured):
    return measured.files[".jsonl"].decode().splitlines(keepends=True)


def test_verdicts_can_be_read_again_and_hold(measured, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(measured.files[".jsonl"])
    results = read_results(path)
    assert len(results) == 960
    assert contradictions(results) == []
    wrong = next(r for r in results if "circle>=1, found 0" in r.reason)
    assert wrong.filename.endswith("samples/0003.png")


def official(tmp_path, protocol, *, detector="mmdet-mask2former-swin-s"):
    """The protocol with a detector that is not run here."""
    text = f"""
format = 1
name = "official"
version = 1
title = "x"
paper = "x"
[images]
resolution = [0, 0]
channels = 3
num_images = 960
labels = "prompts"
num_classes = 240
uint8 = "round"
[seeds]
report = 1
select = 2
n_select = 240
[prompts]
name = "mine"
sha256 = "{list_sha256(bundled_prompts())}"
images_per_prompt = 4
[prompts.tags]
{chr(10).join(f"{tag} = {n}" for tag, n in protocol.prompts.tags.items())}
[detector]
name = "{detector}"
sha256 = "any"
colors = "x"
[[metrics]]
name = "geneval"
higher_is_better = true
[uncertainty]
n_bootstrap = 50
seed = 0
level = 0.95
"""
    path = tmp_path / "official.toml"
    path.write_text(text)
    return validate_file(path)


def test_the_official_file_is_summed_up_again(measured, protocol, tmp_path):
    file = tmp_path / "results.jsonl"
    lines = lines_of(measured)
    file.write_text("".join(lines[i] for i in np.random.RandomState(0).permutation(960)))
    wanted = official(tmp_path, protocol)
    for path in (file, tmp_path):
        found = measure(path, wanted)
        assert found.record.metrics["geneval"].value == pytest.approx(
            measured.record.metrics["geneval"].value
        )
        evidence = found.record.evidence
        assert (evidence.extractor, evidence.reference) == ("none", "none")
        assert (evidence.detector, evidence.detector_sha256) == (wanted.detector.name, "")
        assert (evidence.prompts, evidence.prompts_sha256) == ("mine", wanted.prompts.sha256)
        assert found.contributions  # in the order of prompts, whatever the file's


RENAMED = {  # how others name the folders and write the metadata: 240 prompts, 4 images
    "unpadded": lambda prompt, sample: f"{prompt}/samples/{sample}.png",
    "two halves": lambda prompt, sample: f"gpu{prompt // 120}/{prompt % 120}/samples/{sample}.png",
    "in turns": lambda prompt, sample: f"gpu{prompt % 2}/{prompt // 2:05d}/samples/{sample}.png",
    "two of each": lambda prompt, sample: f"gpu{sample % 2}/{prompt}/samples/{sample // 2}.png",
}


@pytest.mark.parametrize("naming", RENAMED)
def test_verdicts_are_matched_by_prompt_and_metadata(measured, protocol, tmp_path, naming):
    rows = [json.loads(line) for line in lines_of(measured)]
    for number, row in enumerate(rows):
        row["filename"] = RENAMED[naming](number // 4, number % 4)
        row["metadata"] = json.dumps(json.loads(row["metadata"]), sort_keys=True)
    text = "".join(json.dumps(rows[i]) + "\n" for i in np.random.RandomState(0).permutation(960))
    (tmp_path / "results.jsonl").write_text(f"\ufeff{text}\n")
    wanted = official(tmp_path, protocol)
    found = measure(tmp_path / "results.jsonl", wanted).record
    geneval = measured.record.metrics["geneval"]
    assert found.metrics["geneval"].value == geneval.value
    assert found.metrics["geneval"].extra.items() <= geneval.extra.items()
    assert found.evidence.prompts_sha256 == wanted.prompts.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-4], "239 of 240 prompts: 39 of 40 color_attr"),
        (lambda rows: rows[:-1], "1 prompts do not have 4 images"),
        (
            lambda rows: [rows[0] | {"correct": not rows[0]["correct"]}, *rows[1:]],
            "1 verdicts contradict the boxes beside them, the first on 00000",
        ),
        (lambda rows: [rows[0] | {"tag": "counting"}, *rows[1:]], "line 1: 'tag' and 'prompt'"),
        (lambda rows: [rows[0] | {"more": 1}, *rows[1:]], "line 1 must have the keys filename"),
        (lambda rows: [rows[0] | {"details": '{"a": [[1]]}'}, *rows[1:]], "lists of 5 numbers"),
    ],
)
def test_what_is_wrong_with_an_official_file(measured, protocol, tmp_path, change, message):
    rows = [json.loads(line) for line in lines_of(measured)]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(DimoError, match=message) as caught:
        measure(file, official(tmp_path, protocol))
    assert "\n" not in str(caught.value)


def test_images_cannot_be_judged_without_the_official_file(rendered, protocol, tmp_path):
    with pytest.raises(DimoError, match=r"is not run by dimo; give the results\.jsonl"):
        measure(rendered, official(tmp_path, protocol))


def test_missing_weights_are_named(rendered, protocol, tmp_path):
    wanted = official(tmp_path, protocol, detector="hf-mask2former-swin-s")
    with pytest.raises(DimoError, match=r"needs its weights .* with --extractor-weights"):
        measure(rendered, wanted)
    with pytest.raises(DimoError, match=r"no config\.json, model\.safetensors, ViT-L-14\.pt in "):
        measure(rendered, wanted, Assets(extractor=tmp_path))


def test_intervals_resample_prompts(protocol):
    """All images of a prompt alike: the interval is that of 240 samples, not of 960."""
    prompts = [number for number in range(240) for _ in range(4)]
    tags = [p["tag"] for p in bundled_prompts() for _ in range(4)]
    clustered = [bool((number * 7) % 2) for number in prompts]
    spread = [bool(i % 2) for i in range(960)]
    widths = []
    for correct in (clustered, spread):
        scores = geneval_scores(protocol, tags, prompts, correct)
        assert image_counts(list(scores), tags)["geneval"] == 960
        values = metric_values(scores, protocol, 960)
        assert values["geneval"].value == pytest.approx(0.5)
        assert scores["geneval"].contributions.mean() == pytest.approx(0.5)
        widths.append(values["geneval"].high - values["geneval"].low)
    assert widths[0] == pytest.approx(2 * 1.96 * 0.5 / 240**0.5, rel=0.15)
    assert widths[1] == 0  # every prompt has half of its images right


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dimo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr()


def test_the_command(rendered, protocol, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    asked = ["eval", rendered, "--protocol", "scenes-geneval", "--results", results]
    code, said = run([*asked, "--device", "cpu"], monkeypatch, capsys)
    assert not code
    assert "GenEval" in said.out
    assert "detector_accuracy" in said.out
    (record,), _ = load_all(results)
    lines = (results / "verdicts" / f"{record.run_id}.jsonl").read_text().splitlines()
    assert len(lines) == 960
    text = report_markdown(collect_report([record], [], [], protocols=[protocol], folder=results))
    header = next(line for line in text.splitlines() if line.startswith("| Method"))
    columns = [column.strip() for column in header.strip("|").split("|")]
    images = ["FID (↓)", "KID (↓)", "MIND (↓)", "CLIP score (↑)"]
    assert columns[-5:-1] == images  # images/s comes last
    assert "scores of `scenes-clip`" in text
    assert "resamples of the prompts, for FID, KID, MIND of the generated images" in text
    code, said = run([*asked, rendered], monkeypatch, capsys)
    assert code == 2
    assert "2 paths; allowed: one" in said.err


def test_incomplete_sets_are_refused_or_marked(rendered, protocol, tmp_path, monkeypatch, capsys):
    path = tmp_path / "set"
    shutil.copytree(rendered, path)
    shutil.rmtree(path / "00005")
    (path / "00007" / "samples" / "0002.png").unlink()
    results = tmp_path / "results"
    asked = ["eval", path, "--protocol", "scenes-geneval", "--results", results]
    code, said = run(asked, monkeypatch, capsys)
    assert code == 2
    error = " ".join(said.err.split())
    assert "1 of 240 prompt folders are missing: 00005" in error
    assert "not 4 images: 00007 has 3" in error
    assert not results.exists()
    found = measure(path, protocol, nonconforming=True)
    assert len(lines_of(found)) == 955
    assert len(found.record.evidence.nonconforming) == 2


@pytest.mark.slow
def test_damaged_and_large_pictures(rendered, protocol, tmp_path):
    path = tmp_path / "set"
    shutil.copytree(rendered, path)
    file = path / "00003" / "samples" / "0001.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DimoError, match=r"00003/samples/0001\.png: .*make the image again"):
        measure(path, protocol)
    file.write_bytes(encode_png(np.zeros((64, 64, 3), dtype=np.uint8)))
    with pytest.raises(DimoError, match="takes images of 32 x 32, not 64 x 64"):
        measure(path, protocol)
