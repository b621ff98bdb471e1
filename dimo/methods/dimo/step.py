"""One Di[M]O step: student and auxiliary model take turns (algorithm 1)."""

import copy
import dataclasses

import torch
from torch import Tensor

from dimo.engine.distributed import Runtime
from dimo.methods.base import Task, add_mean, frozen_teacher, teacher_sha256
from dimo.methods.dimo.divergence import certainty
from dimo.methods.dimo.draws import Draws
from dimo.methods.dimo.health import Health
from dimo.methods.dimo.objective import DiMOObjective, StudentLoss
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.models import MaskedModel


class DiMOTask(Task):
    """Student, auxiliary model and EMA start with the teacher's weights; of a run that starts from
    a student, the auxiliary model does.

    The teacher is copied; the student is trained in place.

    Raises:
        DimoError: The batch does not split evenly, or weights of the teacher are not finite.
    """

    recipe: DiMORecipe

    def __init__(
        self,
        recipe: DiMORecipe,
        teacher: MaskedModel,
        student: MaskedModel,
        objective: DiMOObjective,
        runtime: Runtime,
    ) -> None:
        super().__init__(recipe, runtime, teacher_sha256(teacher))
        self.objective = objective
        self.teacher = frozen_teacher(teacher, recipe.precision, self.device)
        self.student = student.to(self.device).train()
        for parameter in self.student.embedding_parameters():
            parameter.requires_grad_(False)
        self.auxiliary = copy.deepcopy(self.student)
        self.auxiliary.load_state_dict({**self.auxiliary.state_dict(), **teacher.state_dict()})
        self.ema = self.make_ema(self.student)
        self.health = Health(recipe, objective, self.teacher, runtime)
        self.networks = {"student": self.student, "auxiliary": self.auxiliary, "ema": self.ema}
        self.updates = {
            name: self.make_update(self.networks[name]) for name in ("student", "auxiliary")
        }

    def step(self, step: int) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        self._update_student(step, values)
        for turn in range(self.recipe.is_shared, self.recipe.auxiliary_steps):
            self._update_auxiliary(step, turn, values)
        with self.autocast():
            return values | self.health.look(self.student, step)

    def _update_student(self, step: int, values: dict[str, Tensor]) -> None:
        """Eq. 3 on new samples, which the auxiliary model learns from too if they are shared."""
        objective = dataclasses.replace(self.objective, beta=self.recipe.beta_at(step))
        update, shared = self.updates["student"], self.recipe.is_shared
        for batch in self.micro_batches(step, "student"):
            with self.running(batch, *(self.updates.values() if shared else [update])):
                draws = self._draw(batch.index, "student", step)
                with self.autocast():
                    logits, tokens = objective.generate(update.model, draws)
                auxiliary: MaskedModel | Tensor = self.auxiliary
                if shared:
                    auxiliary = self._learn(draws, logits, tokens, values)
                with self.autocast():
                    student = objective.student_loss(
                        logits,
                        tokens,
                        draws.mask,
                        draws.labels,
                        teacher=self.teacher,
                        auxiliary=auxiliary,
                        mask_ratio=draws.mask_ratio,
                    )
                    further = self.further_loss(draws, logits, tokens, student)
                update.backward(student.loss if further is None else student.loss + further)
            masked = draws.mask.sum()
            add_mean(values, "gradient", student.logit_gradient.abs().sum() / masked, masked)
            for name, value in certainty(logits, self.recipe.student_temperature).items():
                add_mean(values, name, value, len(draws.labels))
        self.finish(step, "student", values)
        if shared:
            self._step_auxiliary(step)

    def further_loss(
        self, draws: Draws, logits: Tensor, tokens: Tensor, student: StudentLoss
    ) -> Tensor | None:
        """Added to the loss of a micro-batch, whose logits [B, L, V] have a graph; None: nothing.

        `student` is Di[M]O's own loss, with its gradient in the logits.
        """
        return None

    def _update_auxiliary(self, step: int, turn: int, values: dict[str, Tensor]) -> None:
        """Eq. 5 on new samples of the updated student."""
        purpose = f"auxiliary/{turn}"
        for batch in self.micro_batches(step, purpose):
            with self.running(batch, self.updates["auxiliary"]):
                draws = self._draw(batch.index, purpose, step)
                with self.autocast(), torch.no_grad():
                    logits, tokens = self.objective.generate(self.student, draws)
                self._learn(draws, logits, tokens, values)
        self._step_auxiliary(step)

    def _draw(self, index: Tensor, purpose: str, step: int) -> Draws:
        return self.objective.draw(self.student, self.recipe.seed, index, purpose, step=step)

    def _learn(
        self, draws: Draws, logits: Tensor, tokens: Tensor, values: dict[str, Tensor]
    ) -> Tensor:
        """Adds to the auxiliary model's gradient; returns its logits at the masked positions."""
        update = self.updates["auxiliary"]
        with self.autocast():
            auxiliary = self.objective.auxiliary_loss(
                update.model, tokens, draws.mask, draws.labels, student_logits=logits
            )
        weight = draws.mask.float().mean()  # its loss is a mean over masked tokens
        update.backward(auxiliary.loss, weight)
        add_mean(values, "auxiliary_loss", auxiliary.loss, weight)
        return auxiliary.logits

    def _step_auxiliary(self, step: int) -> None:
        factor = self.recipe.learning_rate_factor(step)
        self.updates["auxiliary"].step(self.recipe.auxiliary_learning_rate * factor)
