"""Speed ratios, measured side by side in one run: `make perf`."""

import statistics
import time

import torch
from torch.nn.attention import SDPBackend

from bench.generate import generate
from bench.jobs import load_jobs
from bench.plan import Choice
from dimo.config import DistillRecipe, load_recipe
from dimo.models import layers
from dimo.models.maskgit import MaskGIT
from dimo.tasks import DistillTask
from dimo.teachers import load_teacher

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
    teacher = load_jobs("digits", [], [16], device=CPU, choice=guided)[0]
    student = load_jobs("digits", ["digits-dimo"], [], device=CPU)[0]
    fast, slow = _rate(student), _rate(teacher)
    print(
        f"\nstudent {fast:,.0f} images/s, guided 16-step teacher {slow:,.0f}: {fast / slow:.1f} x"
    )
    assert fast >= 10 * slow


def _step_seconds(precision):
    recipe = load_recipe(DistillRecipe, "digits", [f'precision="{precision}"'])
    loaded = load_teacher("digits", device=CPU)
    student = MaskGIT(**{**loaded.teacher.network, "dropout": 0.0})
    student.load_state_dict(loaded.model.state_dict())
    task = DistillTask(recipe, loaded.model, student, 0.0, CPU)
    steps = iter(range(100))
    return _seconds(lambda: task.step(next(steps)))


def test_distillation_step_against_float32_with_fused_attention(monkeypatch):
    """The baseline is the plain choice: float32 and PyTorch's own pick of attention kernel."""
    ours = _step_seconds("bfloat16")
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    monkeypatch.setattr(layers, "_SHORT_ON_CPU", fused)

    plain = _step_seconds("float32")
    print(
        f"\ndistillation step {ours * 1e3:.0f} ms, plain {plain * 1e3:.0f} ms: {plain / ours:.1f} x"
    )
    assert plain >= 1.5 * ours
