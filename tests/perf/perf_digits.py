"""Speed ratios, measured side by side in one run: `make perf`."""

import copy
import statistics
import time

import torch
from straightforward import PlainDistillation, PlainMaskGIT

from bench.rows.rows import load_planned, plan_jobs
from bench.rows.settings import Choice, generate
from dimo.config import load_recipe
from dimo.engine.distributed import Runtime
from dimo.engine.runs import for_device
from dimo.methods.base import TeacherDefaults
from dimo.methods.dimo.method import DiMO
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.models.cpu import has_bfloat16
from dimo.models.maskgit import MaskGIT
from dimo.zoo.loading import load_teacher

CPU = torch.device("cpu")


def _seconds(function, repeats=5):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _rate(job):
    def run():
        batches = generate(
            job.loaded,
            job.settings,
            seed=0,
            num_images=1000,
            batch_size=500,
            uint8="round",
            device=CPU,
        )
        for _ in batches:
            pass

    return 1000 / _seconds(run, 3)


def test_student_is_ten_times_the_guided_sixteen_step_teacher():
    guided = Choice(settings={"guidance_scale": 2.0})
    teacher = load_planned(plan_jobs("digits", [], [16], choice=guided), device=CPU)[0]
    student = load_planned(plan_jobs("digits", ["digits-dimo"], []), device=CPU)[0]
    fast, slow = _rate(student), _rate(teacher)
    print(
        f"\nstudent {fast:,.0f} images/s, guided 16-step teacher {slow:,.0f}: {fast / slow:.1f} x"
    )
    assert fast >= 10 * slow


def test_distillation_step_against_the_official_structure():
    loaded = load_teacher("digits", device=CPU)
    sizes = {"side": 4, "dim": 128, "codebook": 256, "depth": 3, "heads": 4, "mlp_dim": 512}
    state = copy.deepcopy(loaded.model.state_dict())

    def ours(samples):
        settings = [f"auxiliary_samples={samples}"]
        recipe = for_device(load_recipe(DiMORecipe, "digits-full", settings), CPU)
        teacher, student = (
            MaskGIT(**{**loaded.teacher.network, "dropout": rate}) for rate in (0, recipe.dropout)
        )
        for network in (teacher, student):
            network.load_state_dict(state)
        task, steps = (
            DiMO().task(recipe, teacher, student, None, TeacherDefaults(), Runtime(CPU)),
            iter(range(100)),
        )
        return _seconds(lambda: task.step(next(steps)))

    recipe = load_recipe(DiMORecipe, "digits-full")
    plain = PlainDistillation(
        lambda: PlainMaskGIT(**sizes, classes=10, dropout=recipe.dropout), state, autocast=False
    )
    slow = _seconds(lambda: plain.step(recipe.batch_size))
    fresh, shared = ours("fresh"), ours("shared")
    print(
        f"\ndistillation step: plain {slow * 1e3:.0f} ms, fresh samples {fresh * 1e3:.0f} ms: "
        f"{slow / fresh:.2f} x, shared {shared * 1e3:.0f} ms: {slow / shared:.2f} x"
    )
    # the aim of 2 takes bfloat16: in float32 the matrix products alone leave 10 / 7 and 10 / 9
    assert slow >= (1.5 if has_bfloat16() else 1.1) * fresh
    assert slow >= (2 if has_bfloat16() else 1.35) * shared
