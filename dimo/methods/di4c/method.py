"""The distillation of a mixture student, di4c and di4c-d."""

import dataclasses

import torch
from torch import Tensor

from dimo.data.tokens import TokenData
from dimo.engine.distributed import ALONE, Ranks
from dimo.methods.base import DataTask, add_mean
from dimo.methods.di4c.network import Di4CStudent
from dimo.methods.di4c.objective import Di4CObjective, LatentMixture
from dimo.methods.recipes import Di4CRecipe
from dimo.zoo.teachers import Network


class Di4CTask(DataTask):
    """di4c: the student learns from the teacher's steps, from itself and from data.

    Arguments and errors as of `DataTask`; the student has a fresh latent projection beside the
    teacher's weights, and all of it is trained.
    """

    recipe: Di4CRecipe

    def __init__(
        self,
        recipe: Di4CRecipe,
        teacher: Network,
        student: Di4CStudent,
        data: TokenData,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(recipe, teacher, student, data, device, ranks)
        mixture = LatentMixture(student, recipe.latent_chunk)
        self.updates = {"student": self._update_of(mixture)}
        names = [field.name for field in dataclasses.fields(Di4CObjective)]
        self.objective = Di4CObjective(**{name: getattr(recipe, name) for name in names})

    def step(self, step: int) -> dict[str, Tensor]:
        objective, update = self.objective, self.updates["student"]
        values: dict[str, Tensor] = {}
        for index in self._parts(step, "student", update):
            draws = objective.draw(self.tokens, self.labels, self.recipe.seed, index)
            with self._autocast():
                self.student.eval()
                target = objective.target(draws, teacher=self.teacher, student=self.student)
                self.student.train()
                losses = objective.losses(update.model, draws, target)
            update.backward(losses.total)
            for name, value in vars(losses).items():
                add_mean(values, name, value.mean(), 1)
        self._finish(step, values)
        return values
