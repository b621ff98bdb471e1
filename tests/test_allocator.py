"""Memory that is freed stays with the process, for what is asked for next."""

import platform
import subprocess
import sys

import pytest

RESIDENT = """
import resource
import torch
from dimo.cli.app import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

keep_freed_memory()
before = resident()
for size in (5_000_000, 4_500_000):
    blocks = [torch.ones(size) for _ in range(8)]
    del blocks
print(resident() - before)
"""
HELD = 8 * 4 * 4_500_000  # bytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_freed_memory_stays():
    """Without the call it is a few megabytes."""
    command = [sys.executable, "-c", RESIDENT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0.9 * HELD < int(done.stdout) < 1.3 * HELD
