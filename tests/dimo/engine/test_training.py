"""Distillation and teacher training: resumed equals uninterrupted, bit for bit; frozen stays so."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimo.config import load_distillation, load_recipe
from dimo.engine.checkpoint import latest_checkpoint, save_checkpoint
from dimo.engine.distributed import Runtime
from dimo.engine.loop import differences
from dimo.engine.runs import distill, train_teacher
from dimo.errors import DimoError
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.pretraining import TrainRecipe
from dimo.util.terminal import Stopped, stop_if_asked, stopped_by_signals
from dimo.weights.catalog import ASSETS
from dimo.weights.exchange import export_student
from dimo.weights.files import read_state_dict
from dimo.zoo.loading import load_student, load_teacher
from dimo.zoo.students import checkpoint_of, find_student, recipe_sha256

CPU = torch.device("cpu")


class InterruptedTrainingError(Exception):
    """Stands for a killed process."""


def _recipe(**changes):
    values = {
        "teacher": "digits",
        "steps": 55,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "auxiliary_learning_rate": 1e-3,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 5,
        "beta": 0.3,
        "dropout": 0.1,
        "checkpoint_every": 20,
        "teacher_guidance_scale": 1.5,
    }
    return DiMORecipe(**{**values, **changes})


def _run(recipe, out, **options):
    return distill(recipe, out, recipe_name="test", runtime=Runtime(CPU), **options)


def _stop_at(limit):
    def on_step(step, scalars):
        if step >= limit:
            raise InterruptedTrainingError

    return on_step


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_distillation_is_bit_equal(tmp_path, precision):
    recipe = _recipe(precision=precision)
    _run(recipe, tmp_path / "whole")
    with pytest.raises(InterruptedTrainingError):
        _run(recipe, tmp_path / "parts", on_step=_stop_at(45))
    step, _ = latest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert step == 40  # falls inside a logging window
    _run(recipe, tmp_path / "parts", resume=True)
    files = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    states = [latest_checkpoint(tmp_path / name / "checkpoints")[1] for name in ("whole", "parts")]
    for network in ("student", "auxiliary", "ema"):
        a, b = (state["task"]["networks"][network] for state in states)
        assert all(torch.equal(a[key], b[key]) for key in a)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_cpu_without_bfloat16_trains_in_float32_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("dimo.engine.runs.has_bfloat16", lambda: False)
    for precision in ("bfloat16", "float32"):
        _run(_recipe(precision=precision, steps=2), tmp_path / precision)
    asked, plain = tmp_path / "bfloat16", tmp_path / "float32"
    for file in ("recipe.toml", "student.safetensors"):
        assert (asked / file).read_bytes() == (plain / file).read_bytes()


def test_a_distillation_with_every_control_is_bit_equal_when_resumed(tmp_path):
    recipe = _recipe(
        steps=12,
        checkpoint_every=4,
        divergence="js",
        weighting="dmd",
        token_initialization="fixed",
        init_mask_ratio_range=(0.3, 0.8),
        embedding_noise=0.4,
        embedding_noise_warmup="cos",
        embedding_noise_warmup_steps=10,
        mask_schedule="mage",
        auxiliary_mask_schedule="cosine",
        fully_masked=0.1,
        mask_ratio_range=(0.05, 0.9),
        beta_final=-0.2,
        teacher_guidance="adaptive",
        student_temperature=1.2,
        teacher_temperature=1.1,
        teacher_final_temperature=0.8,
        auxiliary_temperature=0.9,
        soft_targets=0.5,
        soft_target_temperature=2.0,
        label_smoothing=0.1,
        auxiliary_steps=2,
        keep_mask_class=True,
    )
    _run(recipe, tmp_path / "whole")
    with pytest.raises(InterruptedTrainingError):
        _run(recipe, tmp_path / "parts", on_step=_stop_at(6))
    _run(recipe, tmp_path / "parts", resume=True)
    files = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    config = load_student(tmp_path / "parts", device=CPU).student
    assert config.init_mask_ratio == pytest.approx(0.55)
    assert (config.embedding_noise, config.token_initialization) == (0.4, "fixed")


@pytest.mark.slow
def test_a_moving_beta_is_a_constant_one_for_half_a_run(tmp_path):
    runs = {"constant": {"beta": 0.5}, "moving": {"beta": 0.5, "beta_final": -0.5}}
    runs["single"] = {"beta": 0.0, "beta_final": 0.0}
    states = {}
    for name, keys in runs.items():
        out = tmp_path / name
        _run(_recipe(steps=8, checkpoint_every=1, keep_every=1, **keys), out)
        for step in (5, 8):
            file = out / "checkpoints" / f"step-{step:07d}" / "state.pt"
            networks = torch.load(file, weights_only=True)["task"]["networks"]
            states[name, step] = torch.cat([p.flatten() for p in networks["student"].values()])
    assert torch.equal(states["constant", 5], states["moving", 5])  # step 4 is the last at beta
    assert not torch.equal(states["constant", 8], states["moving", 8])
    assert not torch.equal(states["single", 5], states["moving", 5])


@pytest.mark.parametrize("name", ["maskgit", "maskgit-official"])
def test_a_packaged_recipe_runs_on_official_weights(name, small_maskgit, tmp_path):
    recipe = load_recipe(DiMORecipe, name, ["steps=2", "batch_size=3"])
    distill(recipe, tmp_path / "run", recipe_name=name, runtime=Runtime(CPU), weights=small_maskgit)
    found = load_student(tmp_path / "run", device=CPU, weights=small_maskgit)
    assert (found.student.recipe, found.student.init_mask_ratio) == (name, 0.6)


def test_what_distillation_changes_and_what_it_freezes(tmp_path):
    _run(_recipe(steps=20, checkpoint_every=20), tmp_path / "run")
    student = load_student(tmp_path / "run", device=CPU).model
    teacher = load_teacher("digits", device=CPU).model
    for a, b in zip(student.embedding_parameters(), teacher.embedding_parameters(), strict=True):
        assert torch.equal(a, b)
    frozen = {"tok_emb.weight", "pos_emb", "bias"}
    changed = {
        name
        for (name, a), b in zip(student.named_parameters(), teacher.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {name for name, _ in student.named_parameters()} - frozen


def test_the_run_folder_is_complete(tmp_path):
    recipe = _recipe(steps=60, checkpoint_every=60)
    _run(recipe, tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    wanted = {"recipe.toml", "metrics.jsonl", "checkpoints", "student.safetensors", "config.json"}
    assert names == wanted
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [50, 60]
    config = load_student(tmp_path / "run", device=CPU).student
    assert (config.images_seen, config.seed, config.recipe) == (240, 0, "test")
    assert config.recipe_sha256 == recipe_sha256(recipe)


def test_the_hash_of_a_recipe_is_that_of_what_it_trains():
    recipe = _recipe()
    for same in ({"seed": 1}, {"temperature": 0.3}, {"checkpoint_every": 7}, {"accumulate": 2}):
        assert recipe_sha256(dataclasses.replace(recipe, **same)) == recipe_sha256(recipe)
    hashes = {recipe_sha256(recipe)} | {
        recipe_sha256(dataclasses.replace(recipe, **other))
        for other in (
            *({"steps": 999}, {"beta": 0.9}, {"lr_final": 0.5}, {"batch_size": 8}),
            {"teacher_final_temperature": 0.5},
        )
    }
    assert len(hashes) == 6
    shipped = load_student("digits-dimo", device=CPU).student
    trained = load_distillation("digits-full")
    assert shipped.recipe_sha256 == recipe_sha256(trained), "keys that are new do not change it"


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_in_use_a_missing_run_and_another_run_are_refused(tmp_path):
    out = tmp_path / "run"
    recipe = _recipe(steps=5, checkpoint_every=5)
    _run(recipe, out)
    before = contents(out)
    for resume in (False, True):
        with pytest.raises(DimoError, match=r"finished run of this recipe \(5 steps\)"):
            _run(recipe, out, resume=resume)
        changed = dataclasses.replace(recipe, steps=4, beta=0.5)
        words = r"another recipe \(steps = 5, not 4, beta = 0.3, not 0.5\)"
        with pytest.raises(DimoError, match=words):
            _run(changed, out, resume=resume)
    with pytest.raises(DimoError, match="no run to resume"):
        _run(_recipe(), tmp_path / "nowhere", resume=True)
    assert before == contents(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").touch()
    with pytest.raises(DimoError, match="not empty, it has metrics"):
        _run(recipe, tmp_path / "other")


def test_what_is_not_the_runs_is_left_alone(tmp_path):
    """Logs of batch systems, a Mac's folder files, and checkpoints that a user keeps."""
    out, recipe = tmp_path / "run", _recipe(steps=12, checkpoint_every=4)
    others = ["slurm-1.out", ".DS_Store", ".notes.txt.swp.tmp", "checkpoints/.DS_Store"]
    others += ["checkpoints/step-best/state.pt", "checkpoints/step-0000040.bak/state.pt"]
    for name in others[:3]:
        out.mkdir(exist_ok=True)
        (out / name).write_text(name)
    with pytest.raises(InterruptedTrainingError):
        _run(recipe, out, on_step=_stop_at(6))
    for name in others[3:]:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    seen = []
    _run(recipe, out, resume=True, on_step=lambda step, _: seen.append(step))
    assert seen[0] == 4
    assert all((out / name).read_text() == name for name in others)


def test_the_same_command_goes_on_where_it_stopped_and_says_where(tmp_path):
    recipe, out = _recipe(steps=12, checkpoint_every=4), tmp_path / "run"
    with pytest.raises(InterruptedTrainingError):
        _run(recipe, out, on_step=_stop_at(10))
    seen, told = [], []
    runtime = Runtime(CPU, warn=told.append)
    shutil.copytree(out, tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "step-0000008" / "state.pt").write_bytes(b"")
    distill(
        recipe, out, recipe_name="x", runtime=runtime, on_step=lambda step, _: seen.append(step)
    )
    assert seen == [8, 9, 10, 11, 12]
    assert told[0] == f"{out} is continued at step 8 of 12"
    told.clear()
    distill(recipe, tmp_path / "damaged", recipe_name="x", runtime=runtime)
    assert "step-0000008 is damaged" in told[0]
    assert told[1].endswith("is continued at step 4 of 12")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_the_step_and_says_how_to_continue(tmp_path, request, name):
    recipe, number = _recipe(steps=12, checkpoint_every=100), getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    request.addfinalizer(lambda: signal.signal(number, before))

    def stop(step, scalars):
        if step == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped) as stopped, stopped_by_signals():
        _run(recipe, tmp_path / "parts", on_step=stop)
    assert stopped.value.code == 128 + number
    assert "7 of 12 steps are done and saved; rerun the same command" in stopped.value.reason
    assert latest_checkpoint(tmp_path / "parts" / "checkpoints")[0] == 7
    if name == "SIGTERM":
        for folder in ("parts", "whole"):
            _run(recipe, tmp_path / folder)
        files = [tmp_path / folder / "student.safetensors" for folder in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_signal_in_the_middle_of_scoring_saves_the_step(tmp_path):
    def score(step, scalars, task):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            stop_if_asked("as a generator of images does between batches")
            raise AssertionError("scored to the end")

    with pytest.raises(Stopped), stopped_by_signals():
        _run(_recipe(steps=4), tmp_path / "run", watchers=[score])
    assert latest_checkpoint(tmp_path / "run" / "checkpoints")[0] == 2


def test_a_signal_to_one_rank_stops_all_at_one_step(run_ranks, tmp_path):
    told = run_ranks("""
import os, signal, torch
from pathlib import Path
from dimo.config import load_distillation
from dimo.engine.distributed import Runtime, ranks
from dimo.engine.runs import distill
from dimo.util.terminal import Stopped, stopped_by_signals

def watch(step, scalars, task):
    if step == 3 and not task.ranks.is_first:
        os.kill(os.getpid(), signal.SIGUSR1)

recipe = load_distillation("digits", ["steps=9", "batch_size=4", "precision=float32"])
with stopped_by_signals(), ranks() as group:
    runtime = Runtime(torch.device("cpu"), group)
    try:
        distill(recipe, Path("run"), recipe_name="x", runtime=runtime, watchers=[watch])
    except Stopped as stop:
        print(f"{stop.code} {stop.reason}\\n", end="")  # whole, whatever the other rank prints
""")
    assert told.count("138 stopped by SIGUSR1: 3 of 9 steps are done and saved") == 2


def test_a_run_of_other_weights_is_refused(tmp_path):
    recipe = _recipe(steps=12, checkpoint_every=4)
    with pytest.raises(InterruptedTrainingError):
        _run(recipe, tmp_path / "run", on_step=_stop_at(10))
    other = _teacher_weights(tmp_path, lambda weight: weight.add_(0.01))
    before = contents(tmp_path / "run" / "checkpoints")
    with pytest.raises(DimoError, match="began with other weights"):
        _run(recipe, tmp_path / "run", weights=other)
    assert before == contents(tmp_path / "run" / "checkpoints")


def test_a_finished_run_takes_more_steps_and_says_so(tmp_path):
    short = _recipe(steps=8, lr_schedule="constant")
    longer = dataclasses.replace(short, steps=12, checkpoint_every=6)
    told, out = [], tmp_path / "parts"
    _run(short, out)
    distill(longer, out, recipe_name="test", runtime=Runtime(CPU, warn=told.append))
    changes = "steps = 8, not 12, checkpoint_every = 20, not 6"
    assert told[0] == f"{out} is continued at step 8 of 12 with other values than before: {changes}"
    _run(longer, tmp_path / "whole")
    files = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert load_student(out, device=CPU).student.images_seen == 48
    shutil.rmtree(out / "checkpoints")
    before = contents(out)
    with pytest.raises(DimoError, match="without the checkpoints that more steps need"):
        _run(dataclasses.replace(longer, steps=20), out)
    assert contents(out) == before


def test_what_may_change_in_a_resumed_run(monkeypatch):
    recipe = _recipe(precision="bfloat16")
    old = dataclasses.asdict(recipe)
    free = {"accumulate": 2, "gradient_checkpointing": True, "keep_every": 5, "max_skipped": 3}
    changed = dataclasses.replace(recipe, **free, seed=1, ema_decay=0.5)
    allowed, refused = differences(old, changed, CPU)
    assert {part.split()[0] for part in allowed.split(", ")[::2]} == set(free)
    assert refused == "seed = 0, not 1, ema_decay = 0.999, not 0.5"
    in_float32 = dataclasses.replace(recipe, precision="float32")
    for has, place in ((True, 1), (False, 0)):
        monkeypatch.setattr("dimo.engine.loop.has_bfloat16", lambda has=has: has)
        assert "precision" in differences(old, in_float32, CPU)[place]
    phases = load_distillation("digits-sdtt")
    more = dataclasses.replace(phases, steps=2 * phases.steps)
    assert differences(dataclasses.asdict(phases), more, CPU)[1].startswith("steps = ")


def test_a_lost_recipe_is_restored_from_the_checkpoint(tmp_path):
    recipe, out = _recipe(steps=12, checkpoint_every=4), tmp_path / "run"
    with pytest.raises(InterruptedTrainingError):
        _run(recipe, out, on_step=_stop_at(6))
    text = (out / "recipe.toml").read_text()
    (out / "recipe.toml").unlink()
    with pytest.raises(DimoError, match=r"another recipe \(beta = 0.3, not 0.9\)"):
        _run(dataclasses.replace(recipe, beta=0.9), out, resume=True)
    assert not (out / "recipe.toml").exists()
    seen = []
    _run(recipe, out, resume=True, on_step=lambda step, _: seen.append(step))
    assert seen[0] == 4
    assert (out / "recipe.toml").read_text() == text


def test_a_run_starts_from_a_student(tmp_path):
    first, out = tmp_path / "first", tmp_path / "second"
    _run(_recipe(steps=3), first)
    wanted = read_state_dict(first / "student.safetensors")
    seen = []

    def look(step, scalars, task):
        if step == 0:
            student = task.networks["student"].state_dict()
            seen.append(all(torch.equal(student[key], wanted[key]) for key in wanted))

    recipe = _recipe(steps=9, checkpoint_every=4, init_from=str(first))
    with pytest.raises(InterruptedTrainingError):
        _run(recipe, out, watchers=[look], on_step=_stop_at(6))
    assert seen == [True]
    assert recipe_sha256(recipe) != recipe_sha256(_recipe(steps=9))
    _run(_recipe(steps=4), first)
    with pytest.raises(DimoError, match="began with other weights"):
        _run(recipe, out)
    with pytest.raises(DimoError, match="was distilled from 'scenes', not from 'digits'"):
        _run(_recipe(init_from="scenes-dimo"), tmp_path / "third")


def test_a_checkpoint_is_a_student(tmp_path):
    out = tmp_path / "run"
    _run(_recipe(steps=8, checkpoint_every=4, lr_schedule="constant", temperature=0.5), out)
    _run(_recipe(steps=4, checkpoint_every=4, lr_schedule="constant"), tmp_path / "short")
    student = load_student(checkpoint_of(str(out), 4), device=CPU)
    for whole, step in ((tmp_path / "short", 4), (out, 8)):
        found = load_student(checkpoint_of(str(out), step), device=CPU)
        wanted = load_student(whole, device=CPU).model.state_dict()
        assert all(torch.equal(value, wanted[k]) for k, value in found.model.state_dict().items())
    assert student.name == "Di[M]O (run, step 4)"
    assert (student.student.temperature, student.student.images_seen) == (0.5, 16)
    export_student(checkpoint_of(str(out), 4), tmp_path / "student.safetensors")
    assert find_student(tmp_path / "student.safetensors").config.images_seen == 16
    with pytest.raises(DimoError, match=r"no checkpoint of step 5, only of \[4, 8\]"):
        checkpoint_of(str(out), 5)
    with pytest.raises(DimoError, match="'digits-dimo' has no checkpoints; they lie in the folder"):
        checkpoint_of("digits-dimo", 5)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    recipe, out = _recipe(steps=4, checkpoint_every=4), tmp_path / "run"

    def second(step, scalars):
        with pytest.raises(DimoError, match="another process is running in"):
            _run(recipe, out)

    _run(recipe, out, on_step=second)


def test_the_newest_whole_checkpoint_counts(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(step)})
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["step-0000020", "step-0000030"]
    damaged = tmp_path / "step-0000030" / "state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    step, state = latest_checkpoint(tmp_path)
    assert (step, int(state["value"])) == (20, 20)
    (tmp_path / "step-0000020" / "checkpoint.json").write_text("{")
    with pytest.raises(DimoError, match=r"no checkpoint in .* is whole"):
        latest_checkpoint(tmp_path)


def test_milestones_remain(tmp_path):
    for step in range(10, 80, 10):
        save_checkpoint(tmp_path, step, {}, keep_every=30)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-{step:07d}" for step in (30, 60, 70)
    ]


def test_a_checkpoint_of_another_version_is_one_error(tmp_path):
    save_checkpoint(tmp_path, 10, {})
    (tmp_path / "step-0000010" / "checkpoint.json").write_text('{"step": 10, "sha256": "0"}')
    with pytest.raises(DimoError, match="has format 1, this version reads 2"):
        latest_checkpoint(tmp_path)


def test_a_full_disk_is_one_error_and_loses_nothing(forks, tmp_path):
    """No file of this process may grow beyond a limit that the second checkpoint passes."""
    code = """
import resource, signal, torch
from pathlib import Path
from dimo.engine.checkpoint import latest_checkpoint, save_checkpoint
from dimo.errors import DimoError
folder = Path("run")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
save_checkpoint(folder, 1, {"value": torch.zeros(10_000)})
try:
    save_checkpoint(folder, 2, {"value": [torch.zeros(10_000) for _ in range(20)]})
except DimoError as error:
    print(error)
assert [p.name for p in folder.iterdir()] == ["step-0000001"]
assert latest_checkpoint(folder)[0] == 1
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    codes, out, err = forks([script], tmp_path, [dict(os.environ)])
    assert codes == [0], err
    assert "step-0000002: File too large; earlier ones are intact" in out
    assert out.count("\n") == 1


def test_an_output_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DimoError, match=r"cannot use output .*Not a directory"):
        _run(_recipe(), tmp_path / "file" / "run")


def _teacher_weights(tmp_path, change):
    """A folder with the teacher's files, one weight of it changed."""
    weights = tmp_path / "weights"
    weights.mkdir()
    teacher = load_teacher("digits", device=CPU)
    for role, name in teacher.teacher.weights.items():
        state = load_file(ASSETS / name)
        if role == "transformer":
            change(state["last_layer.2.weight"][0, 0])
        save_file(state, weights / name)
    return weights


def test_a_teacher_that_is_not_finite_is_refused_at_the_start(tmp_path):
    weights = _teacher_weights(tmp_path, lambda weight: weight.fill_(torch.nan))
    with pytest.raises(DimoError, match=r"not finite, in last_layer\.2\.weight"):
        _run(_recipe(), tmp_path / "run", weights=weights)
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_is_not_a_student(tmp_path):
    with pytest.raises(InterruptedTrainingError):
        _run(_recipe(), tmp_path / "run", on_step=_stop_at(5))
    with pytest.raises(DimoError, match="not finished"):
        load_student(tmp_path / "run", device=CPU)
    with pytest.raises(DimoError, match="does not exist"):
        load_student(tmp_path / "nothing", device=CPU)


def _teacher_recipe(**changes):
    values = {"teacher": "digits", "batch_size": 12, "learning_rate": 1e-3, "lr_warmup_steps": 5}
    return TrainRecipe(**{**values, **changes})


def test_teacher_training_learns_and_works_as_weights(tmp_path):
    losses = {}

    def note(step, scalars):
        losses.update({step: scalars["loss"]} if scalars else {})

    recipe = _teacher_recipe(steps=100)
    train_teacher(recipe, tmp_path / "run", runtime=Runtime(CPU), on_step=note)
    assert losses[100] < losses[50] < 5.5  # ln 256 = 5.55 is guessing
    trained, shipped = (
        load_teacher("digits", device=CPU, weights=weights).model.state_dict()
        for weights in (tmp_path / "run", None)
    )
    assert trained.keys() == shipped.keys()
    assert not torch.equal(trained["last_layer.2.weight"], shipped["last_layer.2.weight"])


@pytest.mark.slow
def test_a_resumed_teacher_training_is_bit_equal(tmp_path):
    recipe = _teacher_recipe(steps=12, checkpoint_every=4)
    train_teacher(recipe, tmp_path / "whole", runtime=Runtime(CPU))
    with pytest.raises(InterruptedTrainingError):
        train_teacher(recipe, tmp_path / "parts", runtime=Runtime(CPU), on_step=_stop_at(9))
    train_teacher(recipe, tmp_path / "parts", runtime=Runtime(CPU), resume=True)
    loaded = [
        load_teacher("digits", device=CPU, weights=tmp_path / name).model.state_dict()
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(loaded[0][key], loaded[1][key]) for key in loaded[0])
