"""A Di[M]O step at full size (174 M, batch 2), beside the structure of the official code."""

import gc
import time

import pytest
import torch
from straightforward import PlainDistillation, PlainMaskGIT

from dimo.config import DistillRecipe, load_recipe
from dimo.launch import device_name
from dimo.models.maskgit import MaskGIT
from dimo.tasks import DistillTask

CPU = torch.device("cpu")
BATCH, STEPS = 2, 2
FORWARD = 93.5e9  # FLOPs of one network for one image
UNITS = 10  # forwards an image and step


def _seconds(step):
    """Fewest of STEPS steps, after one that warms up."""
    gc.collect()  # the networks of the run before
    found = []
    for number in range(STEPS + 1):
        start = time.perf_counter()
        step(number)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _plain(autocast):
    torch.manual_seed(0)
    step = PlainDistillation(PlainMaskGIT, MaskGIT().state_dict(), autocast=autocast).step
    return _seconds(lambda _: step(BATCH))


def _ours(precision):
    torch.manual_seed(0)
    settings = [f"batch_size={BATCH}", f'precision="{precision}"', "beta=0.0"]
    recipe = load_recipe(DistillRecipe, "maskgit", settings)
    teacher, student = MaskGIT(), MaskGIT()
    student.load_state_dict(teacher.state_dict())
    task = DistillTask(recipe, teacher, student, 0.1, CPU)
    return _seconds(task.step)


def _matmul_rate(dtype):
    """FLOP/s of one large product of the network."""
    x, weight = torch.randn(2056, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    seconds = min(_timed(x, weight) for _ in range(20))
    return 2 * 2056 * 768 * 3072 / seconds


def _timed(x, weight):
    start = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - start


@pytest.mark.slow
def test_a_step_against_the_official_structure():
    rates = {dtype: _matmul_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = {
        "official structure, float32": _plain(False),
        "dimo, float32": _ours("float32"),
        "official structure, naive bfloat16 autocast": _plain(True),
        "dimo, bfloat16": _ours("bfloat16"),
    }
    slow = seconds["official structure, float32"]
    print(f"\nDi[M]O step, 174 M, batch {BATCH}, on {device_name(CPU)}")
    for name, value in seconds.items():
        rate = UNITS * BATCH * FORWARD / value / rates[torch.float32]
        print(f"  {name:44s} {value:6.1f} s {slow / value:5.2f} x  {rate:.2f} of the matmul rate")
    products = rates[torch.bfloat16] / rates[torch.float32]
    print(f"  matrix products alone: bfloat16 {products:.2f} x float32")
    # what is reached; the aims, 1.2 and 2.5 on a CPU with tiles for bfloat16, are not yet
    assert slow >= 0.95 * seconds["dimo, float32"]
    assert slow >= 0.6 * products * seconds["dimo, bfloat16"]
