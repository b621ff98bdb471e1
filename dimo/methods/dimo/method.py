"""The Di[M]O distillation."""

import copy

import torch
from torch import Tensor

from dimo.config import DistillRecipe
from dimo.engine.distributed import ALONE, Ranks
from dimo.engine.optim import update_ema
from dimo.methods.base import StudentTask, add_mean
from dimo.methods.dimo.objective import Draws, objective_of
from dimo.zoo.teachers import Network


class DistillTask(StudentTask):
    """Di[M]O: student and auxiliary model start as copies of the teacher and take turns.

    Args:
        recipe: What to do.
        teacher: Frozen; it is made ready for inference, in place.
        student: A network with the teacher's weights (its own dropout rate); trained in place.
        label_smoothing: That of the teacher's own training.
        device: Where to train.
        ranks: Who shares each batch.

    Raises:
        DimoError: The batch does not split into equal parts, or the teacher's weights are not
            finite.
    """

    recipe: DistillRecipe

    def __init__(
        self,
        recipe: DistillRecipe,
        teacher: Network,
        student: Network,
        label_smoothing: float,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(recipe, teacher, student, device, ranks)
        for parameter in self.student.embedding_parameters():
            parameter.requires_grad_(False)
        self.auxiliary = copy.deepcopy(self.student)
        self.ema = self._average_of(self.student)
        self.networks = {"student": self.student, "auxiliary": self.auxiliary, "ema": self.ema}
        self.updates = {
            "student": self._update_of(self.student),
            "auxiliary": self._update_of(self.auxiliary),
        }
        self.objective = objective_of(recipe, label_smoothing=label_smoothing)

    def step(self, step: int) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        self._update_student(step, values)
        for turn in range(self._is_shared, self.recipe.auxiliary_steps):
            self._update_auxiliary(step, turn, values)
        return values

    @property
    def _is_shared(self) -> bool:
        """Whether the auxiliary model's first update is part of the student's."""
        return self.recipe.auxiliary_samples == "shared"

    def _update_student(self, step: int, values: dict[str, Tensor]) -> None:
        recipe, objective, update = self.recipe, self.objective, self.updates["student"]
        updates = self.updates.values() if self._is_shared else (update,)
        for index in self._parts(step, "student", *updates):
            draws = objective.draw(self.student, recipe.seed, index, "student", step=step)
            with self._autocast():
                logits, tokens = objective.generate(update.model, draws)
            auxiliary = (
                self._learn(draws, logits, tokens, values) if self._is_shared else self.auxiliary
            )
            with self._autocast():
                student = objective.student_loss(
                    logits,
                    tokens,
                    draws.mask,
                    draws.labels,
                    teacher=self.teacher,
                    auxiliary=auxiliary,
                    mask_ratio=draws.mask_ratio,
                )
            update.backward(student.loss)
            masked = draws.mask.sum()
            add_mean(values, "gradient", student.logit_gradient.abs().sum() / masked, masked)
        norm, good = update.step(recipe.learning_rate_at(step))
        update_ema(self.ema, self.student, decay=recipe.ema_decay, step=step, good=good)
        add_mean(values, "grad_norm", norm, 1)
        if self._is_shared:
            self._step_auxiliary(step)

    def _update_auxiliary(self, step: int, turn: int, values: dict[str, Tensor]) -> None:
        objective, purpose = self.objective, f"auxiliary/{turn}"
        for index in self._parts(step, purpose, self.updates["auxiliary"]):
            draws = objective.draw(self.student, self.recipe.seed, index, purpose, step=step)
            with self._autocast(), torch.no_grad():
                logits, tokens = objective.generate(self.student, draws)
            self._learn(draws, logits, tokens, values)
        self._step_auxiliary(step)

    def _learn(
        self, draws: Draws, logits: Tensor, tokens: Tensor, values: dict[str, Tensor]
    ) -> Tensor:
        """Adds to the auxiliary model's gradient; returns its logits where `tokens` are hidden."""
        update = self.updates["auxiliary"]
        with self._autocast():
            auxiliary = self.objective.auxiliary_loss(
                update.model, tokens, draws.mask, draws.labels, student_logits=logits
            )
        weight = draws.mask.float().mean()  # its loss is a mean over masked tokens
        update.backward(auxiliary.loss, weight)
        add_mean(values, "auxiliary_loss", auxiliary.loss, weight)
        return auxiliary.logits

    def _step_auxiliary(self, step: int) -> None:
        recipe = self.recipe
        rate = recipe.auxiliary_learning_rate * recipe.learning_rate_factor(step)
        self.updates["auxiliary"].step(rate)
