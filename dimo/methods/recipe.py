"""What the recipe of every training has, and how its values are checked."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dimo.errors import DimoError, unknown_name

_LEARNING_RATE_SCHEDULES = ("constant", "cosine", "linear")
_PRECISIONS = ("float32", "bfloat16", "float16")


def check(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise DimoError(f"recipe key {key} = {value!r} is out of range; allowed: {allowed}")


def known(kind: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise unknown_name(kind, value, allowed)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """What every training has.

    `batch_size` counts the images of one step, over all ranks and all `accumulate` parts of it.
    `gradient_checkpointing` recomputes activations in the backward pass instead of keeping them.
    `ema_on_cpu` keeps the average out of the GPU's memory, for one transfer of the weights a step.
    A training stops after `max_skipped` updates in a row that were not finite. The two newest
    checkpoints are kept, and those at multiples of `keep_every` (0: no others).
    """

    seed: int = 0
    steps: int
    batch_size: int = 256
    accumulate: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 100
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    grad_clip: float = 1.0
    max_skipped: int = 20
    ema_decay: float = 0.999
    ema_on_cpu: bool = False
    precision: str = "bfloat16"
    checkpoint_every: int = 500
    keep_every: int = 0

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "max_skipped", "checkpoint_every"):
            check(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        for key in ("lr_warmup_steps", "keep_every"):
            check(getattr(self, key) >= 0, key, getattr(self, key), ">= 0")
        check(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "0 < x < 1")
        check(self.adam_eps > 0, "adam_eps", self.adam_eps, "> 0")
        check(self.grad_clip > 0, "grad_clip", self.grad_clip, "> 0")
        check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 <= x < 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        check(all(0 <= b < 1 for b in self.adam_betas), "adam_betas", self.adam_betas, "0 <= x < 1")
        known("lr_schedule", self.lr_schedule, _LEARNING_RATE_SCHEDULES)
        known("precision", self.precision, _PRECISIONS)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of one step: a pure function, so nothing of it needs saving."""
        return self.learning_rate * self.learning_rate_factor(step)

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then constant, or a fall to zero along a cosine or a line."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, self.steps - self.lr_warmup_steps)
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if self.lr_schedule == "linear" else 1.0
