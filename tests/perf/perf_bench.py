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
from bench.rows.generate import SampledImages, Shelf, collect
from bench.rows.rows import jobs_of
from bench.rows.settings import Choice
from dimo.engine.distributed import Runtime, device_name, peak_memory_bytes
from dimo.models.maskgit import MaskGIT
from dimo.models.vqgan import VQGAN
from dimo.zoo.generator import Generator
from dimo.zoo.teachers import get_teacher

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
from bench.rows.generate import Shelf, collect
from bench.rows.rows import RowImages
from dimo.engine.distributed import Runtime, peak_memory_bytes

class Grey(RowImages):
    caption, count, labels = "grey", 50_000, np.arange(50_000) % 1000
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

STEPS = (1, 2, 4, 8, 16)
SHARD = 480  # images, as `dimo bench` cuts them at its default batch size
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _forwards(steps):
    """Of the network per image, guided: the all-masked first one is unconditional once a batch."""
    return 2 * steps - 1


def _median(function, repeats=3):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.fixture(scope="module")
def networks(inception_weights):
    """MaskGIT, its tokenizer and Inception at full size, with random weights."""
    torch.manual_seed(0)
    extractor = load_extractor("inception", sha256="any", weights=inception_weights, device=DEVICE)
    return MaskGIT().eval().to(DEVICE), VQGAN().eval().to(DEVICE), extractor


@pytest.fixture(scope="module")
def constants(networks, tmp_path_factory):
    """Seconds of one image (forward, decode, extract) and of one shard (gather, disk)."""
    network, tokenizer, extractor = networks
    size = 64 if DEVICE.type == "cuda" else 8
    tokens = torch.randint(1024, (size, 256), device=DEVICE)
    labels = torch.arange(size, device=DEVICE)
    images = torch.randint(256, (32, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    arrays = {k: np.ones((SHARD, n), np.float32) for k, n in OUTPUTS.items()}
    shelf = Shelf(tmp_path_factory.mktemp("cache") / "shelf", pytest.fail)
    with torch.inference_mode():
        found = {
            "forward": _median(lambda: network(tokens, labels)) / size,
            "decode": _median(lambda: tokenizer.decode(tokens)) / size,
            "extract": _median(lambda: extract(extractor, [(images, None)])) / 32,
            "gather": _median(lambda: pickle.loads(pickle.dumps(arrays))),
            "disk": _median(lambda: shelf.save(range(SHARD), arrays)),
        }
    values = ", ".join(f"{key} {1e3 * value:,.1f} ms" for key, value in found.items())
    print(f"\n{device_name(DEVICE)}: {values}")
    return found


def _seconds(constants, forwards, count, devices):
    """Of a row: ranks share images evenly, the first gathers and writes shard by shard.

    Metrics, which the first rank computes meanwhile or afterwards, are not in it.
    """
    rounds = math.ceil(count / (SHARD * devices))
    busiest = min(count, math.ceil(count / 32 / (rounds * devices)) * 32 * rounds)
    image = forwards * constants["forward"] + constants["decode"] + constants["extract"]
    shard = constants["gather"] * (devices > 1) + constants["disk"]
    return busiest * image + count / SHARD * shard


def test_a_row_of_the_full_networks_takes_what_the_model_says(networks, constants):
    network, tokenizer, extractor = networks
    loaded = Generator(get_teacher("maskgit"), network, tokenizer, "", "MaskGIT")
    choice = Choice(settings={"guidance_scale": 3.0})
    (job,) = jobs_of(loaded, [2], choice)
    runtime = Runtime(DEVICE)
    images = SampledImages(job, seed=0, count=64, batch_size=64, uint8="round", runtime=runtime)
    parts = {"sample and decode": 0.0, "extract": 0.0}

    def look(pixels, rows):
        start = time.perf_counter()
        features = extract(extractor, [(pixels, None)], count=len(rows))
        parts["extract"] += time.perf_counter() - start
        return {name: getattr(features, name) for name in OUTPUTS}

    start = time.perf_counter()
    collected = collect(
        images, look, runtime=runtime, batch_size=64, shelf=Shelf(None, pytest.fail)
    )
    taken = time.perf_counter() - start
    parts["sample and decode"] = collected.speed.seconds_per_batch
    told = _seconds(constants, _forwards(2), 64, 1)
    peak = peak_memory_bytes(DEVICE) / 2**30
    print(
        f"\n64 images, 2 guided steps: {taken:.1f} s ({parts}), the model says {told:.1f} s; "
        f"peak {peak:.2f} GiB"
    )
    assert told == pytest.approx(taken, rel=0.25)


def test_the_time_of_the_papers_table(constants):
    rows = [*map(_forwards, STEPS), 1]
    hours = {
        devices: sum(_seconds(constants, n, 50_000, devices) for n in rows) / 3600
        for devices in (1, 8, 64)
    }
    print("\nImageNet-256, six rows: " + ", ".join(f"{h:,.2f} h on {d}" for d, h in hours.items()))
    assert 7 < hours[1] / hours[8] <= 8
    assert 5 < hours[8] / hours[64] <= 8
