"""SDTT, self-distillation through time (Deschenaux & Gulcehre, arXiv 2410.21035)."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dimo.engine.distributed import Runtime
from dimo.methods.base import (
    Cost,
    Task,
    add_mean,
    check,
    config_from,
    frozen_teacher,
    teacher_sha256,
)
from dimo.methods.masked_data import DataDistillation, DataRecipe, required
from dimo.methods.sdtt.objective import SDTTObjective
from dimo.models import MaskedModel

if TYPE_CHECKING:
    from dimo.data.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class SDTTRecipe(DataRecipe):
    """One self-distillation through time; names as in `dimo.methods.sdtt.objective`.

    Attributes:
        rounds: Number of rounds, each of `steps` / `rounds` steps; the EMA at the end of a round is
            the teacher of the next.
        teacher_steps: Number of sampling steps of the first teacher.
        substeps: m, teacher steps that the student learns to do in one; each round divides the
            number of sampling steps by it.
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
        """A key of `dimo.methods.METHODS`."""
        return "sdtt"


class SDTTTask(Task):
    """In rounds, each of which makes the sampling steps longer.

    Arguments and errors as for `dimo.methods.dimo.step.DiMOTask`. The student is a copy of the
    teacher; everything is trained.
    """

    recipe: SDTTRecipe

    def __init__(
        self,
        recipe: SDTTRecipe,
        teacher: MaskedModel,
        student: MaskedModel,
        data: "TokenData",
        runtime: Runtime,
    ) -> None:
        super().__init__(recipe, runtime, teacher_sha256(teacher) + data.sha256)
        self.teacher = frozen_teacher(teacher, recipe.precision, self.device)
        self.student = student.to(self.device).train()
        self.tokens, self.labels = data.tokens.to(self.device), data.labels.to(self.device)
        self.ema = self.make_ema(self.student)
        self.round_teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.networks = {
            "student": self.student,
            "ema": self.ema,
            "round_teacher": self.round_teacher,
        }
        self.updates = {"student": self.make_update(self.student)}

    def step(self, step: int) -> dict[str, Tensor]:
        recipe, update = self.recipe, self.updates["student"]
        number, step_of_round = divmod(step, recipe.steps // recipe.rounds)
        if step_of_round == 0 and number > 0:
            self._begin_round()
        num_steps = recipe.teacher_steps // recipe.substeps**number
        objective = config_from(SDTTObjective, recipe, num_steps=num_steps)
        values: dict[str, Tensor] = {}
        for batch in self.micro_batches(step, "student"):
            with self.running(batch, update):
                draws = objective.draw(self.tokens, self.labels, recipe.seed, batch.index)
                with self.autocast():
                    target = objective.target(draws, teacher=self.round_teacher)
                    loss = objective.loss(update.model, draws, target)
                weight = draws.mask.float().mean()  # the loss is a mean over masked tokens
                update.backward(loss, weight)
            add_mean(values, "loss", loss, weight)
        self.finish(step, "student", values)
        return values

    def _begin_round(self) -> None:
        """The EMA becomes the teacher, and the student continues from it."""
        average = self.ema.state_dict()
        self.round_teacher.load_state_dict(average)
        self.student.load_state_dict(average)


class SDTT(DataDistillation):
    """Few-step students with the teacher's own network."""

    Recipe = SDTTRecipe

    def task(
        self,
        recipe: SDTTRecipe,
        teacher: MaskedModel,
        student: MaskedModel,
        data: "TokenData | None",
        label_smoothing: float,
        runtime: Runtime,
    ) -> Task:
        return SDTTTask(recipe, teacher, student, required(data), runtime)

    def cost(self, recipe: SDTTRecipe) -> Cost:
        return Cost(
            {"teacher": recipe.substeps, "student forward and backward": 3},
            networks={"round_teacher": False},
        )
