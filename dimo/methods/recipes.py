"""Recipes of the distillation methods beside Di[M]O; read and written by `dimo.config`."""

from dataclasses import dataclass
from typing import ClassVar

from dimo.methods.recipe import Optimization, check, known

_SCHEDULES = ("arccos", "cosine")  # those that fall along a sampler's way


@dataclass(frozen=True, kw_only=True)
class _FromData(Optimization):
    """What a method has whose intermediate states are masked data and whose student is sampled.

    Keys of the training: `teacher`, a row of `dimo.zoo.teachers`; `mask_schedule`, gamma, from all
    masked at r = 0 to nothing masked at r = 1; `choice_temperature` of the teacher's confidence
    noise; `label_dropout`, the share of images without their label, which the unconditional branch
    of guided sampling needs; `dropout` of the student while it trains.

    Keys of the sampling: `temperature` divides the logits, `temperature_selected_by` says how that
    was chosen; `guidance_scale`, that of the teacher's row unless given.
    """

    teacher: str
    mask_schedule: str = "arccos"
    choice_temperature: float = 4.5
    label_dropout: float = 0.1
    dropout: float = 0.1
    temperature: float = 1.0
    temperature_selected_by: str = "default"
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known("mask schedule", self.mask_schedule, _SCHEDULES)
        noise = self.choice_temperature
        check(noise >= 0, "choice_temperature", noise, ">= 0; 0 is no noise")
        for key in ("label_dropout", "dropout"):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), "0 <= x < 1")
        for key in ("temperature", "guidance_scale"):
            value = getattr(self, key)
            check(value is None or value > 0, key, value, "> 0")


@dataclass(frozen=True, kw_only=True)
class Di4CRecipe(_FromData):
    """One di4c distillation; names as in `dimo.methods.di4c.objective`.

    `batch_size` counts images; each is seen under `num_latents` latents.

    Attributes:
        num_latents: N, latents drawn for each image and step.
        latent_chunk: Latents that pass the student at once, the others are computed again in the
            backward pass; 0: all. Changes memory and speed, not the result (but for dropout).
        step_size: delta, how far the teacher steps; below it from the end it is distilled directly.
        alpha: Largest weight of the data's correlation term; 0 is di4c, above it is di4c-d.
        control_variate: Subtracts the product of the marginals in sampled terms, and adds its
            exact mean.
        teacher_unconditional: Guided sampling takes its unconditional branch from the teacher.
    """

    kind: ClassVar[str] = "di4c"
    num_latents: int = 32
    latent_chunk: int = 0
    step_size: float = 0.05
    alpha: float = 0.1
    control_variate: bool = True
    teacher_unconditional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_latents >= 1, "num_latents", self.num_latents, ">= 1")
        chunk = self.latent_chunk
        check(0 <= chunk <= self.num_latents, "latent_chunk", chunk, "0 to num_latents")
        check(0 < self.step_size < 1, "step_size", self.step_size, "0 < x < 1")
        check(self.alpha >= 0, "alpha", self.alpha, ">= 0")

    @property
    def method(self) -> str:
        """A key of `dimo.zoo.students.METHODS`."""
        return "di4c-d" if self.alpha > 0 else "di4c"


@dataclass(frozen=True, kw_only=True)
class SDTTRecipe(_FromData):
    """One self-distillation through time; names as in `dimo.methods.sdtt.objective`.

    Attributes:
        rounds: Rounds, each of `steps` / `rounds` steps; the teacher of the next is the average of
            the student at the end of one.
        teacher_steps: Sampling steps of the first teacher.
        substeps: m, how many of its teacher's steps a student learns to do at once; each round
            divides the number of sampling steps by it.
    """

    kind: ClassVar[str] = "sdtt"
    rounds: int = 3
    teacher_steps: int = 16
    substeps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rounds >= 1, "rounds", self.rounds, ">= 1")
        check(self.substeps >= 2, "substeps", self.substeps, ">= 2")
        whole = self.substeps**self.rounds
        rule = f"a multiple of substeps ** rounds = {whole}"
        check(self.teacher_steps >= 1, "teacher_steps", self.teacher_steps, rule)
        check(self.teacher_steps % whole == 0, "teacher_steps", self.teacher_steps, rule)
        check(self.steps % self.rounds == 0, "steps", self.steps, f"a multiple of {self.rounds}")

    @property
    def method(self) -> str:
        """A key of `dimo.zoo.students.METHODS`."""
        return "sdtt"
