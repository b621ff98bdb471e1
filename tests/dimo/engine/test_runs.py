"""di4c and SDTT in the training loop that Di[M]O has, and their students under the samplers."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load

from bench.rows.rows import jobs_of
from bench.rows.settings import Choice, sample_tokens
from dimo.config import load_distillation, load_recipe
from dimo.engine.distributed import Ranks, Runtime
from dimo.engine.runs import distill
from dimo.errors import DimoError
from dimo.guidance import guide
from dimo.methods import METHODS
from dimo.methods.di4c.method import Di4CRecipe
from dimo.methods.di4c.network import Di4CStudent
from dimo.methods.sdtt.method import SDTTRecipe
from dimo.rng import ImageNoise
from dimo.samplers.base import Predictor
from dimo.samplers.confidence import sample_confidence
from dimo.weights.exchange import export_student
from dimo.zoo.loading import (
    load_network,
    load_student,
    load_teacher,
    load_tokens,
    student_architecture,
    weights_file,
)
from dimo.zoo.students import find_student
from dimo.zoo.teachers import TEACHERS, get_teacher

CPU = torch.device("cpu")
SMALL = {"steps": 2, "batch_size": 4, "checkpoint_every": 2}
RECIPES = {"di4c": "digits-di4c", "di4c-d": "digits-di4c-d", "sdtt": "digits-sdtt"}


def recipe_of(method, **changes):
    recipe = load_distillation(RECIPES[method], ["precision=float32", "lr_warmup_steps=0"])
    small = {**SMALL, "rounds": 2} if method == "sdtt" else {**SMALL, "num_latents": 3}
    return dataclasses.replace(recipe, **{**small, **changes})


def make_task(method, ranks=None, data=None, **changes):
    recipe, row = recipe_of(method, **changes), get_teacher("digits")
    teacher = load_network(row, weights_file(row, "transformer"))
    torch.manual_seed(0)
    student = student_architecture(row, recipe.method)(**{**row.network, "dropout": 0.0})
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    data = data or load_tokens(None, teacher="digits")
    make = METHODS[method].distillation.task
    return make(recipe, teacher, student, data, 0.0, Runtime(CPU, ranks or Ranks()))


def guided(scale):
    return Choice(settings={"guidance_scale": scale})


class InterruptedTrainingError(Exception):
    """Stands for a killed process."""


def run(recipe, out, stop_at=None, **options):
    def on_step(step, scalars):
        if step == stop_at:
            raise InterruptedTrainingError

    return distill(
        recipe, out, recipe_name="test", runtime=Runtime(CPU), on_step=on_step, **options
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for method in RECIPES:
        run(recipe_of(method), folder / f"my-{method}")
    return folder


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RECIPES)
def test_a_run_folder_is_a_student_with_rows_at_any_number_of_steps(method, runs):
    folder = runs / f"my-{method}"
    names = {path.name for path in folder.iterdir()}
    wanted = {"recipe.toml", "metrics.jsonl", "checkpoints", "student.safetensors", "config.json"}
    assert names == wanted
    assert load_distillation(str(folder / "recipe.toml")) == recipe_of(method)
    loaded = load_student(folder, device=CPU)
    assert loaded.student.method == method
    assert (loaded.student.images_seen, loaded.student.recipe) == (8, "test")
    assert loaded.name == f"{METHODS[method].title} (my-{method})"
    index = torch.arange(6)
    for job, steps in zip(jobs_of(loaded, [], student_steps=[1, 2, 16]), (1, 2, 16), strict=True):
        assert (job.section, job.settings.sampler) == ("Distill.", "confidence")
        found = sample_tokens(loaded, job.settings, labels=index, seed=0, index=index)
        assert (found.nfe, sum(found.token_counts)) == (steps, 16)
        assert found.tokens.max() < 256


@pytest.mark.parametrize("method", RECIPES)
def test_all_of_the_student_is_trained(method, runs):
    student = load_student(runs / f"my-{method}", device=CPU).model
    teacher = load_teacher("digits", device=CPU).model.state_dict()
    for name, value in student.named_parameters():
        assert name not in teacher or not torch.equal(value, teacher[name]), name


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("di4c-d", {"latent_chunk": 2, "dropout": 0.1, "label_dropout": 0.3}),
        ("di4c-d", {"precision": "bfloat16"}),
        ("sdtt", {"dropout": 0.1, "label_dropout": 0.3}),  # stopped in the second round
    ],
)
def test_a_resumed_run_is_bit_equal(method, changes, tmp_path):
    recipe = recipe_of(method, steps=6, checkpoint_every=2, **changes)
    run(recipe, tmp_path / "whole")
    with pytest.raises(InterruptedTrainingError):
        run(recipe, tmp_path / "parts", stop_at=5)
    run(recipe, tmp_path / "parts", resume=True)
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def curve_of(task, steps=2):
    """The means of each step, over all ranks."""
    sums = [task.ranks.sum_(v) for step in range(steps) for v in task.step(step).values()]
    return [float(total / weight) for total, weight in sums]


@pytest.mark.parametrize("method", ["di4c-d", "sdtt"])
def test_accumulation_changes_nothing_but_rounding(method):
    whole, parts = (curve_of(make_task(method, batch_size=6, accumulate=n)) for n in (1, 3))
    assert parts == pytest.approx(whole, rel=1e-5)


RANKS = """
import json, sys
sys.path.insert(0, {here!r})
from test_runs import curve_of, make_task
from dimo.engine.distributed import ranks
with ranks() as group:
    curve = curve_of(make_task({method!r}, group, steps=4, batch_size=8, **{changes!r}), 4)
    if group.is_first:
        print(json.dumps(curve))
"""


@pytest.mark.parametrize(
    ("method", "changes"),
    [("di4c-d", {"latent_chunk": 2, "accumulate": 2}), ("sdtt", {})],
)
def test_two_ranks_give_the_curve_of_one(method, changes, run_ranks, request):
    folder = str(request.path.parent)
    out = run_ranks(RANKS.format(here=folder, method=method, changes=changes))
    wanted = curve_of(make_task(method, steps=4, batch_size=8), 4)
    assert json.loads(out) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["di4c-d", "sdtt"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(method):
    task = make_task(method)
    before = {k: v.clone() for k, v in task.student.state_dict().items()}
    average = {k: v.clone() for k, v in task.ema.state_dict().items()}
    teacher = task.round_teacher if method == "sdtt" else task.teacher
    teacher.last_layer[4].bias.fill_(torch.nan)
    task.step(0)
    assert task.counts().tolist() == [1, 1]
    assert all(torch.equal(v, before[k]) for k, v in task.student.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in task.ema.state_dict().items())


def test_a_round_of_sdtt_begins_with_the_average():
    task = make_task("sdtt", steps=4, rounds=2, learning_rate=1e-3)
    first = {k: v.clone() for k, v in task.round_teacher.state_dict().items()}
    task.step(0)
    task.step(1)
    average = {k: v.clone() for k, v in task.ema.state_dict().items()}
    assert all(torch.equal(v, first[k]) for k, v in task.round_teacher.state_dict().items())
    task.step(2)
    assert all(torch.equal(v, average[k]) for k, v in task.round_teacher.state_dict().items())
    assert not all(torch.equal(v, first[k]) for k, v in average.items())


# --- sampling --------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("method", ["di4c-d", "sdtt"])
def test_images_do_not_depend_on_the_batch(method, size, runs):
    loaded, index = load_student(runs / f"my-{method}", device=CPU), torch.arange(16)
    (job,) = jobs_of(loaded, [], guided(2.0), student_steps=[4])

    def sample(part):
        return sample_tokens(loaded, job.settings, labels=part % 10, seed=3, index=part).tokens

    assert torch.equal(torch.cat([sample(part) for part in index.split(size)]), sample(index))


class Recording(Di4CStudent):
    """Keeps what it was given."""

    def forward(self, tokens, labels, **inputs):
        self.calls.append(inputs)
        return super().forward(tokens, labels, **inputs)


@torch.inference_mode()
def test_the_latent_is_new_at_each_step_and_shared_by_the_guided_halves(tiny_network):
    model = Recording(**tiny_network).eval()
    model.calls = []
    noise = ImageNoise(0, torch.arange(3))
    sample_confidence(model, torch.arange(3), noise, num_steps=3, guidance_scale=3.0)
    first, second, third = (call["z"] for call in model.calls)
    assert first.shape == (3,)  # not guided yet
    for latent in (second, third):
        assert torch.equal(latent[:3], latent[3:])
        assert len(latent) == 6
    latents = torch.cat([first, second[:3], third[:3]])
    assert len(latents.unique()) == 9
    assert (latents.min() >= 0) & (latents.max() < 1)


@torch.inference_mode()
def test_the_teacher_may_be_the_unconditional_branch(runs):
    loaded = load_student(runs / "my-di4c-d", device=CPU, teacher_unconditional=True)
    assert loaded.student.teacher_unconditional
    teacher = load_teacher("digits", device=CPU).model
    noise, labels = ImageNoise(0, torch.arange(4)), torch.arange(4)
    tokens = torch.full((4, 16), teacher.mask_token_id)
    tokens[:, :5] = 7
    found = Predictor(loaded.model, labels, noise, loaded.unconditional)
    both = found(tokens, 2, guidance_scale=3.0)
    z = noise.uniform("sample/latent/2", ())
    drop = torch.ones(4, dtype=torch.bool)
    wanted = guide(loaded.model(tokens, labels, z=z), teacher(tokens, labels, drop=drop), 3.0)
    torch.testing.assert_close(both, wanted[..., :256].double().log_softmax(-1))
    own = Predictor(loaded.model, labels, noise)(tokens, 2, guidance_scale=3.0)
    assert not torch.allclose(both, own)
    assert found.nfe == 2
    (job,) = jobs_of(loaded, [], guided(3.0), student_steps=[2])
    assert "its unconditional branch is the teacher" in job.settings.selected_by
    sample_tokens(loaded, job.settings, labels=labels, seed=0, index=labels)


def test_a_one_step_student_has_no_unconditional_branch():
    with pytest.raises(DimoError, match="sampled without guidance"):
        load_student("digits-dimo", device=CPU, teacher_unconditional=True)


# --- files -----------------------------------------------------------------------------------


def test_the_official_file_is_a_student(small_maskgit, golden_file, tmp_path):
    names = ("maskgit_v1_sampler.weights", "maskgit_v1_sampler.di4c_latent_weights")
    parts = [load(golden_file(f"{name}.safetensors").read_bytes()) for name in names]
    weights = {**parts[0], **parts[1]}
    path = tmp_path / "maskgit-di4c-d.pth"
    torch.save({"iter": 7, "model_state_dict": weights}, path)
    loaded = load_student(path, device=CPU, weights=small_maskgit)
    assert loaded.name == "di4c-d (maskgit-di4c-d)"
    assert isinstance(loaded.model, Di4CStudent)
    assert torch.equal(loaded.model.pos_emb, weights["pos_emb"])
    (job,) = jobs_of(loaded, [], student_steps=[4])
    settings = job.settings
    assert (settings.guidance_scale, settings.choice_temperature) == (7.0, 4.5)
    assert (settings.mask_schedule, settings.temperature) == ("arccos", 1.0)
    assert "README of sony/di4c" in settings.selected_by
    found = sample_tokens(loaded, settings, labels=torch.arange(3), seed=0, index=torch.arange(3))
    assert found.nfe == 7  # the first step is not guided
    (small_maskgit / path.name).write_bytes(path.read_bytes())
    assert find_student("di4c-d", weights=small_maskgit).title == "di4c-d"


def test_a_file_with_settings_is_a_student_and_one_without_is_none(runs, tmp_path, golden):
    run_folder = runs / "my-di4c"
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes((run_folder / "student.safetensors").read_bytes())
    found = find_student(copy)
    config = load_student(run_folder, device=CPU).student
    assert found.config == dataclasses.replace(config, training_seconds=None)
    assert found.title == "di4c (mine)"
    with pytest.raises(DimoError, match=r"does not say how it was trained; .* dimo import"):
        find_student(golden / "maskgit_v1_transformer.dimo_pytorch_model.bin")


def test_configs_of_earlier_versions_and_of_unknown_methods(runs, tmp_path):
    for name in ("student.safetensors", "config.json"):
        (tmp_path / name).write_bytes((runs / "my-di4c" / name).read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "method": "di4cd"}))
    with pytest.raises(DimoError, match=r"unknown method 'di4cd'.* did you mean 'di4c"):
        find_student(tmp_path)
    early = {k: v for k, v in content.items() if k not in ("method", "guidance_scale")}
    del early["teacher_unconditional"]
    (tmp_path / "config.json").write_text(json.dumps(early))
    assert find_student(tmp_path).config.method == "dimo"


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_mixture_is_exported_under_the_official_keys(suffix, runs, tmp_path):
    out = tmp_path / f"student{suffix}"
    export_student(runs / "my-di4c-d", out)
    model = load_student(runs / "my-di4c-d", device=CPU).model
    found = Di4CStudent.from_official(out, **TEACHERS["digits"].network).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "override", "words"),
    [
        (Di4CRecipe, "digits-di4c", "num_latents=0", "num_latents = 0 is out of range"),
        (Di4CRecipe, "digits-di4c", "latent_chunk=9", "allowed: 0 to num_latents"),
        (Di4CRecipe, "digits-di4c", "step_size=1", "step_size = 1.0 is out of range"),
        (Di4CRecipe, "digits-di4c", "alpha=-1", "alpha = -1.0 is out of range"),
        (Di4CRecipe, "digits-di4c", "mask_schedule=linear", "allowed: arccos, cosine"),
        (Di4CRecipe, "digits-di4c", "auxiliary_steps=2", "unknown key 'auxiliary_steps'"),
        (Di4CRecipe, "digits-di4c", "guidance_scale=0", "guidance_scale = 0.0 is out of range"),
        (SDTTRecipe, "digits-sdtt", "num_latents=2", "unknown key 'num_latents'"),
        (SDTTRecipe, "digits-sdtt", "teacher_steps=12", "a multiple of substeps ** rounds = 8"),
        (SDTTRecipe, "digits-sdtt", "steps=1000", "allowed: a multiple of 3"),
        (SDTTRecipe, "digits-sdtt", "substeps=1", "substeps = 1 is out of range"),
        (SDTTRecipe, "digits-di4c", "steps=2", "is of kind 'di4c', this command needs 'sdtt'"),
    ],
)
def test_bad_recipes_are_one_line(kind, name, override, words):
    with pytest.raises(DimoError) as caught:
        load_recipe(kind, name, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_method_cannot_do_is_refused_before_anything_is_written(small_maskgit, tmp_path):
    recipe = dataclasses.replace(recipe_of("di4c"), teacher="maskgit")
    with pytest.raises(DimoError, match=r"comes without data; .* dimo encode"):
        run(recipe, tmp_path / "run", weights=small_maskgit)
    with pytest.raises(DimoError, match="has no student network for teacher 'halton-base'"):
        student_architecture(TEACHERS["halton-base"], "di4c-d")
    data_free = load_distillation("digits", ["steps=1", "batch_size=2"])
    with pytest.raises(DimoError, match="method 'dimo' takes no data; leave out --data x"):
        run(data_free, tmp_path / "run", data=tmp_path.__class__("x"))
    assert not (tmp_path / "run").exists()


def test_other_data_makes_another_run():
    data = load_tokens(None, teacher="digits")
    other = make_task("sdtt", data=dataclasses.replace(data, sha256="0" * 64))
    assert other.inputs != make_task("sdtt").inputs  # what the loop compares before it resumes
