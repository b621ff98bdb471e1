"""SDTT, self-distillation through time (Deschenaux & Gulcehre, arXiv 2410.21035)."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dimo.methods.base import Cost, add_mean, check, config_from
from dimo.methods.masked_data import DataDistillation, DataRecipe, DataTask
from dimo.methods.sdtt.objective import SDTTObjective


@dataclass(frozen=True, kw_only=True)
class SDTTRecipe(DataRecipe):
    """One self-distillation through time; names as in `dimo.methods.sdtt.objective`."""

    kind: ClassVar[str] = "sdtt"
    steps_may_grow: ClassVar[bool] = False
    rounds: int = 3  # each of `steps` / `rounds` steps; its last EMA is the next one's teacher
    teacher_steps: int = 16  # sampling steps of the first teacher
    substeps: int = 2  # m, teacher steps that the student learns to do in one

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
        return "sdtt"


class SDTTTask(DataTask):
    """In rounds, each of which makes the sampling steps longer."""

    def __init__(self, recipe: SDTTRecipe, *inputs: Any) -> None:
        super().__init__(recipe, *inputs)
        self.round_teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.networks["round_teacher"] = self.round_teacher
        self.updates = {"student": self.make_update(self.student)}

    def step(self, step: int) -> dict[str, Tensor]:
        recipe, update = self.recipe, self.updates["student"]
        number, step_of_round = divmod(step, recipe.steps // recipe.rounds)
        if step_of_round == 0 and number > 0:  # the EMA is the new teacher and student
            self.round_teacher.load_state_dict(self.ema.state_dict())
            self.student.load_state_dict(self.ema.state_dict())
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


class SDTT(DataDistillation):
    """Few-step students with the teacher's own network."""

    Recipe, task_class = SDTTRecipe, SDTTTask

    def cost(self, recipe: SDTTRecipe) -> Cost:
        return Cost(
            {"teacher": recipe.substeps, "student forward and backward": 3},
            networks={"round_teacher": False},
        )
