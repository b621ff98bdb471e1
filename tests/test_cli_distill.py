"""`dimo distill` watched, `--dry-run`, and runs exchanged, as a user meets them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench.monitor import Watching, watching
from bench.protocol.catalog import data_dir
from bench.rows.rows import load_planned, plan_models
from bench.rows.settings import sample_images
from dimo.config import load_distillation
from dimo.engine.distributed import Runtime
from dimo.engine.runs import distill, find_recipe
from dimo.errors import DimoError
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.weights.catalog import ASSETS

CPU = torch.device("cpu")


class InterruptedTrainingError(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """The protocol `digits` with 200 images to choose on."""
    path = tmp_path_factory.mktemp("protocol") / "digits.toml"
    text = (data_dir("protocols") / "digits.toml").read_text()
    path.write_text(text.replace("n_select = 2000", "n_select = 200"))
    return path


RECIPE = DiMORecipe(
    teacher="digits",
    steps=80,
    batch_size=4,
    learning_rate=1e-3,
    auxiliary_learning_rate=1e-3,
    dropout=0.1,
    checkpoint_every=30,
    temperature=0.5,
)


def distil(out, wanted, recipe=RECIPE, **options):
    with watching(wanted, recipe, out, device=CPU, weights=None) as watchers:
        distill(recipe, out, recipe_name="test", runtime=Runtime(CPU), watchers=watchers, **options)
    return out


@pytest.fixture(scope="module")
def watched(protocol, tmp_path_factory):
    wanted = Watching(sample_every=40, score_every=20, score_protocol=str(protocol))
    return distil(tmp_path_factory.mktemp("watched") / "run", wanted), wanted


def curve_of(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_watching_changes_no_bit(watched, tmp_path):
    folder, _ = watched
    distill(RECIPE, tmp_path / "run", recipe_name="test", runtime=Runtime(CPU))
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_what_a_watched_run_holds(watched):
    folder, _ = watched
    pictures = sorted(path.name for path in (folder / "samples").iterdir())
    assert pictures == ["step-0000000.png", "step-0000040.png", "step-0000080.png"]
    images = []
    for name in pictures:
        with Image.open(folder / "samples" / name) as picture:
            images.append(np.asarray(picture.convert("L")).astype(int))
    half = images[0].shape[0] // 2
    assert (images[0][:half] == images[2][:half]).all()  # the teacher's rows
    assert (images[0][half:] != images[2][half:]).any()
    curve = curve_of(folder)
    assert [line["step"] for line in curve] == [0, 20, 40, 60, 80]
    assert all((line["images"], line["seed"]) == (200, 2000) for line in curve)
    assert all(line.keys() == {"step", "fid", "images", "seed", "seconds"} for line in curve)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    fids = [(event.step, event.value) for event in events.Scalars("eval/fid")]
    assert fids == [(line["step"], pytest.approx(line["fid"])) for line in curve]
    assert [event.step for event in events.Scalars("train/auxiliary_loss")] == [50, 80]
    assert [image.step for image in events.Images("samples")] == [0, 40, 80]


def test_a_resumed_run_has_each_step_once(watched, tmp_path):
    folder, wanted = watched

    def stop(step, scalars):
        if step == 70:
            raise InterruptedTrainingError

    out = tmp_path / "run"
    with pytest.raises(InterruptedTrainingError):
        distil(out, wanted, on_step=stop)
    assert [line["step"] for line in curve_of(out)] == [0, 20, 40, 60]
    distil(out, wanted, resume=True)  # from step 60
    fids = [[(line["step"], line["fid"]) for line in curve_of(place)] for place in (folder, out)]
    assert fids[0] == fids[1]
    names = [sorted(p.name for p in (place / "samples").iterdir()) for place in (folder, out)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folder / "samples" / name).read_bytes() == (out / "samples" / name).read_bytes()
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/fid")] == [0, 20, 40, 60, 80]
    assert [image.step for image in events.Images("samples")] == [0, 40, 80]


def test_watching_can_be_left_out(tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=2)
    distil(tmp_path / "run", Watching(sample_every=0, score_every=0), recipe)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"samples", "curve.jsonl"}
    assert "tensorboard" in names


def test_only_the_first_rank_watches(tmp_path):
    out = tmp_path / "run"
    with watching(Watching(), RECIPE, out, device=CPU, weights=None, is_first=False) as found:
        assert found == ()
    assert not out.exists()


def test_a_teacher_without_a_tokenizer_here_has_no_pictures(small_maskgit, tmp_path, capsys):
    (small_maskgit / "last.ckpt").unlink()
    recipe = DiMORecipe(
        teacher="maskgit",
        steps=1,
        batch_size=2,
        learning_rate=1e-4,
        auxiliary_learning_rate=1e-4,
    )
    out = tmp_path / "run"
    with watching(Watching(), recipe, out, device=CPU, weights=small_maskgit) as watchers:
        assert len(watchers) == 1
    assert "no pictures during training: no last.ckpt" in capsys.readouterr().err


def test_official_teachers_have_pictures_without_the_teacher(small_maskgit, tmp_path):
    recipe = DiMORecipe(
        teacher="maskgit",
        steps=1,
        batch_size=2,
        learning_rate=1e-4,
        auxiliary_learning_rate=1e-4,
    )
    out = tmp_path / "run"
    with watching(Watching(), recipe, out, device=CPU, weights=small_maskgit) as watchers:
        distill(
            recipe,
            out,
            recipe_name="x",
            runtime=Runtime(CPU),
            weights=small_maskgit,
            watchers=watchers,
        )
    assert len(list((out / "samples").iterdir())) == 2
    assert not (out / "curve.jsonl").exists()


def test_three_lines_of_python_sample_a_run(watched):
    folder, _ = watched
    (job,) = load_planned(plan_models([str(folder)], []), device=CPU)
    labels, index = torch.tensor([3, 1, 4]), torch.arange(3)
    batch = sample_images(
        job.loaded, job.settings, labels=labels, seed=0, index=index, uint8="round"
    )
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert (job.settings.temperature, batch.nfe) == (0.5, 1)


def test_dry_run_prints_everything_and_writes_nothing(run, tmp_path):
    arguments = ("distill", "--recipe", "digits", "--set", "batch_size=64", "--dry-run")
    text = run(*arguments, cwd=tmp_path).stdout
    for key in (field.name for field in dataclasses.fields(RECIPE)):
        assert f"\n{key} = " in text or f"\n# {key}: left open\n" in text
    assert "student" in text
    assert "PFLOP" in text
    found = json.loads(run(*arguments, "--json", cwd=tmp_path).stdout)
    assert found["recipe"]["batch_size"] == 64
    assert found["parameters"]["student"] == {"total": 686412, "trainable": 645376, "frozen": 41036}
    memory = found["memory_bytes"]
    fixed = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert memory["peak"] == fixed + memory["activations"] + memory["working"]
    assert sum(found["flops"]["parts"].values()) == 19
    assert found["recipe"].keys() == {field.name for field in dataclasses.fields(RECIPE)}
    assert found["images"] == 64 * 500
    assert not list(tmp_path.iterdir())


def test_dry_run_of_an_official_teacher_needs_no_weights(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DIMO_WEIGHTS", str(tmp_path))
    done = run(
        *("distill", "--teacher", "maskgit", "--device", "cuda", "--dry-run", "--json"),
        cwd=tmp_path,
    )
    found = json.loads(done.stdout)
    assert found["device_type"] == "cuda"
    assert found["parameters"]["teacher"]["total"] == 174160874
    assert sum(found["flops"]["parts"].values()) == 8  # shared samples


def test_a_recipe_names_its_teacher():
    for name in ("digits", "scenes", "maskgit", "halton", "meissonic", "maskgit-di4c"):
        assert find_recipe(recipe=name)[1] == load_distillation(name), name
    assert find_recipe()[0] == "digits"
    for given in ({}, {"recipe": "maskgit"}):  # its row shares the recipe of another
        assert find_recipe("maskgit-512", **given)[1].teacher == "maskgit-512"
    with pytest.raises(DimoError, match="is one of teacher 'maskgit', not 'maskgit-512'"):
        find_recipe("maskgit-512", settings=["teacher=maskgit"])


def test_export_and_import(run, tmp_path):
    run("export", "digits-dimo", "-o", "pytorch_model.bin", cwd=tmp_path)
    done = run(
        *("import", "pytorch_model.bin", "--teacher", "digits", "-o", "runs/again"),
        *("--temperature", "0.5"),
        cwd=tmp_path,
    )
    assert "dimo sample --model runs/again" in done.stderr
    config = json.loads((tmp_path / "runs" / "again" / "config.json").read_text())
    assert (config["temperature"], config["init_mask_ratio"]) == (0.5, 0.6)
    done = run("export", "digits-dimo", "-o", "pytorch_model.bin", cwd=tmp_path, code=2)
    assert "--force" in done.stderr
    run("export", "digits-dimo", "-o", "pytorch_model.bin", "--force", cwd=tmp_path)


MISTAKES = {
    "negative interval": (["distill", "--sample-every", "-1"], "--sample-every -1 is negative"),
    "negative scores": (["distill", "--score-every", "-5"], "--score-every -5 is negative"),
    "unknown protocol": (["distill", "--score-protocol", "digit"], "did you mean 'digits'"),
    "foreign protocol": (
        ["distill", "--score-protocol", "imagenet256-adm"],
        "teacher 'digits' makes 8 x 8 of 10 classes; protocols that fit: digits",
    ),
    "folder under a file": (["distill", "--out", "file/run"], "choose another"),
    "unknown method": (["distill", "--method", "di4cd"], "did you mean 'di4c-d'"),
    "another method": (
        ["distill", "--method", "di4c", "--recipe", "digits-di4c-d"],
        "recipe 'digits-di4c-d' is one of method 'di4c-d', not 'di4c'; leave --method out",
    ),
    "no recipe": (
        ["distill", "--method", "sdtt", "--teacher", "maskgit"],
        "no recipe of method 'sdtt' for teacher 'maskgit' yet",
    ),
    "no data": (["distill", "--data", "file"], "method 'dimo' takes no data; leave out --data"),
    "another network": (
        ["distill", "--recipe", "digits-di4c", "--set", "teacher=halton-tiny", "--dry-run"],
        "method 'di4c' has no student network for teacher 'halton-tiny'",
    ),
    "another teacher": (
        ["distill", "--recipe", "scenes", "--teacher", "digits"],
        "recipe 'scenes' is one of teacher 'scenes', not 'digits'; leave --teacher out",
    ),
    "another teacher to train": (
        ["train", "--recipe", "scenes-teacher", "--teacher", "digits"],
        "recipe 'scenes-teacher' is one of teacher 'scenes', not 'digits'; leave --teacher out",
    ),
    "another extractor to train": (
        ["train", "--recipe", "scenes-clip", "--extractor", "digits-cnn"],
        "recipe 'scenes-clip' is one of extractor 'scenes-clip', not 'digits-cnn'",
    ),
    "json alone": (["distill", "--json"], "add --dry-run"),
    "unknown key": (["distill", "--dry-run", "--set", "step=1"], "did you mean 'steps'"),
    "unfinished": (["export", "unfinished", "-o", "a.bin"], "is not finished"),
    "other network": (
        ["import", ASSETS / "digits-cnn.safetensors", "--teacher", "digits", "-o", "x"],
        "look like those of a digits feature extractor",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(run, mistake, tmp_path):
    arguments, words = MISTAKES[mistake]
    (tmp_path / "file").touch()
    (tmp_path / "unfinished").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = run(*arguments, cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("halton-large", "has no protocol of its own; name one with --score-protocol"),
        ("meissonic", "those of protocol 'geneval-hf' do not"),  # its own
    ],
)
def test_scores_need_a_protocol(teacher, words, tmp_path):
    recipe = DiMORecipe(teacher=teacher, steps=1, learning_rate=1e-4, auxiliary_learning_rate=1e-4)
    wanted, out = Watching(score_every=5), tmp_path / "run"
    context = watching(wanted, recipe, out, device=CPU, weights=None)
    with pytest.raises(DimoError, match=words):
        context.__enter__()
