"""Where things run: the one place that chooses a device and reads its name and memory."""

__all__ = ["choose_device", "device_name", "peak_memory_bytes"]

import platform
import resource
import sys
from pathlib import Path

import torch

from dimo.errors import DimoError


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes a GPU when there is one.

    Raises:
        DimoError: Unknown device, or one this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise DimoError(
            f"device {name!r} is not available here; allowed: auto, cpu, cuda, cuda:N"
        ) from None
    return device


def device_name(device: torch.device) -> str:
    """Model name of the GPU, or of the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} ({torch.get_num_threads()} threads)"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
