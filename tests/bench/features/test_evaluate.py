"""`dimo eval` on real image files, as a user runs it."""

import csv
import json
import re
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from bench.features import pipeline as evaluate_module
from bench.protocol import load_protocol
from bench.records.store import load_all
from bench.rows.rows import load_planned, plan_jobs
from bench.rows.settings import generate
from bench.suites.base import ImageOrigin, load_suite
from dimo.engine.distributed import Runtime

CPU = torch.device("cpu")


def test_a_folder_is_scored_with_intervals_and_provenance(dimo, samples, tmp_path):
    out, err = dimo("eval", "samples", "--protocol", "tiny.toml", "--labels", "filename")
    assert "FID (↓)" in out
    assert "95% interval" in out
    assert "ceiling" in out
    assert "record: results/" in err
    (path,) = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    assert record["method"]["section"] == "Image sets"
    assert record["seed"] is None
    assert record["evidence"]["extractor_sha256"].startswith("0eadf646")
    assert record["evidence"]["reference_sha256"].startswith("8a34b04f")
    assert record["evidence"]["nonconforming"] == []
    for found in record["metrics"].values():
        assert found["low"] <= found["value"] <= found["high"]
        assert found["n"] == 40
    assert record["metrics"]["class_accuracy"]["value"] > 0.95
    report, _ = dimo("report", "--protocol", "tiny.toml")
    assert "samples" in report


def test_each_class_is_scored_alone(dimo, tmp_path, write_folder, real_digits):
    """Zeros are negatives, ones and twos are exchanged; the others are real."""
    pixels, labels = real_digits(700)
    ones, twos = pixels[labels == 1], pixels[labels == 2]
    pixels[labels == 0] = 255 - pixels[labels == 0]
    pixels[labels == 1], pixels[labels == 2] = twos, ones
    np.savez(tmp_path / "set.npz", arr_0=pixels, arr_1=labels)
    protocol = (tmp_path / "tiny.toml").read_text().replace("num_images = 40", "num_images = 700")
    (tmp_path / "tiny.toml").write_text(protocol)
    out, err = dimo("eval", "set.npz", "--protocol", "tiny.toml", "--per-class", "c.csv", "--json")
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert [(row["class"], row["n"]) for row in rows] == [(str(n), "70") for n in range(10)]
    assert sum(int(row["n_reference"]) for row in rows) == 1797
    accuracy = [float(row["class_accuracy"]) for row in rows]
    overall = json.loads(out)["metrics"]["class_accuracy"]["value"]
    assert sum(accuracy) / 10 == pytest.approx(overall, abs=1e-6)
    assert max(accuracy[1:3]) < 0.05 < 0.9 < min(accuracy[3:])
    coverage, fid = ([float(row[name]) for row in rows] for name in ("coverage", "fid"))
    assert max(coverage[:3]) < 0.1 < 0.5 < min(coverage[3:])
    assert min(fid[:3]) > 10 * max(fid[3:])
    assert "the worst of them: c.png" in err
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"


def test_classes_of_few_images_have_no_distance(dimo, samples, tmp_path):
    labelled = ("--protocol", "tiny.toml", "--labels", "filename", "--per-class")
    dimo("eval", "samples", *labelled, "c.csv")
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert {row["fid"] for row in rows} == {""}  # 4 images in 64 dimensions
    assert all(0 < float(row["coverage"]) < 1 for row in rows)
    _, err = dimo("eval", "samples", *labelled, "c.txt", code=2)
    assert "--per-class c.txt is not a .csv file" in err
    unlabelled = ("--protocol", "tiny.toml", "--labels", "none", "--nonconforming")
    _, err = dimo("eval", "samples", *unlabelled, "--per-class", "d.csv", code=2)
    assert "the images have no labels that count" in err
    _, err = dimo("eval", "samples", "--protocol", "scenes-geneval", "--per-class", "d.csv", code=2)
    assert "--per-class d.csv is not used under 'scenes-geneval'" in err
    assert not (tmp_path / "d.csv").exists()


def test_bench_and_eval_are_one_path(few_digits, tmp_path):
    """The images of a bench row, written to an npz and scored as files: the same record."""
    protocol = load_protocol(few_digits)
    (job,) = load_planned(plan_jobs("digits", ["digits-dimo"], []), device=CPU)
    stream = generate(
        job.loaded,
        job.settings,
        seed=protocol.seeds.report,
        num_images=300,
        batch_size=100,
        uint8=protocol.images.uint8,
        device=CPU,
    )
    batches = list(stream)
    np.savez(
        tmp_path / "samples.npz",
        arr_0=torch.cat([b.images for b in batches]).permute(0, 2, 3, 1).numpy(),
        arr_1=torch.cat([b.labels for b in batches]).numpy(),
    )
    workbench = load_suite(protocol, Runtime(CPU))
    made = workbench.measure(job).record
    read = workbench.measure_paths([tmp_path / "samples.npz"], ImageOrigin("same")).record
    assert read.evidence.images_sha256 == made.evidence.images_sha256
    assert read.evidence.labels_sha256 == made.evidence.labels_sha256
    for name, metric in made.metrics.items():
        assert read.metrics[name] == metric, name


def test_every_kind_of_input_gives_the_same_numbers(samples, tmp_path, real_digits, eval_json):
    pixels, labels = real_digits(40)
    np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=labels)
    np.savez(tmp_path / "b.npz", arr_0=pixels[:20], arr_1=labels[:20])
    np.savez(tmp_path / "c.npz", arr_0=pixels[20:], arr_1=labels[20:])
    shutil.make_archive(str(tmp_path / "s"), "zip", samples)
    shutil.make_archive(str(tmp_path / "s"), "tar", samples)
    _, wanted = eval_json("samples", "--labels", "filename")
    for arguments in (["a.npz"], ["b.npz", "c.npz"]):
        assert eval_json(*arguments)[1] == wanted
    for name in ("s.zip", "s.tar"):
        found = eval_json(name, "--labels", "filename", "--recursive")[1]
        assert found == wanted, name


def test_two_ranks_give_what_one_gives(samples, run_two_ranks, tmp_path, eval_json):
    _, one = eval_json("samples", "--labels", "filename", "--cache", "none")
    command = ["eval", "samples", "--protocol", "tiny.toml", "--labels", "filename", "--json"]
    command += ["--cache", "none", "--results", "two"]
    done = run_two_ranks(*command, cwd=tmp_path)
    two = {k: found["value"] for k, found in json.loads(done.stdout)["metrics"].items()}
    assert two == pytest.approx(one, rel=1e-9, abs=1e-12)
    assert len(list((tmp_path / "two").glob("*.json"))) == 1
    (tmp_path / "samples" / "000003_3.png").write_bytes(b"")
    failed = run_two_ranks(*command, cwd=tmp_path, code=2)
    assert failed.stderr.count("error: 1 of 40 images cannot be scored") == 1


def test_a_rank_without_images_changes_no_reference(
    dimo, run_two_ranks, tmp_path, real_digits, write_folder, any_reference
):
    """Twenty images are fewer than one forward of the network: one of two ranks has none."""
    pixels, labels = real_digits(20)
    write_folder(tmp_path / "real", pixels, labels)
    text = any_reference.replace("count = 100", "count = 20")
    (tmp_path / "few.toml").write_text(text.replace('"tiny"', '"few"').replace("30", "20"))
    arguments = ["reference", "real", "--protocol", "few.toml", "-o"]
    dimo(*arguments, "one.npz")
    run_two_ranks(*arguments, "two.npz", cwd=tmp_path)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        for key in ("mu", "sigma", "n", "features"):
            np.testing.assert_allclose(two[key], one[key], rtol=1e-9, atol=1e-12)


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def cached(samples, tmp_path, monkeypatch, eval_json):
    """A scored set with a cache; returns how often images were extracted since, and its value."""
    calls = []
    real = evaluate_module.extract

    def counted(*arguments, **named):
        calls.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(evaluate_module, "extract", counted)
    arguments = ("samples", "--labels", "filename", "--cache", "cache")
    _, values = eval_json(*arguments)
    assert len(calls) == 1
    calls.clear()
    return calls, arguments, values


def test_a_second_run_extracts_nothing(cached, eval_json):
    calls, arguments, values = cached
    assert eval_json(*arguments)[1] == values
    assert not calls


@pytest.mark.parametrize("harm", ["truncate", "alter", "no seal", "no data"])
def test_a_damaged_cache_entry_is_made_again(cached, tmp_path, harm, eval_json):
    calls, arguments, values = cached
    (data,) = (tmp_path / "cache").glob("*.npz")
    if harm == "truncate":
        data.write_bytes(data.read_bytes()[:1000])
    elif harm == "alter":
        with np.load(data) as file:
            arrays = {key: file[key] for key in file.files}
        np.savez(data, **(arrays | {"features": arrays["features"] * 2}))
    else:
        (data if harm == "no data" else data.with_suffix(".json")).unlink()
    for extractions in (1, 0):
        calls.clear()
        assert eval_json(*arguments)[1] == values
        assert len(calls) == extractions


def test_another_image_or_label_is_another_entry(cached, samples, eval_json):
    calls, arguments, values = cached
    (samples / "000003_3.png").unlink()
    Image.fromarray(np.zeros((8, 8, 3), "u1")).save(samples / "000003_3.png")
    assert eval_json(*arguments)[1] != values
    assert calls


def test_a_cache_that_cannot_be_written_costs_no_result(dimo, samples, tmp_path):
    (tmp_path / "file").write_text("in the way")
    arguments = ["eval", "samples", "--protocol", "tiny.toml", "--labels", "filename"]
    out, err = dimo(*arguments, "--cache", tmp_path / "file" / "cache")
    assert "features are not cached" in err
    assert "FID" in out


def test_a_full_disk_costs_no_result(dimo, samples, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half an entry")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bench.features.extraction.np.savez", full)
    arguments = ["eval", "samples", "--protocol", "tiny.toml", "--labels", "filename"]
    out, err = dimo(*arguments, "--cache", "cache")
    assert "No space left on device" in err
    assert "FID" in out
    assert not list((tmp_path / "cache").iterdir())


# --- what does not conform -------------------------------------------------------------------


def test_a_set_that_does_not_conform_is_kept_out_of_tables(dimo, samples, tmp_path):
    (samples / "000039_9.png").unlink()
    arguments = ["eval", "samples", "--protocol", "tiny.toml", "--labels", "filename"]
    _, err = dimo(*arguments, code=2)
    assert "39 images; allowed: 40" in err
    assert "--nonconforming" in err
    assert not (tmp_path / "results").exists()
    out, err = dimo(*arguments, "--nonconforming")
    assert "FID" in out
    assert "in a table of its own" in err
    (path,) = (tmp_path / "results").glob("*.json")
    assert "39 images" in json.loads(path.read_text())["evidence"]["nonconforming"][0]
    report, _ = dimo("report", "--protocol", "tiny.toml")
    assert "Off-protocol (not comparable), N = 39" in report


def rgb(path):
    return Image.open(path).convert("RGB")


FAULTS = {
    "no such path": (shutil.rmtree, "no images at samples"),
    "empty folder": (lambda s: [p.unlink() for p in s.iterdir()], "no image"),
    "truncated": (
        lambda s: (s / "000001_1.png").write_bytes((s / "000001_1.png").read_bytes()[:60]),
        "1 of 40 images cannot be scored .*000001_1.png",
    ),
    "two bad files": (
        lambda s: [(s / f"00000{i}_{i}.png").write_text("no image") for i in (1, 2)],
        "2 of 40 images cannot be scored .*000001_1.png.*000002_2.png",
    ),
    "16 bit": (
        lambda s: Image.fromarray(np.zeros((8, 8), "u2")).save(s / "000001_1.png"),
        "16",
    ),
    "transparent": (
        lambda s: Image.new("RGBA", (8, 8), (1, 2, 3, 9)).save(s / "000001_1.png"),
        "000001_1.png",
    ),
    "grey": (
        lambda s: Image.new("L", (8, 8)).save(s / "000001_1.png"),
        "mode L in 1 image .*000001_1.png",
    ),
    "mixed sizes": (
        lambda s: Image.new("RGB", (9, 8)).save(s / "000001_1.png"),
        "images of 2 sizes",
    ),
    "other size": (
        lambda s: [rgb(p).resize((16, 16)).save(p) for p in s.iterdir()],
        "size 16 x 16 in 40 images .*allowed: 8 x 8",
    ),
    "lossy": (
        lambda s: [(rgb(p).save(p.with_suffix(".jpg")), p.unlink()) for p in list(s.iterdir())],
        "lossy codec jpeg in 40 images",
    ),
    "unbalanced": (
        lambda s: (s / "000001_1.png").rename(s / "000001_2.png"),
        "labels are not balanced",
    ),
    "label out of range": (
        lambda s: (s / "000001_1.png").rename(s / "000001_10.png"),
        "out of range",
    ),
    "copies": (
        lambda s: [shutil.copy(s / "000000_0.png", s / f"{i:06d}_{i}.png") for i in range(1, 10)],
        "9 of 40 images are exact copies",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_and_writes_nothing(dimo, samples, tmp_path, fault):
    harm, words = FAULTS[fault]
    harm(samples)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    out, err = dimo(*("eval", "samples", "--protocol", "tiny.toml", "--labels", "filename"), code=2)
    assert out == ""
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert re.search(words, err), err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_metric_that_cannot_be_had_leaves_a_gap(dimo, samples, tmp_path, monkeypatch):
    """Off-protocol; too few images for KID and neighbours, or no labels, is told first."""
    for path in sorted(samples.iterdir())[3:]:
        path.unlink()
    order = Mock()
    order.extract.side_effect = evaluate_module.extract
    monkeypatch.setattr(evaluate_module, "extract", order.extract)
    monkeypatch.setattr("dimo.util.terminal.warn", order.warn)
    arguments = ("eval", "samples", "--protocol", "tiny.toml", "--nonconforming")
    dimo(*arguments, "--cache", "none")
    steps = [name for name, _, _ in order.mock_calls]
    told = [text for _, (text, *_), _ in order.mock_calls[: steps.index("extract")]]
    (record,), _ = load_all(tmp_path / "results")
    assert list(record.metrics) == ["fid", "inception_score"]
    assert [line.partition(":")[0] for line in told] == [
        "no Prec.", "no Rec.", "no Den.", "no Cov.", "no KID", "no Acc.",
    ]  # fmt: skip
    assert set(told) < set(record.evidence.nonconforming)
    report, _ = dimo("report", "--protocol", "tiny.toml")
    assert "no KID: subset_size = 30; with so few images at most 3" in " ".join(report.split())


def test_one_image_gives_what_it_can(dimo, samples, tmp_path):
    for path in sorted(samples.iterdir())[1:]:
        path.unlink()
    arguments = ("eval", "samples", "--protocol", "tiny.toml", "--labels", "filename")
    _, err = dimo(*arguments, "--nonconforming")
    assert "no FID: features have shape [1, 64]; allowed: at least 2 samples" in err
    (record,), _ = load_all(tmp_path / "results")
    assert list(record.metrics) == ["class_accuracy"]


def test_what_can_be_known_first_is_said_first(dimo, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "extract", Mock(side_effect=AssertionError("too late")))
    (tmp_path / "file").write_text("in the way")
    start = ("eval", "samples", "--protocol", "tiny.toml")
    for arguments, words in (
        (["--labels", "filename", "--results", "file/below"], "file is a file; give a folder"),
        (["--labels", "none"], "no Acc.: the images have no labels that count"),
        (["--labels", "filename", "--name", " "], "name ' ' is blank"),
    ):
        _, err = dimo(*start, *arguments, code=2)
        assert words in err, (arguments, err)


@pytest.mark.usefixtures("dimo")
def test_a_row_of_the_folder_one_is_in_has_its_name(run, samples, tmp_path):
    arguments = ("--protocol", "../tiny.toml", "--labels", "filename", "--results", "../results")
    run("eval", ".", *arguments, cwd=samples)
    (record,), _ = load_all(tmp_path / "results")
    assert record.method.name == "samples"


def one_metric(protocol, name="fid"):
    """The protocol with its first metric only."""
    head, _, rest = protocol.replace('"tiny"', f'"{name}"').partition('[[metrics]]\nname = "incep')
    return head + rest[rest.index("[uncertainty]") :]


def test_labels_that_a_sampler_drew_do_not_count(dimo, tmp_path, real_digits, tiny_protocol):
    """ADM's sampler draws labels at random and stores them; one class needs none at all."""
    pixels, labels = real_digits(40)
    np.savez(tmp_path / "adm.npz", pixels, np.where(labels == 3, 4, labels))
    np.savez(tmp_path / "cyclic.npz", pixels, labels)
    (tmp_path / "fid.toml").write_text(one_metric(tiny_protocol))
    one = one_metric(tiny_protocol, "one").replace("num_classes = 10", "num_classes = 1")
    (tmp_path / "one.toml").write_text(one)
    _, err = dimo("eval", "adm.npz", "--protocol", "fid.toml")
    assert "labels stored with the images are not balanced (from 0 to 8 images of a label)" in err
    for file in ("adm.npz", "cyclic.npz"):
        dimo("eval", file, "--protocol", "one.toml")
    records, _ = load_all(tmp_path / "results")
    assert [record.evidence.labels_sha256 for record in records] == [""] * 3
    assert len({record.metrics["fid"].value for record in records}) == 1
    _, err = dimo("eval", "adm.npz", "--protocol", "tiny.toml", code=2)
    assert "no Acc.: the images have no labels that count" in err
    assert "labels stored with the images are not balanced" in err
    rows = "".join(f"adm.npz[{i}],{min(y, 8)}\n" for i, y in enumerate(labels))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    given = ("--labels", "labels.csv")  # someone's word for it
    _, err = dimo("eval", "adm.npz", "--protocol", "fid.toml", *given, code=2)
    assert "labels are not balanced: 0 images of label 9" in err


def test_the_reference_is_checked_as_the_set_is(dimo, samples, tmp_path, any_reference):
    text = one_metric(any_reference).replace("count = 100", "count = 40")
    (tmp_path / "fid.toml").write_text(text)
    start = ("eval", "samples", "--labels", "filename", "--protocol", "fid.toml", "--reference")
    for half, rows in (("a", range(20)), ("b", range(20, 40))):
        (tmp_path / "real" / half).mkdir(parents=True)
        for path in sorted(samples.iterdir())[rows.start : rows.stop]:
            shutil.copy(path, tmp_path / "real" / half)
    (tmp_path / "real" / "b").rename(tmp_path / "linked")
    (tmp_path / "real" / "b").symlink_to(tmp_path / "linked")
    _, err = dimo(*start, "real", code=2)
    assert "look into the folders with --recursive" in err
    out, _ = dimo(*start, "real", "--recursive", "--json")
    assert abs(json.loads(out)["metrics"]["fid"]["value"]) < 1e-9
    for path in list((tmp_path / "linked").iterdir()):
        rgb(path).save(path.with_suffix(".jpg"))
        path.unlink()
    _, err = dimo(*start, "real", "--recursive", code=2)
    assert "reference: lossy codec jpeg in 20 images" in err
    assert "--nonconforming" in err
    out, _ = dimo(*start, "real", "--recursive", "--json", "--nonconforming")
    (found,) = json.loads(out)["evidence"]["nonconforming"]
    assert found.startswith("reference: lossy codec jpeg in 20 images")


def test_statistics_are_enough_off_protocol(dimo, samples, tmp_path, any_reference):
    (tmp_path / "open.toml").write_text(any_reference.replace('"tiny"', '"open"'))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=np.eye(64), n=100)
    start = ("eval", "samples", "--labels", "filename", "--protocol", "open.toml", "--reference")
    _, err = dimo(*start, "stats.npz", code=2)
    assert "needs the features of single images" in err
    out, _ = dimo(*start, "stats.npz", "--json", "--nonconforming")
    assert list(json.loads(out)["metrics"]) == ["fid", "inception_score", "class_accuracy"]
    assert len(json.loads(out)["evidence"]["nonconforming"]) == 5


def test_images_sorted_by_class_do_not_pass_for_cyclic_ones(samples, eval_json):
    """Labels by position fit images in cyclic order only; the order of images changes no IS."""
    mixed = eval_json("samples", "--labels", "cyclic:10")[1]
    paths = sorted(samples.iterdir(), key=lambda path: path.stem[-1])
    for i, path in enumerate(paths):
        path.rename(samples / f"sorted_{i:06d}_{path.stem[-1]}.png")
    by_position = eval_json("samples", "--labels", "cyclic:10")[1]
    by_name = eval_json("samples", "--labels", "filename")[1]
    assert by_position["class_accuracy"] < 0.5 < 0.95 < by_name["class_accuracy"]
    for name in ("fid", "precision", "recall", "density", "coverage"):
        assert by_name[name] == pytest.approx(mixed[name], rel=1e-9)
    assert by_name["inception_score"] == pytest.approx(mixed["inception_score"], rel=0.15)


def test_faults_of_references_and_options(dimo, samples, tmp_path, real_digits, any_reference):
    np.savez(tmp_path / "wrong.npz", mean=np.zeros(64))
    np.savez(tmp_path / "dims.npz", mu=np.zeros(3), sigma=np.eye(3), n=100)
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64), n=5)
    np.savez(tmp_path / "own.npz", arr_0=real_digits(40)[0])
    (tmp_path / "open.toml").write_text(any_reference.replace('"tiny"', '"open"'))
    (tmp_path / "fid.toml").write_text(one_metric(any_reference))
    np.savez(tmp_path / "pool.npz", pool_3=np.zeros((100, 64)))
    np.savez(tmp_path / "half.npz", mu=np.zeros(64, "f2"), sigma=np.eye(64), n=100)
    np.savez(tmp_path / "few.npz", mu=np.zeros(64), sigma=np.eye(64), n=5)
    np.save(tmp_path / "array.npy", np.zeros((100, 64)))
    torch.save({"mu": torch.zeros(64)}, tmp_path / "stats.pt")
    start = ["eval", "samples", "--labels", "filename", "--protocol"]
    for arguments, words in (
        (["tiny.toml", "--reference", "none.npz"], "no reference at none.npz"),
        (["tiny.toml", "--reference", "own.npz"], "the protocol names 8a34b04f4383"),
        (["open.toml"], "compares with my-digits, which does not come with dimo"),
        (["open.toml", "--reference", "wrong.npz"], "holds mean"),
        (["open.toml", "--reference", "dims.npz"], "features of single images"),
        (["open.toml", "--reference", "own.npz"], "40 images, the protocol 100"),
        (["fid.toml", "--reference", "dims.npz"], "dimension"),
        (["fid.toml", "--reference", "nan.npz"], "non-finite"),
        (["fid.toml", "--reference", "wrong.npz"], "holds mean; allowed: an .npz with mu"),
        (["fid.toml", "--reference", "pool.npz"], "holds pool_3; allowed: an .npz with mu"),
        (["fid.toml", "--reference", "half.npz"], "mu of half.npz is float16"),
        (["fid.toml", "--reference", "few.npz"], "are of 5 images; allowed: 100 or more"),
        (["fid.toml", "--reference", "array.npy"], "array.npy is a single array"),
        (["fid.toml", "--reference", "stats.pt"], "stats.pt is a file of PyTorch or Python"),
        (["tiny.toml", "--extractor-weights", "samples/000000_0.png"], "sha256"),
        (["tiny.toml", "--section", "Best"], "unknown section 'Best'"),
        (["tiny.toml", "--labels", "none.csv"], "none.csv"),
        (["tine"], "unknown protocol 'tine'"),
    ):
        _, err = dimo(*start, *arguments, code=2)
        assert words in err, (arguments, err)
        assert err.count("error:") == 1
    assert not (tmp_path / "results").exists()


def test_features_from_elsewhere_are_scored_outside_the_protocol(dimo, tmp_path, tiny_protocol):
    features = np.random.RandomState(0).randn(50, 64).astype("f4")
    np.savez(tmp_path / "feats.npz", features=features)
    text = tiny_protocol
    for name in ("inception_score", "class_accuracy"):
        head, _, rest = text.partition(f'[[metrics]]\nname = "{name}"')
        text = head + rest[rest.index("\n[") + 1 :]
    (tmp_path / "tiny.toml").write_text(text)
    _, err = dimo("eval", "feats.npz", "--protocol", "tiny.toml", code=2)
    assert "do not say from which images" in err
    out, _ = dimo("eval", "feats.npz", "--protocol", "tiny.toml", "--nonconforming")
    assert "KID" in out
    (tmp_path / "tiny.toml").write_text(tiny_protocol)
    _, err = dimo("eval", "feats.npz", "--protocol", "tiny.toml", "--nonconforming")
    assert "no IS: the features have no logits" in err


OWN = '\nname = "own"\nsha256 = "any"\ncount = 40\n'


# --- code of one's own -----------------------------------------------------------------------


def test_an_extractor_of_ones_own_needs_permission(
    dimo, samples, tmp_path, monkeypatch, tiny_protocol
):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Mean(torch.nn.Module):\n"
        "    def __init__(self, weights):\n"
        "        super().__init__()\n"
        "    def forward(self, images):\n"
        "        return {'features': images.float().mean(1).flatten(1)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = tiny_protocol.replace('"digits-cnn"', '"mine:Mean"')
    text = text.replace("0eadf646999892aae206189b18cd53ecef8c14cd23e8e7f7cc5bdd1a2861eecd", "any")
    head, _, rest = text.partition('[[metrics]]\nname = "inception_score"')
    (tmp_path / "tiny.toml").write_text(head + rest[rest.index("[uncertainty]") :])
    _, err = dimo("eval", "samples", "--protocol", "tiny.toml", code=2)
    assert "--allow-code" in err
    arguments = ("eval", "samples", "--protocol", "tiny.toml", "--allow-code", "--cache", "cache")
    open_text = (tmp_path / "tiny.toml").read_text()
    own = open_text.replace(open_text.partition("[reference]")[2].partition("[[")[0], OWN)
    (tmp_path / "own.toml").write_text(own.replace('"tiny"', '"own"'))
    dimo("reference", "samples", "--protocol", "own.toml", "--allow-code", "-o", "own.npz")
    dimo(*arguments)
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("images.float()", "(images.float() / 2)"))
    monkeypatch.delitem(sys.modules, "mine")  # as in a new process
    for _ in range(2):  # the second from the cache
        dimo(*arguments)
    first, second, third = load_all(tmp_path / "results")[0]
    assert first.metrics["fid"].value > 2 * second.metrics["fid"].value
    assert second.metrics == third.metrics
    codes = [record.evidence.extractor_sha256 for record in (first, second, third)]
    assert codes[0] != codes[1] == codes[2]
    reference = ("--protocol", "own.toml", "--reference", "own.npz")
    _, err = dimo("eval", "samples", *reference, "--allow-code", code=2)
    assert "own.npz was made with other weights or code of 'mine:Mean'" in err
