"""The command line as a user meets it: help, the whole chain, one clear line for each mistake."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dimo import cli
from dimo.cli import main
from dimo.cli.options import parse_labels
from dimo.engine.distributed import choose_device
from dimo.errors import DimoError
from dimo.zoo.teachers import TEACHERS

TINY = ["--set", "steps=4", "--set", "batch_size=4", "--set", "checkpoint_every=4"]


@pytest.fixture(scope="module")
def world(run, tmp_path_factory):
    """A folder with a finished tiny run and a results folder with two records."""
    folder = tmp_path_factory.mktemp("world")
    run("distill", "--teacher", "digits", *TINY, "--out", "tiny", cwd=folder)
    run("bench", "--student", "tiny", "--steps", "2", "--no-reference-rows", cwd=folder)
    return folder


def test_bench_writes_records_and_prints_a_table(world):
    paths = sorted((world / "results").glob("*.json"))
    assert len(paths) == 2
    record = json.loads(paths[0].read_text())
    assert record["protocol"]["name"] == "digits"
    assert record["method"]["token_counts"] == [5, 11]
    assert set(record["metrics"]) == {
        "fid",
        "inception_score",
        "precision",
        "recall",
        "density",
        "coverage",
        "class_accuracy",
        "kid",
        "mind",
    }
    for name, value in record["metrics"].items():
        assert value["low"] <= value["value"] <= value["high"]
        assert value["n"] == 5000, name
    assert record["speed"]["images_per_second"] > 0
    assert record["packages"]["torch"]


def test_report_shows_measured_rows_apart_from_quoted_ones(run, world):
    text = run("report", cwd=world).stdout
    measured, quoted = text.split("Quoted results", 1)
    assert "(tiny)" in measured
    assert "2503.15457" in quoted
    assert "6.91" in quoted
    assert "6.91" not in measured


def test_results_are_append_only(run, world, few_digits):
    before = {p.name: p.read_bytes() for p in (world / "results").glob("**/*.*")}
    run("bench", "--steps", "1", "--no-reference-rows", "--protocol", few_digits, cwd=world)
    after = {p.name: p.read_bytes() for p in (world / "results").glob("**/*.*")}
    assert len(after) == len(before) + 3  # the record, its contributions and its picture
    assert all(after[name] == content for name, content in before.items())


def test_the_same_seed_gives_the_same_numbers_at_any_batch_size(run, world, few_digits, tmp_path):
    values = []
    for size in (64, 250):
        done = run(
            *("bench", "--steps", "4", "--no-reference-rows", "--batch-size", size, "--json"),
            *("--results", tmp_path / str(size), "--protocol", few_digits),
            cwd=world,
        )
        metrics = json.loads(done.stdout)[0]["metrics"]
        values.append({name: found["value"] for name, found in metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-8)


def test_tuning_looks_at_the_selection_seed_only(run, world, few_digits, tmp_path):
    done = run(
        *("bench", "--steps", "", "--student", "digits-dimo", "--no-reference-rows", "--json"),
        *("--tune", "temperature=0.8,1", "--results", tmp_path, "--protocol", few_digits),
        cwd=world,
    )
    method = json.loads(done.stdout)[0]["method"]
    assert method["temperature"] in (0.8, 1.0)
    assert "seed 2000" in method["selected_by"]
    assert "temperature in {0.8, 1}" in method["selected_by"]


def test_sample_draws_a_grid(run, world):
    models = ("--model", "digits", "--model", "tiny")
    run("sample", *models, "--steps", "1,4", "--labels", "3,7", cwd=world)
    with Image.open(world / "samples.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors(4096)) > 10
    run("sample", "--labels", "3", "--steps", "1", cwd=world, code=2)
    run("sample", "--labels", "3", "--steps", "1", "--force", cwd=world)
    at = ("sample", *models, "--steps", "1", "--labels", "3,7", "--checkpoint")
    run(*at, "4", "--out", "at4.png", cwd=world)
    assert "only of [4]" in run(*at, "3", "--out", "at3.png", cwd=world, code=2).stderr


MISTAKES = {
    "unknown teacher": (["distill", "--teacher", "digit"], "did you mean 'digits'"),
    "unknown protocol": (["bench", "--protocol", "digit"], "did you mean 'digits'"),
    "unknown protocol in report": (["report", "--protocol", "adm"], "unknown protocol 'adm'"),
    "unknown recipe": (["distill", "--recipe", "digts"], "did you mean 'digits'"),
    "unknown recipe key": (["distill", "--set", "step=3"], "did you mean 'steps'"),
    "steps 17": (["bench", "--steps", "17"], "takes 1 to 16 steps"),
    "steps 17 in sample": (["sample", "--steps", "17", "--out", "x.png"], "takes 1 to 16 steps"),
    "missing run": (["bench", "--student", "nowhere"], "does not exist"),
    "student too long for a path": (
        ["sample", "--model", "x" * 300, "--out", "x.png"],
        "no path (File name too",
    ),
    "missing run to resume": (["distill", "--resume", "--out", "no"], "no run to resume"),
    "output exists": (["distill", "--out", "tiny"], "not empty"),
    "demo output exists": (["demo", "--out", "."], "not empty, it has results"),
    "label out of range": (["sample", "--labels", "10", "--out", "x.png"], "from 0 to 9"),
    "bound of guidance": (["sample", "--guidance-scale", "inf", "--out", "x.png"], "at most 1e6"),
    "bound of temperature": (["sample", "--temperature", "1e40", "--out", "x.png"], "at most 1e6"),
    "bound of noise": (["bench", "--choice-temperature", "inf"], "at most 1e6"),
    "home in an option": (["sample", "--out=~/x.txt"], "--out /home/someone/x.txt is not a .png"),
    "bad tuning": (["bench", "--tune", "temprature=1"], "settings: guidance_scale, temperature"),
    "unknown device": (["bench", "--device", "tpu9"], "allowed: auto, cpu"),
    "device without data": (["distill", "--device", "meta", "--out", "no"], "allowed: auto, cpu"),
    "device of another kind": (["bench", "--device", "hpu"], "allowed: auto, cpu"),
    "missing weights": (["bench", "--weights", "nowhere"], "--weights"),
    "teacher too long for a path": (["distill", "--teacher", "x" * 5000], "unknown teacher"),
    "nothing to train": (["train"], "train needs one of --data, --teacher and --extractor"),
    "unknown extractor": (["train", "--extractor", "vgg"], "allowed: digits-cnn"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(run, mistake, world, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    arguments, words = MISTAKES[mistake]
    before = sorted(world.rglob("*"))
    done = run(*arguments, cwd=world, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert sorted(world.rglob("*")) == before


def test_ranks_that_torchrun_did_not_start(run, tmp_path, monkeypatch):
    """Another launcher, or a variable that is left over in a shell."""
    monkeypatch.setenv("RANK", "1")
    done = run("distill", "--teacher", "nosuch", cwd=tmp_path, code=2)
    assert "unknown teacher 'nosuch'" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    done = run("distill", *TINY, "--score-every", "0", "--sample-every", "0", cwd=tmp_path, code=2)
    assert "WORLD_SIZE is 2, but torchrun did not start this process" in done.stderr
    assert not list(tmp_path.iterdir())
    if not torch.cuda.is_available():
        with pytest.raises(DimoError, match=r"'cuda' \(cuda:0\) is not available"):
            choose_device("cuda")


@pytest.mark.parametrize(("shared", "count"), [(True, 0), (False, 1)])
def test_a_rank_says_what_it_alone_has_found(run, tmp_path, monkeypatch, shared, count):
    def fail():
        error = DimoError("no weights file on this machine")
        error.is_shared = shared
        raise error

    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK")
    for name in (*names, "RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(cli, "app", fail)
    assert run("distill", cwd=tmp_path, code=2).stderr.count("error: no weights file") == count


def test_a_corrupt_record_is_named_and_left_out(run, world, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    source = next((world / "results").glob("*.json"))
    text = source.read_text()
    (results / source.name).write_text(text)
    (results / "half.json").write_text(text[: len(text) // 2])
    (results / "edited.json").write_text(text.replace('"seed": 1000', '"seed": 1001'))
    done = run("report", "--results", results, cwd=world)
    assert "half.json" in done.stderr
    assert "edited.json" in done.stderr


def test_the_installed_command(tmp_path):
    """Shipped protocols are found from any folder; one line and an exit code for a mistake."""
    dimo = Path(sys.executable).with_name("dimo")

    def call(*arguments):
        return subprocess.run([dimo, *arguments], cwd=tmp_path, capture_output=True, text=True)

    done = call("protocols", "show", "digits")
    assert done.returncode == 0, done.stderr
    assert 'name = "digits"' in done.stdout
    done = call("protocols", "show", "digit")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_labels_are_numbers_ranges_and_names():
    names = ("tench", "golden retriever", "crane", "crane", "T-shirt")
    birds = dataclasses.replace(TEACHERS["digits"], num_classes=5, names=lambda: names)
    assert parse_labels("0-2, 4,Golden_Retriever,t-shirt", birds) == [0, 1, 2, 4, 1, 4]
    assert parse_labels("0-9", TEACHERS["digits"]) == list(range(10))
    for text, said in (
        ("5", "from 0 to 4"),
        ("3-5", "'5' is not allowed"),
        ("", "'' is not allowed"),
        ("-1", "'-1' is not allowed"),
        ("golden retreiver", "did you mean 'golden retriever'"),
        ("crane", "as classes 2 and 3 have that name"),
    ):
        with pytest.raises(DimoError, match=said):
            parse_labels(text, birds)


def test_a_user_without_a_home_is_told_what_to_set(run, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("DIMO_CACHE", "DIMO_WEIGHTS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for command in (
        ("weights", "list"),
        ("sample", "--model", "maskgit", "--labels", "1"),
        ("bench", "--device", "cpu", "--steps", "1", "--num-images", "50"),
    ):
        done = run(*command, cwd=tmp_path, code=2)
        assert "set HOME to a folder that can be written" in done.stderr


def test_a_table_is_printed_in_any_encoding(monkeypatch, tmp_path):
    for encoding in ("latin-1", "ascii"):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "argv", ["dimo", "report"])
            with pytest.raises(SystemExit) as stop:
                main()
        assert not stop.value.code
        out.flush()
        assert b"?" in out.buffer.getvalue()
