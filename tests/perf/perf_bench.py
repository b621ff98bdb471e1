"""A bench on two ranks against one, and the memory of a row of ImageNet's size."""

import subprocess
import sys

import pytest

RATE = """
import sys, time
import torch
from bench.protocol import load_protocol
from bench.rows.generate import Shelf, collect
from bench.rows.rows import load_planned, plan_jobs
from bench.suites.base import load_suite
from dimo.engine.distributed import Runtime, ranks

teacher, steps, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
with ranks() as group:
    runtime = Runtime(torch.device("cpu"), group)
    suite = load_suite(load_protocol(sys.argv[4]), runtime)
    (row,) = load_planned(
        plan_jobs(teacher, [], [steps]), device=runtime.device, prompts=suite.prompts
    )
    images = suite.images_of(row, 0, count)
    group.synchronized(lambda: None)
    start = time.perf_counter()
    collect(images, suite.look_at(images), runtime=runtime, batch_size=500,
            shelf=Shelf(None, print))
    if group.is_first:
        print(count / (time.perf_counter() - start))
"""

MEMORY = """
import resource
import numpy as np
import torch
from bench.rows.generate import RowImages, Shelf, collect
from dimo.engine.distributed import Runtime, peak_memory_bytes

class Grey(RowImages):
    caption, labels = "grey", np.arange(50_000) % 1000
    def read(self, rows):
        return torch.zeros(len(rows), 3, 256, 256, dtype=torch.uint8), None

def look(pixels, rows):
    sizes = {"features": 2048, "logits": 1008, "spatial": 2023}
    return {k: np.ones((len(rows), n), np.float32) for k, n in sizes.items()}

cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
collected = collect(Grey(), look, runtime=Runtime(cpu), batch_size=500, shelf=Shelf(None, print))
print((peak_memory_bytes(cpu) - before) / 2**30, len(collected.found["features"]))
"""


def _printed(*arguments, launcher=()):
    command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("teacher", "steps", "count", "protocol"),
    [("digits", 16, 4000, "digits"), ("scenes", 4, 960, "scenes-geneval")],
)
def test_two_ranks_of_one_thread_are_nearly_twice_as_fast(
    tmp_path, monkeypatch, teacher, steps, count, protocol
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = tmp_path / "rate.py"
    program.write_text(RATE)
    given = list(map(str, (program, teacher, steps, count, protocol)))
    (one,) = _printed(*given)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    (two,) = _printed(*given, launcher=launcher)
    print(
        f"\n{teacher}, {steps} steps: {float(one):,.0f} images/s on one rank, {float(two):,.0f} on "
        f"two: {float(two) / float(one):.2f} x"
    )
    assert float(two) > 1.8 * float(one)


def test_a_row_of_fifty_thousand_stays_in_two_gibibytes(tmp_path):
    program = tmp_path / "memory.py"
    program.write_text(MEMORY)
    used, rows = _printed(str(program))
    print(f"\n50,000 images, pool, logits and spatial features: {float(used):.2f} GiB")
    assert rows == "50000"
    assert float(used) < 2
