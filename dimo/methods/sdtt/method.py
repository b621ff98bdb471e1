"""Self-distillation through time, SDTT."""

import copy

import torch
from torch import Tensor

from dimo.data.tokens import TokenData
from dimo.engine.distributed import ALONE, Ranks
from dimo.methods.base import DataTask, add_mean
from dimo.methods.recipes import SDTTRecipe
from dimo.methods.sdtt.objective import SDTTObjective
from dimo.zoo.teachers import Network


class SDTTTask(DataTask):
    """SDTT: in rounds, each of which makes the sampling steps longer.

    Arguments and errors as of `DataTask`; the student is a copy of the teacher, and all of it is
    trained.
    """

    recipe: SDTTRecipe

    def __init__(
        self,
        recipe: SDTTRecipe,
        teacher: Network,
        student: Network,
        data: TokenData,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(recipe, teacher, student, data, device, ranks)
        self.round_teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.networks["round_teacher"] = self.round_teacher
        self.updates = {"student": self._update_of(self.student)}

    def step(self, step: int) -> dict[str, Tensor]:
        recipe, update = self.recipe, self.updates["student"]
        number, is_first = divmod(step, recipe.steps // recipe.rounds)
        if is_first == 0 and number > 0:
            self._begin_round()
        objective = SDTTObjective(
            num_steps=recipe.teacher_steps // recipe.substeps**number,
            substeps=recipe.substeps,
            mask_schedule=recipe.mask_schedule,
            choice_temperature=recipe.choice_temperature,
            label_dropout=recipe.label_dropout,
        )
        values: dict[str, Tensor] = {}
        for index in self._parts(step, "student", update):
            draws = objective.draw(self.tokens, self.labels, recipe.seed, index)
            with self._autocast():
                target = objective.target(draws, teacher=self.round_teacher)
                loss = objective.loss(update.model, draws, target)
            weight = draws.mask.float().mean()  # the loss is a mean over masked tokens
            update.backward(loss, weight)
            add_mean(values, "loss", loss, weight)
        self._finish(step, values)
        return values

    def _begin_round(self) -> None:
        """The average becomes the teacher, and the student goes on from it."""
        average = self.ema.state_dict()
        self.round_teacher.load_state_dict(average)
        self.student.load_state_dict(average)
