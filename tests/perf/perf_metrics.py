"""The metrics beside the packages that users would take instead, on two threads: `make perf`."""

import contextlib
import io
import subprocess
import sys
import time

import numpy as np
import prdc as peer
import pytest
import torch
from cleanfid.fid import frechet_distance as clean_fid
from threadpoolctl import threadpool_limits

from bench.features.stats import compute_stats
from bench.metrics import frechet_distance, prdc

DIM = 2048  # of Inception's pooled features


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(2):
        yield
    torch.set_num_threads(before)


def _features(seed, count, shift=0.0):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((count, DIM), dtype=np.float32) + np.float32(shift), 0)


def _timed(function):
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def _beside(ours, theirs):
    """Both results, and the peer's time over ours: ours before and after it, for fairness."""
    ours()  # loads and warms up
    value, before = _timed(ours)
    expected, peer_seconds = _timed(theirs)
    _, after = _timed(ours)
    return value, expected, (before + after) / 2, peer_seconds


def test_prdc_is_three_times_as_fast_as_the_prdc_package():
    generated, reference = _features(1, 10_000, 0.01), _features(2, 10_000)

    def theirs():
        with contextlib.redirect_stdout(io.StringIO()):
            return peer.compute_prdc(reference, generated, 3)

    value, expected, ours, other = _beside(
        lambda: prdc(generated=generated, reference=reference, k=3), theirs
    )
    print(f"\nPRDC of 10k x 10k {ours:.1f} s, prdc {other:.1f} s: {other / ours:.1f} x")
    for name, score in expected.items():  # its distances are float32: a tie in 1e8 pairs or so
        assert getattr(value, name) == pytest.approx(float(score), abs=1e-3), name
    assert other >= 3 * ours


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # scipy.linalg.sqrtm(disp=)
@pytest.mark.parametrize(("count", "tolerance"), [(5000, 1e-8), (1000, 1e-6)])
def test_frechet_is_four_times_as_fast_as_clean_fid(count, tolerance):
    """Of full rank, and of few samples, where rounding noise is left in clean-fid's value."""
    generated, reference = (
        compute_stats(_features(seed, count, shift), extractor="x")
        for seed, shift in ((1, 0.05), (2, 0.0))
    )
    value, expected, ours, other = _beside(
        lambda: frechet_distance(generated=generated, reference=reference),
        lambda: clean_fid(generated.mu, generated.sigma, reference.mu, reference.sigma),
    )
    print(
        f"\nFrechet distance of {count} samples {ours:.2f} s, clean-fid {other:.1f} s: "
        f"{other / ours:.1f} x; relative difference {abs(value / expected - 1):.1e}"
    )
    assert value == pytest.approx(expected, rel=tolerance)
    assert other >= 4 * ours


_GROWTH = f"""
import time
from pathlib import Path
import numpy as np
import torch
from bench.metrics import prdc

torch.set_num_threads(2)

def features(seed, count):
    whole = np.empty((count, {DIM}), dtype=np.float32)
    rng = np.random.default_rng(seed)
    for start in range(0, count, 1000):
        block = rng.standard_normal(whole[start : start + 1000].shape, dtype=np.float32)
        np.maximum(block, 0, out=whole[start : start + 1000])
    return whole

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

reference, generated = features(1, 10_000), features(2, 50_000)
prdc(generated=generated[:3000], reference=reference[:3000], k=3)  # loads and warms up
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
start = time.perf_counter()
prdc(generated=generated, reference=reference, k=3)
print(time.perf_counter() - start, status("VmHWM:") - before)
"""


def test_prdc_of_the_published_size_adds_at_most_one_gib():
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH], capture_output=True, text=True, check=True
    )
    seconds, growth = map(float, done.stdout.split())
    print(f"\nPRDC of 10k reference x 50k generated {seconds:.0f} s, {growth / 2**20:.0f} MiB more")
    assert growth <= 2**30
