"""What a distillation is said to cost: against closed forms, and against measured memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dimo.config import load_distillation
from dimo.engine.estimate import estimate_distillation
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.zoo.teachers import TEACHERS

MEASURE = Path(__file__).parents[2] / "perf" / "distill_memory.py"
MIDDLE = {"hidden_dim": 256, "depth": 8, "heads": 8, "mlp_dim": 1024}


def estimate(teacher="maskgit", device_type="cpu", **changes):
    values = {
        "teacher": teacher,
        "steps": 10,
        "batch_size": 2,
        "learning_rate": 1e-5,
        "auxiliary_learning_rate": 1e-5,
        "teacher_guidance_scale": 2.0,
        "precision": "float32",
    }
    recipe = DiMORecipe(**{**values, **changes})
    return estimate_distillation(recipe, TEACHERS[teacher], device_type=device_type)


def test_the_official_networks_numbers():
    found = estimate(steps=30_000, batch_size=64)
    student = found.parameters["student"]
    assert (student.total, student.trainable, student.frozen) == (174160874, 171886848, 2274026)
    assert found.parameters["ema"].trainable == found.parameters["teacher"].trainable == 0
    assert found.all_parameters.total == 4 * student.total
    assert found.all_parameters.trainable == 2 * student.trainable
    assert found.images == 1_920_000
    width, layers, length, hidden = 768, 24, 257, 3072
    block = 2 * length * (4 * width * width + 2 * width * hidden) + 4 * length**2 * width
    ends = 2 * width * width * (2 * length + length - 1) + 2 * (length - 1) * width * 1025
    assert found.flops.forward == layers * block + ends
    assert found.flops.per_step == 64 * 10 * found.flops.forward
    assert found.flops.run == 30_000 * found.flops.per_step


@pytest.mark.parametrize(
    ("changes", "units"),
    [
        ({}, 10),
        ({"teacher_guidance_scale": 1.0}, 9),
        ({"auxiliary_steps": 3}, 18),
        ({"auxiliary_steps": 2, "teacher_guidance_scale": 1.0}, 13),
        ({"auxiliary_samples": "shared"}, 8),
        ({"auxiliary_samples": "shared", "auxiliary_steps": 3}, 16),
    ],
)
def test_forwards_of_a_step(changes, units):
    flops = estimate("digits", **changes).flops
    assert sum(flops.parts.values()) == units
    assert flops.per_step == 2 * units * flops.forward


def test_memory_of_the_parts():
    memory = estimate().memory
    assert memory.weights == 4 * 4 * 174160874
    assert memory.gradients == 2 * 4 * 171886848
    assert memory.optimizer == 4 * 4 * 171886848
    # block: two norms' inputs and outputs, q k v, attention, both widths of the feed-forward
    floats = 16 * 768 * 257 * 2 * 24
    assert memory.activations == pytest.approx(4 * floats, rel=0.05)
    assert memory.checkpointed < memory.activations / 5
    assert memory.peak_checkpointed <= memory.peak


def test_memory_grows_with_what_takes_it():
    base = estimate("digits").memory
    assert estimate("digits", batch_size=4).memory.activations > 1.9 * base.activations
    assert estimate("digits", dropout=0.1).memory.activations > base.activations
    both = estimate("digits", auxiliary_samples="shared").memory
    assert both.activations == 2 * base.activations
    large = estimate(batch_size=64).memory
    assert estimate(batch_size=64, precision="bfloat16").memory.peak < 0.8 * large.peak


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_teacher_has_an_estimate_without_weights(teacher):
    found = estimate(teacher)
    fixed = found.memory.weights + found.memory.gradients + found.memory.optimizer
    assert found.memory.peak > found.memory.peak_checkpointed * 0.99 > fixed


def test_parts_of_a_batch_and_an_average_on_the_cpu_need_less():
    whole, parts = (estimate(batch_size=8, accumulate=n).memory for n in (1, 4))
    assert parts == estimate(batch_size=2).memory
    assert parts.activations < whole.activations / 3
    away = estimate(device_type="cuda", ema_on_cpu=True).memory
    assert away.weights == estimate(device_type="cuda").memory.weights * 3 // 4


def other(name, *settings, device_type="cpu"):
    recipe = load_distillation(name, ["precision=float32", *settings])
    return estimate_distillation(recipe, TEACHERS[recipe.teacher], device_type=device_type)


def test_a_mixture_student_costs_its_latents():
    whole, parts = other("digits-di4c", "batch_size=4"), other("digits-di4c", "latent_chunk=2")
    assert sum(whole.flops.parts.values()) == 1 + 8 + 3 * 8
    assert sum(parts.flops.parts.values()) == 1 + 8 + 4 * 8
    teacher, student, ema = (whole.parameters[name] for name in ("teacher", "student", "ema"))
    projection = 128 * 512 + 512 + 512 * 128 + 128
    assert student.total == student.trainable == ema.total == teacher.total + projection
    assert whole.memory.weights == 4 * (teacher.total + 2 * student.total)
    assert whole.memory.optimizer == 2 * whole.memory.gradients == 8 * student.total
    # 4 images under 8 latents are as many rows as 16 under 2
    again = other("digits-di4c", "batch_size=16", "latent_chunk=2")
    assert again.memory.activations == whole.memory.activations


def test_sdtt_costs_the_teachers_steps_and_another_teacher():
    found = other("digits-sdtt")
    assert found.flops.parts == {"teacher": 2, "student forward and backward": 3}
    assert set(found.parameters) == {"teacher", "student", "round_teacher", "ema"}
    assert found.memory.weights == 4 * 4 * found.parameters["student"].total
    assert found.all_parameters.trainable == found.parameters["student"].total


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_estimated_memory_is_the_measured_one():
    """What is allocated; without a threshold glibc keeps freed blocks, see `Memory`."""
    done = subprocess.run(
        [sys.executable, str(MEASURE), json.dumps(MIDDLE), "8", "2", "float32", "fresh"],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # too little would end in an out-of-memory error; how much too much depends on the CPU's kernels
    assert 0.9 < found["estimated"] / found["measured"] < 1.3
