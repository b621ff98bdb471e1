"""Memory of a distillation step at full size, measured beside its estimate: `make perf`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).with_name("distill_memory.py")
NEEDED = 10e9  # bytes


def _free_bytes():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("samples", ["fresh", "shared"])
def test_memory_of_the_official_network_is_estimated(samples):
    """174 M parameters, batch 2, float32, two steps; the allocator's own share is measured too."""
    if _free_bytes() < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of free memory")
    command = [sys.executable, str(MEASURE), "{}", "2", "2", "float32", samples]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ratio = found["estimated"] / found["measured"]
    print(f"estimated : measured memory of a full-size step, {samples} samples = {ratio:.2f} : 1")
    assert 0.85 < ratio < 1.15
