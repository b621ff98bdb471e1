"""Observing a run without changing it: trackers, the curve of scores, intervals.

The only module that imports TensorBoard and Weights & Biases, when a run opens them.
"""

import json
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from dimo.engine.loop import Task
from dimo.errors import DimoError
from dimo.util.files import write_atomic

_LOOKS = 10  # per run, by default
_MULTIPLE = 50  # steps: default intervals coincide with log lines


class Tracker(Protocol):
    """Receives numbers by name and pictures (PNG files) of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


OpenTracker: TypeAlias = Callable[[int], Tracker]  # steps done when the session starts


class Trackers:
    """The trackers of one session, opened at its first step, when the run folder exists."""

    def __init__(self, openers: Sequence[OpenTracker]) -> None:
        self._openers = openers
        self._open: list[Tracker] | None = None

    def watch(self, step: int, scalars: Mapping[str, float], task: Task) -> None:
        """A watcher of `dimo.engine.loop.fit`, called before those that use the trackers."""
        if self._open is None:
            self._open = []
            for opener in self._openers:
                self._open.append(opener(step))
        if scalars:
            self.scalars(step, {f"train/{name}": value for name, value in scalars.items()})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs to every open tracker."""
        for tracker in self._open or ():
            tracker.scalars(step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Logs to every open tracker."""
        for tracker in self._open or ():
            tracker.picture(step, name, path)

    def close(self) -> None:
        """Closes every open tracker."""
        for tracker in self._open or ():
            tracker.close()
        self._open = None


def open_tensorboard(folder: Path, done: int) -> Tracker:
    """Event files in `folder`; what an interrupted session logged after step `done` is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    with _writing(folder):
        writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
    return _TensorBoard(folder, writer)


@dataclass(frozen=True)
class _TensorBoard:
    folder: Path
    writer: Any

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with _writing(self.folder):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # in the first chunk, IHDR
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        with _writing(self.folder):
            self.writer.file_writer.add_summary(summary, step)
            self.writer.flush()

    def close(self) -> None:
        with _writing(self.folder):
            self.writer.close()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DimoError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another --out"
        ) from error


def check_wandb() -> None:
    """Raises a `DimoError` if wandb is not installed."""
    try:
        from wandb import init  # noqa: F401
    except ImportError as error:
        raise DimoError(
            f"--wandb needs the package wandb ({error}); install it with: pip install wandb"
        ) from error


def open_wandb(project: str, folder: Path, config: Mapping[str, Any], done: int) -> Tracker:
    """A run of Weights & Biases named after the run folder, which keeps its id for `--resume`."""
    check_wandb()
    import wandb

    path = folder / "wandb" / "run-id"
    if not (done and path.is_file()):
        write_atomic(path, uuid.uuid4().hex[:16])
    try:
        run = wandb.init(
            project=project,
            name=folder.resolve().name,
            dir=str(folder),
            id=path.read_text(),
            resume="allow",
            config=dict(config),
        )
    except wandb.Error as error:
        raise DimoError(
            f"wandb refuses project {project!r}: {str(error).rstrip('.')}; log in with: wandb "
            "login, or set WANDB_MODE=offline; then continue with --resume"
        ) from error
    return _Wandb(run, wandb.Image)


@dataclass(frozen=True)
class _Wandb:
    run: Any
    image: Callable[[str], Any]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def watch_interval(given: int | None, steps: int, option: str) -> int:
    """Steps between two looks; 0 = never, None: about ten looks per run of `steps`, at log lines.

    Raises:
        DimoError: `option` was given a negative number.
    """
    if given is None:
        return _MULTIPLE * max(1, -(-steps // (_LOOKS * _MULTIPLE)))
    if given < 0:
        raise DimoError(f"{option} {given} is negative; give a number of steps, or 0 for never")
    return given


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether to look after `step` steps: at the start, at multiples of `every`, at the end."""
    return every > 0 and (step % every == 0 or step == steps)


@contextmanager
def undisturbed(*networks: nn.Module) -> Iterator[None]:
    """Puts networks in eval mode; restores their modes and the random generators afterwards."""
    modes = [(m, m.training) for network in networks for m in network.modules()]
    devices = {p.device for network in networks for p in network.parameters()}
    with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def read_curve(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of `curve.jsonl` by step; empty without a file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return {int(line["step"]): line for line in map(json.loads, lines)}
    except (ValueError, TypeError, KeyError) as error:
        raise DimoError(f"{path} is damaged: {error}; move it away and continue") from error


def put_on_curve(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a curve in order of steps, or replaces that of the same step."""
    curve = {**read_curve(path), int(line["step"]): dict(line)}
    write_atomic(path, "".join(json.dumps(curve[step]) + "\n" for step in sorted(curve)))
