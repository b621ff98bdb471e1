"""The training loop: steps, checkpoints, exact resume, callbacks.

A task (`dimo.methods.base.Task`) owns networks and optimizers, and a step is a pure function of its
number and the task's state; every random number comes from (seed, step, row). So a checkpoint is
the task's state, and a resumed run is bit-equal to an uninterrupted one. (More than two ranks may
sum gradients in another order after a restart: then it is equal up to rounding.)
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from dimo.engine.checkpoint import latest_checkpoint, remove_unfinished, save_checkpoint
from dimo.engine.distributed import Ranks
from dimo.errors import DimoError
from dimo.models.cpu import has_bfloat16
from dimo.util.files import write_atomic
from dimo.util.terminal import Stopped, asked_to_stop, ignore, signals_wait

_LOG_EVERY = 50
OnStep: TypeAlias = Callable[[int, dict[str, float]], None]


class Task(Protocol):
    """What the loop drives."""

    recipe: Any  # a `dimo.methods.base.Optimization`
    inputs: str  # hash of the weights and data that the run starts from
    ranks: Ranks  # share each batch
    device: torch.device

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """By name, not wrapped: "ema", "model" or "student", and others."""

    def step(self, step: int) -> dict[str, Tensor]:
        """Updates the networks; returns means over this rank as (sum, weight), float64 [2]."""

    def counts(self) -> Tensor:
        """Updates skipped so far, and the most in a row of one network: int64 [2]."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs: nested containers of tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""


Watcher: TypeAlias = Callable[[int, Mapping[str, float], Task], None]


def fit(
    task: Task,
    folder: Path,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    watchers: Sequence[Watcher] = (),
    warn: Callable[[str], None] = ignore,
) -> float:
    """Runs the task to its last step; returns the seconds spent training, over all sessions.

    The first rank writes `metrics.jsonl` (one line every 50 steps) and `checkpoints/`; every rank
    reads the checkpoint, so ranks on several machines need a folder that all of them see.

    With `resume` it continues from the newest whole checkpoint in `folder`, the run's folder.
    `on_step` is called on the first rank at the start and after each step, with the steps done and
    the means since the last log line (empty between log lines). So are `watchers`, on every rank
    and with the task, whose networks they must not change. `warn` is told on the first rank where
    it continues.

    Raises:
        Stopped: A signal came; the steps done are saved.
        DimoError: The folder holds a run and `resume` is off, or a run of another task; it cannot
            be read or written; or too many updates in a row were not finite.
    """
    run = _Run(task, folder, warn if task.ranks.is_first else ignore)
    run.begin(resume)

    def report(scalars: dict[str, float]) -> None:
        if on_step is not None and task.ranks.is_first:
            on_step(run.done, scalars)
        with suppress(Stopped):  # where a watcher makes images; the step is saved first
            for watcher in watchers:
                watcher(run.done, scalars, task)

    steps = task.recipe.steps
    with signals_wait():
        report({})
        stopped = task.ranks.largest(asked_to_stop())
        while run.done < steps and not stopped:
            run.add(task.step(run.done))
            is_last = run.done == steps
            report(run.log() if run.done % _LOG_EVERY == 0 or is_last else {})
            stopped = task.ranks.largest(asked_to_stop())
            if run.done % task.recipe.checkpoint_every == 0 or is_last or stopped:
                run.save()
    if run.done < steps:
        done = f"{run.done:,} of {steps:,} steps are done and saved"
        raise Stopped(stopped, f"{done}; rerun the same command to continue")
    return time.monotonic() - run.start


class _Run:
    """State of the loop itself: steps done, seconds, log lines, sums since the last line."""

    def __init__(self, task: Task, folder: Path, warn: Callable[[str], None]) -> None:
        self.task, self.ranks, self.warn = task, task.ranks, warn
        self.checkpoints, self.log_path = folder / "checkpoints", folder / "metrics.jsonl"
        self.done = 0
        self.lines: list[str] = []
        self.sums: dict[str, Tensor] = {}
        self.start = time.monotonic()

    def begin(self, resume: bool) -> None:
        """Restores the newest checkpoint, if any."""
        if self.ranks.is_first:
            remove_unfinished(self.checkpoints)
        newest = self.ranks.synchronized(lambda: latest_checkpoint(self.checkpoints, self.warn))
        steps = self.ranks.all_gather(lambda: None if newest is None else newest[0])
        if len(set(steps)) > 1:
            raise DimoError(
                f"the ranks see different checkpoints in {self.checkpoints} (steps {steps}); "
                "give an --out that all machines share"
            )
        if newest is None:
            return
        if not resume:
            raise DimoError(
                f"{self.checkpoints.parent} already holds a run; "
                "continue it with --resume or choose another --out"
            )
        self.done, state = newest
        changed = self._check_same(state)
        try:
            self.task.load_state_dict(state["task"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DimoError(
                f"the checkpoint of step {self.done} in {self.checkpoints} does not fit: {reason}; "
                "start a new run with another --out"
            ) from error
        self.lines, self.start = list(state["log"]), self.start - float(state["seconds"])
        self.sums = {k: v.clone().to(self.task.device) for k, v in state["sums"].items()}
        place = f"step {self.done:,} of {self.task.recipe.steps:,}"
        self.warn(f"{self.checkpoints.parent} is continued at {place}{changed}")
        self.ranks.synchronized(self._write_log)

    def add(self, sums: dict[str, Tensor]) -> None:
        """Counts a step; non-finite values are those of a skipped update."""
        for key, value in sums.items():
            finite = torch.where(value.isfinite().all(), value, 0)
            self.sums[key] = self.sums[key] + finite if key in self.sums else finite
        self.done += 1

    def log(self) -> dict[str, float]:
        """Means over all ranks since the last line; the only place where the host waits."""
        self._share_sums()
        sums = torch.stack(list(self.sums.values())).tolist()
        skipped, in_a_row = self.task.counts().tolist()
        means = {k: s / w for k, (s, w) in zip(self.sums, sums, strict=True) if w}
        if in_a_row >= self.task.recipe.max_skipped:
            raise DimoError(
                f"training diverged before step {self.done}: {in_a_row} updates in a row were not "
                "finite; lower learning_rate and start again with another --out"
            )
        self.sums = {}
        self.lines.append(json.dumps({"step": self.done, **means, "skipped": skipped}))
        self.ranks.synchronized(self._write_log)
        return {**means, "skipped": float(skipped)}

    def save(self) -> None:
        """Writes a checkpoint and removes old ones."""
        self._share_sums()
        recipe = self.task.recipe
        state = {
            "recipe": asdict(recipe),
            "inputs": self.task.inputs,
            "task": self.task.state_dict(),
            "log": self.lines,
            "seconds": time.monotonic() - self.start,
            "sums": self.sums,
        }

        def write() -> None:
            if self.ranks.is_first:
                save_checkpoint(self.checkpoints, self.done, state, keep_every=recipe.keep_every)

        self.ranks.synchronized(write)

    def _share_sums(self) -> None:
        """Replaces the sums by their mean over the ranks, which is the same state everywhere."""
        if self.sums and self.ranks.count > 1:
            total = self.ranks.sum_(torch.stack(list(self.sums.values()))) / self.ranks.count
            self.sums = dict(zip(self.sums, total, strict=True))

    def _write_log(self) -> None:
        if self.ranks.is_first:
            write_atomic(self.log_path, "".join(f"{line}\n" for line in self.lines))

    def _check_same(self, state: dict[str, Any]) -> str:
        """What has changed and may, for a note."""
        folder = self.checkpoints.parent
        allowed, refused = differences(state["recipe"], self.task.recipe, self.task.device)
        if refused:
            problem = f"a run of another recipe or teacher ({refused})"
        elif state["inputs"] != self.task.inputs:
            problem = "a run that began with other weights or data of the same name"
        else:
            return f" with other values than before: {allowed}" if allowed else ""
        raise DimoError(f"{folder} holds {problem}; resume with the same, or choose another --out")


# Keys of a recipe that decide no number of its run, but for rounding and what dropout draws.
FREE_KEYS = (
    "accumulate",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_every",
    "max_skipped",
)


def differences(old: Mapping[str, Any], recipe: Any, device: torch.device) -> tuple[str, str]:
    """The keys that differ from a run's recipe, for messages: those that may when it is resumed
    with `recipe` on `device`, and the others; "" if none do.

    A run may become longer, and float32 where the CPU cannot compute in bfloat16.
    """
    old, new = (json.loads(json.dumps(values)) for values in (old, asdict(recipe)))
    keys = [key for key in {**new, **old} if new.get(key) != old.get(key)]
    free = set(FREE_KEYS)
    if recipe.steps_may_grow and new["steps"] > old.get("steps", 0):
        free.add("steps")
    if new["precision"] == "float32" and device.type == "cpu" and not has_bfloat16():
        free.add("precision")

    def text(keys: Iterable[str]) -> str:
        return ", ".join(f"{key} = {old.get(key)!r}, not {new.get(key)!r}" for key in keys)

    return text(key for key in keys if key in free), text(key for key in keys if key not in free)
