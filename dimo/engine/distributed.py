"""Where a job runs: the device, its name and memory, and the ranks of `torchrun`.

The only module that imports accelerate, and only to train on several ranks.
"""

import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dimo.errors import DimoError
from dimo.util.terminal import Progress, ignore, is_launched, quiet

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a job; by default it is the only one."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def split(self, total: int, multiple: int = 1) -> range:
        """This rank's part of `range(total)`: contiguous, cut at multiples of `multiple`."""
        blocks = -(-total // multiple)
        low, high = (blocks * i // self.count * multiple for i in (self.index, self.index + 1))
        return range(min(low, total), min(high, total))

    def sum_(self, values: Tensor) -> Tensor:
        """Sums `values` over all ranks in place, without a wait for the GPU."""
        if self.count > 1:
            with _peers_needed():
                dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest value of all ranks, without a wait for the GPU."""
        if self.count == 1:
            return value
        number = torch.tensor(value)
        with _peers_needed():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def synchronized(self, function: Callable[[], T]) -> T:
        """Runs `function` on every rank and returns this rank's own result.

        Raises:
            DimoError: `function` raised one on any rank; then every rank raises the same.
        """
        results: list[T] = []
        self.all_gather(lambda: results.append(function()))
        return results[0]

    def all_gather(self, function: Callable[[], T], *, first_only: bool = False) -> list[T]:
        """Runs `function` on every rank and returns the results of all, in order of rank.

        With `first_only` they are gathered on the first rank; the others get an empty list.

        Raises:
            DimoError: `function` raised one on any rank; then every rank raises the same.
        """
        if self.count == 1:
            return [function()]
        result: T | None = None
        problem: str | None = None
        try:
            result = function()
        except DimoError as error:
            problem = str(error)
        problems: list[str | None] = [None] * self.count
        with _peers_needed():
            dist.all_gather_object(problems, problem)
        for text in problems:
            if text is not None:
                shared = DimoError(text)
                shared.is_shared = True
                raise shared
        results: list[Any] = [None] * self.count
        with _peers_needed():
            if not first_only:
                dist.all_gather_object(results, result)
                return results
            dist.gather_object(result, results if self.is_first else None, dst=0)
        return results if self.is_first else []


@contextmanager
def _peers_needed() -> Iterator[None]:
    """Around what all ranks do together: a `DimoError` where one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        raise DimoError(
            "another rank of this job has ended or cannot be reached; see what it said, and run "
            "the same command again"
        ) from error


ALONE = Ranks()


@dataclass(frozen=True)
class Runtime:
    """Where a job runs and how it reports progress."""

    device: torch.device
    ranks: Ranks = ALONE
    progress: Progress = quiet  # called with (what, done, total, unit)
    warn: Callable[[str], None] = ignore  # called with one-line warnings


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks that `torchrun` or `accelerate launch` started, connected; or this process alone.

    A nested `ranks()` yields the ranks of the outer one.

    Raises:
        DimoError: Another launcher made this process one of several.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    named = os.environ.get("WORLD_SIZE") or "1"
    if not is_launched() and named != "1":
        raise DimoError(
            f"WORLD_SIZE is {named}, but torchrun did not start this process; start all of them "
            "with: torchrun --nproc_per_node=N -m dimo ..., or unset WORLD_SIZE to run alone"
        )
    if not is_launched() or named == "1":
        yield ALONE
        return
    # torchrun may keep its store when it restarts all ranks: they must not meet those that ended
    store, index, count = next(rendezvous("env://"))
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=index, world_size=count)
    try:
        yield Ranks(index, count)
    finally:
        # Gloo's threads end with the last holder of the group, and abort a process that ends first.
        gc.collect()
        dist.destroy_process_group()


def data_parallel(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The network with gradients averaged over the ranks (accelerate, which wraps DDP).

    It must be on `device`, a CPU or this rank's own GPU; for a single rank it stays as it is.
    Precision, accumulation and clipping stay in `dimo.engine.optim`: accelerate's loss scaler
    synchronizes with the GPU at every step, and its settings are global to the process.

    Raises:
        DimoError: `accelerate launch` is configured to shard the model.
    """
    if ranks.count == 1:
        return network
    local = os.environ.get("LOCAL_RANK", "0")
    if device.type == "cuda" and str(device.index) != local:
        raise DimoError(
            f"rank {local} of this machine needs its own GPU, not {device}; leave --device at auto"
        )
    for method in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{method}", "false").lower() == "true":
            raise DimoError(
                f"accelerate is set to {method}, which is not supported; "
                "start with torchrun, or: accelerate launch --multi_gpu"
            )
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import GradientAccumulationPlugin

    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    wrapped: nn.Module = accelerator.prepare_model(network, device_placement=False)
    return wrapped


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" and "cuda" take this rank's GPU, "auto" only if any.

    Raises:
        DimoError: An unknown or unavailable device.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ["LOCAL_RANK"] if is_launched() else "0"
    own = f"cuda:{local}" if name in ("auto", "cuda") else name
    try:
        device = torch.device(own)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        asked = repr(name) if own == name else f"{name!r} ({own})"
        raise DimoError(
            f"device {asked} is not available here; allowed: auto, cpu, cuda, cuda:N"
        ) from None
    return device


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return f"{name} ({torch.get_num_threads()} threads)"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # preferred, as `getrusage` may report the peak of the process that started this one
    if resident := _proc_field("/proc/self/status", "VmHWM"):
        return int(resident.split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _proc_field(file: str, key: str) -> str:
    """The value of the first line "key: value"; "" without such a line or file."""
    lines = Path(file).read_text().splitlines() if Path(file).is_file() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(key)), "")
