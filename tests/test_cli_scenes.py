"""A teacher of prompts as a user meets it: tuned, watched and verified under its own protocol."""

import dataclasses
import json
import sys

import pytest
import torch

from bench.images.codec import encode_png
from bench.monitor import Watching, watching
from bench.protocol import load_protocol, protocol_text
from bench.records.record import record_to_json, seal
from bench.records.store import load_all
from bench.rows.rows import jobs_of
from bench.rows.settings import Choice
from bench.suites.base import load_suite
from bench.suites.geneval.prompts import bundled_prompts
from bench.suites.geneval.suite import GenEvalSuite
from dimo.cli import main
from dimo.config import load_recipe
from dimo.data import scenes
from dimo.engine.distributed import Runtime
from dimo.engine.runs import distill, train_teacher
from dimo.errors import DimoError
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.pretraining import TrainRecipe
from dimo.zoo.loading import load_teacher

CPU = torch.device("cpu")
HELD_OUT = [metadata["prompt"] for metadata in bundled_prompts()]


def run(monkeypatch, folder, *arguments):
    """Exit code of `dimo ARGUMENTS` in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dimo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def distil(out, weights, *watchers):
    recipe = load_recipe(DiMORecipe, "scenes", ["steps=3", "batch_size=4"])
    distill(recipe, out, recipe_name="x", runtime=Runtime(CPU), weights=weights, watchers=watchers)


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_prompts):
    """A teacher and a student, barely trained, a protocol of few images, pictures in files."""
    folder = tmp_path_factory.mktemp("world")
    text = protocol_text("scenes-geneval")
    for old, new in (
        ('name = "scenes-geneval"', 'name = "tiny"'),
        ("num_images = 960", "num_images = 240"),
        ("n_select = 480", "n_select = 240"),
        ("images_per_prompt = 4", "images_per_prompt = 1"),
        ("n_bootstrap = 1000", "n_bootstrap = 20"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "tiny.toml").write_text(text)
    settings = ["steps=2", "batch_size=4", "tokenizer_steps=8"]
    train_teacher(
        load_recipe(TrainRecipe, "scenes-teacher", settings),
        folder / "teacher",
        runtime=Runtime(CPU),
    )
    distil(folder / "student", folder / "teacher")
    write_prompts(folder / "images", bundled_prompts())
    images, _ = scenes.batch(21, torch.arange(240), "held-out")
    for number, pixels in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        place = folder / "images" / f"{number:05d}" / "samples"
        place.mkdir()
        (place / "0000.png").write_bytes(encode_png(pixels))
    return folder


# --- tuned rows, and `dimo verify` ----------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(world):
    """Record by name: of the reference, a tuned teacher and student, and of a set of images."""
    common = ("--protocol", "tiny.toml")
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (
            ("bench", "--teacher", "scenes", "--weights", "teacher", "--student", "student")
            + ("--steps", "1", "--tune", "temperature=1,0.5", *common),
            ("eval", "images", *common),
        ):
            assert run(patch, world, *arguments) == 0
    records, problems = load_all(world / "results")
    assert not problems
    return {record.method.name: record for record in records}


@pytest.fixture
def dimo(world, monkeypatch, capsys):
    """`dimo(..., code=0)` -> (stdout, stderr), in the world's folder."""

    def call(*arguments, code=0):
        capsys.readouterr()
        found = run(monkeypatch, world, *arguments)
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return call


ROWS = {
    "real": "Real data",
    "tokenizer": "Tokenizer reconstruction",
    "teacher": "MaskGIT-scenes",
    "student": "Di[M]O (student)",
    "images": "images",
}
VERIFY = ("--protocol", "tiny.toml", "--weights", "teacher")


def test_every_kind_of_row_is_there(rows):
    assert set(rows) == set(ROWS.values())


@pytest.fixture(scope="module")
def bench(world):
    fixed = load_protocol(world / "tiny.toml")
    return load_suite(fixed, Runtime(CPU), batch_size=120)


@pytest.fixture(scope="module")
def loaded(world):
    return load_teacher("scenes", device=CPU, weights=world / "teacher", prompts=HELD_OUT)


class Painter:
    """Decodes any tokens to rendered pictures of the prompts in order, a third of them wrong."""

    def __init__(self):
        self.done = 0

    def decode(self, tokens):
        index = torch.arange(self.done, self.done + len(tokens))
        self.done += len(tokens)
        images, _ = scenes.batch(1000, index + (index % 3 == 0), "held-out")
        return images / 127.5 - 1


def test_the_criterion_is_the_metric_of_the_table(bench, loaded):
    one, other = (
        jobs_of(dataclasses.replace(loaded, tokenizer=Painter()), [1])[0] for _ in range(2)
    )
    value = bench.measure(one).record.metrics["geneval"].value
    assert 0.6 < value < 0.9
    assert bench.quality(other, seed=2000, num_images=240) == value


def test_settings_are_chosen_on_the_selection_seed_by_geneval(rows, bench, loaded):
    record = rows[ROWS["teacher"]]
    sweep = record.method.tuning
    assert (sweep.seed, sweep.num_images, record.seed) == (2000, 240, 1000)
    assert [trial.settings for trial in sweep.trials] == [{"temperature": 1}, {"temperature": 0.5}]
    assert sweep.chosen == sweep.values.index(max(sweep.values))
    assert record.method.temperature == sweep.trials[sweep.chosen].settings["temperature"]
    (job,) = jobs_of(loaded, [1], Choice(settings={"temperature": record.method.temperature}))
    # to the bit: the sweep is what it says
    assert bench.quality(job, seed=2000, num_images=240) == sweep.values[sweep.chosen]


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_record_keeps_its_sweep_and_shows_what_it_chose_by(dimo, rows, kind):
    record = rows[ROWS[kind]]
    trials = json.loads(record_to_json(record))["method"]["tuning"]["trials"]
    assert [trial.keys() for trial in trials] == [{"settings", "geneval", "other_scores"}] * 2
    assert all({"fid", "clip_score"} < trial["other_scores"].keys() for trial in trials)
    out, _ = dimo("results", "show", record.run_id[:12])
    assert "GenEval on seed 2000, 240 images" in out
    assert "highest GenEval on seed 2000" in out
    report, _ = dimo("report", "--protocol", "tiny.toml", "--settings", "-f", "markdown")
    assert "chosen: highest GenEval on seed 2000, 240 images, over temperature" in report


# test_cli_results.py does so for each kind of row of the digits
@pytest.mark.parametrize(
    "kind",
    [
        *("teacher", "images"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("real", "tokenizer", "student")),
    ],
)
def test_a_row_is_run_again_to_the_bit(dimo, rows, world, kind):
    record = rows[ROWS[kind]]
    images = ("--images", "images") if kind == "images" else ()
    before = sorted((world / "results").rglob("*"))
    out, _ = dimo("verify", record.run_id[:12], *VERIFY, "--json", *images)
    found = json.loads(out)
    assert found["within"] is found["equal"] is found["same_images"] is True
    assert found["metrics"].keys() == record.metrics.keys()
    assert found["metrics"]["geneval"]["found"] == record.metrics["geneval"].value
    assert sorted((world / "results").rglob("*")) == before


@pytest.mark.slow
def test_what_is_not_as_recorded_is_refused(dimo, rows, world):
    def refused(record, *arguments, **changes):
        path = world / "changed.json"
        path.write_text(record_to_json(seal(dataclasses.replace(record, **changes))))
        out, err = dimo("verify", path, *VERIFY, *arguments, code=2)
        assert out == ""
        assert err.count("error: ") == 1
        assert err.splitlines()[-1].startswith("error: ")
        return err

    teacher, images = rows[ROWS["teacher"]], rows[ROWS["images"]]
    for what in ("detector", "prompts"):
        evidence = dataclasses.replace(teacher.evidence, **{f"{what}_sha256": "0" * 64})
        assert f"{what} has sha256" in refused(teacher, evidence=evidence)
    evidence = dataclasses.replace(images.evidence, images_sha256="0" * 64)
    other = refused(images, "--images", "images", evidence=evidence)
    assert "not what was measured" in other
    assert "name it with --images" in refused(images)
    twice = ("--images", "images", "--images", "images")
    assert "allowed: one under 'tiny'" in refused(images, *twice)
    assert "--prompts x is not used" in refused(images, "--images", "images", "--prompts", "x")
    renamed = dataclasses.replace(rows[ROWS["real"]].method, name="Unreal data")
    assert "no reference row 'Unreal data'" in refused(rows[ROWS["real"]], method=renamed)
    assert "cannot be read" in refused(teacher, "--prompts", "x")


# --- a watched distillation -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_is_scored_on_the_protocol_s_prompts_and_not_touched(
    world, tmp_path, monkeypatch
):
    scored, quality = [], GenEvalSuite.quality

    def noted(bench, job, **how):
        scored.append((list(job.loaded.condition_names), quality(bench, job, **how)))
        return scored[-1][1]

    monkeypatch.setattr(GenEvalSuite, "quality", noted)
    wanted = Watching(sample_every=3, score_every=3, score_protocol=str(world / "tiny.toml"))
    recipe = load_recipe(DiMORecipe, "scenes", ["steps=3", "batch_size=4"])
    out, weights = tmp_path / "run", world / "teacher"
    with watching(wanted, recipe, out, device=CPU, weights=weights) as watchers:
        distil(out, weights, *watchers)
    student = "student.safetensors"
    assert (out / student).read_bytes() == (world / "student" / student).read_bytes()
    assert [prompts for prompts, _ in scored] == [HELD_OUT] * 2
    lines = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3]
    assert [line["geneval"] for line in lines] == [score for _, score in scored]
    assert all((line["images"], line["seed"]) == (240, 2000) for line in lines)
    assert all(line.keys() == {"step", "geneval", "images", "seed", "seconds"} for line in lines)


def test_the_embedded_teacher_finds_its_protocol(world, tmp_path):
    recipe = load_recipe(DiMORecipe, "scenes", ["steps=3"])
    for wanted, count in ((Watching(0), 2), (Watching(0, 1), 2), (Watching(0, 0), 1)):
        context = watching(wanted, recipe, tmp_path / "run", device=CPU, weights=world / "teacher")
        with context as watchers:
            assert len(watchers) == count
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("teacher", "protocol", "words"),
    [
        ("meissonic", "geneval-hf", "those of protocol 'geneval-hf' do not"),
        ("meissonic", "hpsv2-v2.1", "scored by one of GenEval, FID, FD-DINOv2, and"),
        ("maskgit", "imagenet256-cmmd", "protocol 'imagenet256-cmmd' has none"),
    ],
)
def test_what_no_training_is_scored_by_is_refused(teacher, protocol, words, tmp_path):
    recipe = dataclasses.replace(load_recipe(DiMORecipe, "digits", ["steps=3"]), teacher=teacher)
    wanted = Watching(score_protocol=protocol)
    context = watching(wanted, recipe, tmp_path / "run", device=CPU, weights=None)
    with pytest.raises(DimoError, match=words):
        context.__enter__()
