"""The training loop: steps, checkpoints, exact resume, a callback. It knows no task and no metric.

A task (`dimo.tasks`) owns networks and optimizers and does one step as a pure function of the step
number and its state; every random number comes from (seed, step, row). So a checkpoint is the
task's state, and a resumed run is bit-equal to an uninterrupted one.
"""

__all__ = ["OnStep", "Task", "Watcher", "fit"]

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from dimo.checkpoint import latest_checkpoint, save_checkpoint
from dimo.errors import DimoError
from dimo.files import write_atomic

_LOG_EVERY = 50
OnStep: TypeAlias = Callable[[int, dict[str, float]], None]


class Task(Protocol):
    """What the loop drives."""

    steps: int
    checkpoint_every: int
    identity: str  # hash of recipe and inputs: a checkpoint of another task is refused

    def step(self, step: int) -> dict[str, Tensor]:
        """Updates the networks; returns scalars for the log, left on their device."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: nested containers of tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""


# Steps done, scalars since the last log line (empty between log lines), the task; on every rank.
Watcher: TypeAlias = Callable[[int, Mapping[str, float], Task], None]


def fit(
    task: Task,
    folder: Path,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    watchers: Sequence[Watcher] = (),
) -> float:
    """Runs the task to its last step; returns the seconds spent training, over all sessions.

    Writes `metrics.jsonl` (one line every 50 steps) and `checkpoints/`.

    Args:
        task: What to train.
        folder: The run's folder.
        resume: Continue from the newest whole checkpoint.
        on_step: Called with the steps done: at the start, and after each step. Its scalars are
            the means since the last log line, and empty between log lines.
        watchers: Called like `on_step`, with the task; they must not change it.

    Raises:
        DimoError: The folder holds a run and `resume` is off, or a run of another task.
    """
    checkpoints, log_path = folder / "checkpoints", folder / "metrics.jsonl"
    found = latest_checkpoint(checkpoints)
    if found is not None and not resume:
        raise DimoError(
            f"{folder} already holds a run; continue it with --resume or choose another --out"
        )
    done, lines, seconds = 0, [], 0.0
    pending: list[dict[str, Tensor] | dict[str, float]] = []
    if found is not None:
        done, state = found
        if state["identity"] != task.identity:
            raise DimoError(
                f"{folder} holds a run with another recipe or teacher; "
                "resume with the same, or choose another --out"
            )
        task.load_state_dict(state["task"])
        lines, seconds = list(state["log"]), float(state["seconds"])
        pending = list(state["pending"])
    start = time.monotonic() - seconds
    if on_step is not None:
        on_step(done, {})
    for watch in watchers:
        watch(done, {}, task)
    for step in range(done, task.steps):
        scalars: dict[str, float] = {}
        pending.append(task.step(step))
        done = step + 1
        if done % _LOG_EVERY == 0 or done == task.steps:
            means = {k: sum(float(p[k]) for p in pending) / len(pending) for k in pending[0]}
            if any(value != value for value in means.values()):
                raise DimoError(
                    f"training diverged before step {done}: {means}; "
                    "lower learning_rate and start again"
                )
            pending.clear()
            lines.append(json.dumps({"step": done, **means}))
            scalars = means
        if on_step is not None:
            on_step(done, scalars)
        for watch in watchers:
            watch(done, scalars, task)
        if done % task.checkpoint_every == 0 or done == task.steps:
            state = {
                "identity": task.identity,
                "task": task.state_dict(),
                "log": lines,
                "seconds": time.monotonic() - start,
                "pending": [{k: float(v) for k, v in p.items()} for p in pending],
            }
            save_checkpoint(checkpoints, done, state)
            write_atomic(log_path, "\n".join(lines) + "\n")
    return time.monotonic() - start
