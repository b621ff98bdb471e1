"""A bench on two ranks against one, the memory of a row of ImageNet's size, and its time."""

import math
import pickle
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from bench.features import extract, load_extractor
from bench.rows.generate import Shelf
from dimo.engine.distributed import device_name
from dimo.models.maskgit import MaskGIT
from dimo.models.vqgan import VQGAN

OUTPUTS = {"features": 2048, "logits": 1008, "spatial": 2023}  # of Inception, numbers an image

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


# --- a model of the paper's table: N = 50,000, guided, 1 to 16 steps and the student ------------

IMAGES, ROWS = 50_000, {1: 2, 2: 4, 4: 8, 8: 16, 16: 32}  # steps -> forwards an image, guided
SHARD = 480  # images, as `dimo bench` cuts them at its default batch size


def _median(function, repeats=3):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def _constants(weights, folder):
    """Seconds of one image (forward, decode, extract) and of one shard (gather, disk)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 64 if device.type == "cuda" else 4
    network, tokenizer = MaskGIT().eval().to(device), VQGAN().eval().to(device)
    extractor = load_extractor("inception", sha256="any", weights=weights, device=device)
    tokens = torch.randint(1024, (size, 256), device=device)
    labels = torch.arange(size, device=device)
    images = torch.randint(256, (32, 3, 256, 256), dtype=torch.uint8, device=device)
    arrays = {k: np.ones((SHARD, n), np.float32) for k, n in OUTPUTS.items()}

    def timed(function):
        def run():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return _median(run)

    def save():
        Shelf(folder / "shelf", pytest.fail).save(range(SHARD), arrays)

    return device_name(device), {
        "forward": timed(lambda: network(tokens, labels)) / size,
        "decode": timed(lambda: tokenizer.decode(tokens)) / size,
        "extract": timed(lambda: extract(extractor, [(images, None)])) / 32,
        "gather": _median(lambda: pickle.loads(pickle.dumps(arrays))),
        "disk": _median(save),
    }


def _hours(constants, devices):
    """Of the whole table: ranks share images evenly, the first gathers and writes shard by shard.

    Metrics, which the first rank computes meanwhile or afterwards, are not in it.
    """
    per_image = constants["decode"] + constants["extract"]
    seconds = 0.0
    for forwards in (*ROWS.values(), 1):
        rounds = math.ceil(IMAGES / (SHARD * devices))
        busiest = math.ceil(IMAGES / 32 / (rounds * devices)) * 32 * rounds  # images of a rank
        seconds += busiest * (forwards * constants["forward"] + per_image)
        seconds += IMAGES / SHARD * (constants["gather"] * (devices > 1) + constants["disk"])
    return seconds / 3600


def test_the_time_of_the_papers_table(inception_weights, tmp_path):
    name, constants = _constants(inception_weights, tmp_path)
    print(f"\n{name}: " + ", ".join(f"{k} {1e3 * v:,.1f} ms" for k, v in constants.items()))
    hours = {devices: _hours(constants, devices) for devices in (1, 8, 64)}
    print("the table of ImageNet-256: " + ", ".join(f"{h:,.2f} h on {d}" for d, h in hours.items()))
    assert 7 < hours[1] / hours[8] <= 8
    assert 5 < hours[8] / hours[64] <= 8
