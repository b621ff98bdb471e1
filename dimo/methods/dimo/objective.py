"""The Di[M]O objective (Zhu et al., arXiv 2503.15457). Read this file first.

A student turns x_init into tokens x in one step. x is re-masked to the intermediate state x~_t,
where the frozen teacher p and the auxiliary model q (trained to predict the student's own tokens)
are compared token by token. The gradient of their divergence in q's logits is pushed into the
student's logits (Eq. 3), so the student moves until no intermediate state tells the two apart.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo.errors import unknown_name
from dimo.guidance import guidance_scales, guided_logits
from dimo.methods.dimo.divergence import (
    REDUCTIONS,
    gradient_divisor,
    logit_gradient,
    soft_target_loss,
    tempered,
)
from dimo.methods.dimo.draws import (
    Draws,
    Initialization,
    Masking,
    draw,
    intermediate_state,
    scatter_positions,
)
from dimo.models import MaskedModel
from dimo.models.layers import gather_positions


@dataclass(frozen=True)
class Guidance:
    """Guidance of the teacher; the auxiliary model is never guided."""

    teacher_guidance_scale: float = 1.0  # s
    teacher_guidance: str = "constant"


@dataclass(frozen=True)
class StudentLoss:
    """`loss` has the gradient of Eq. 3, and half the square of `logit_gradient` as its value."""

    loss: Tensor  # scalar: sum over tokens and classes, mean over the batch
    logit_gradient: Tensor  # [B, L, V], zero where not re-masked


@dataclass(frozen=True)
class AuxiliaryLoss:
    loss: Tensor  # scalar: mean over the masked tokens
    logits: Tensor  # [B, K, V] of the positions that `student_loss` asks for, without their graph


@dataclass(frozen=True)
class DiMOObjective:
    """The settings of one distillation; `dimo.methods.dimo.method.DiMORecipe` explains the keys.

    Raises:
        DimoError: Unknown reduction; other names are checked where they are used.
    """

    initialization: Initialization = field(default_factory=Initialization)
    masking: Masking = field(default_factory=Masking)
    guidance: Guidance = field(default_factory=Guidance)
    divergence: str = "jeffreys"
    beta: float = 0.0
    weighting: str = "constant"
    loss_reduction: str = "sum"
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    auxiliary_temperature: float = 1.0
    label_smoothing: float = 0.0
    soft_targets: float = 0.0  # alpha
    soft_target_temperature: float = 1.0  # T
    soft_target_reduction: str = "sum"
    keep_mask_class: bool = False  # False leaves the mask token's logit out everywhere

    def __post_init__(self) -> None:
        for value in (self.loss_reduction, self.soft_target_reduction):
            if value not in REDUCTIONS:
                raise unknown_name("reduction", value, REDUCTIONS)

    def draw(
        self, model: MaskedModel, seed: int, index: Tensor, purpose: str, *, step: int = 0
    ) -> Draws:
        """As `dimo.methods.dimo.draws.draw`."""
        return draw(
            self.initialization,
            self.masking,
            model,
            seed=seed,
            index=index,
            purpose=purpose,
            step=step,
            vocabulary=model.codebook_size + self.keep_mask_class,
        )

    def generate(self, student: MaskedModel, draws: Draws) -> tuple[Tensor, Tensor]:
        """One step of the student: logits z [B, L, V] and tokens x ~ softmax(z / T), [B, L]."""
        initial, sigma = draws.initial, draws.embedding_noise
        z = student(initial.tokens, draws.labels, embedding_noise=sigma, noise=initial.noise)
        logits = self._visible(student, z)
        sharpened = tempered(logits.detach(), self.student_temperature)
        return logits, (sharpened + draws.gumbel).argmax(-1)

    def student_loss(
        self,
        student_logits: Tensor,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor,
        *,
        teacher: MaskedModel,
        auxiliary: MaskedModel | Tensor,
        mask_ratio: Tensor | None = None,
    ) -> StudentLoss:
        """The surrogate whose gradient in the student's logits is Eq. 3.

        Args:
            student_logits: z [B, L, V], with their graph.
            tokens: x [B, L], the student's sample.
            mask: [B, L] bool, True = hidden in the intermediate state.
            labels: [B].
            teacher: Frozen, in eval mode.
            auxiliary: The auxiliary model, or `AuxiliaryLoss.logits` of the same state.
            mask_ratio: [B], as drawn; adaptive guidance needs it.
        """
        assert not getattr(teacher, "training", False), "a teacher in train mode has dropout"
        with torch.no_grad():
            state, kept = intermediate_state(teacher, tokens, mask, labels)  # x~_t
            rule, scale = self.guidance.teacher_guidance, self.guidance.teacher_guidance_scale
            p = self._logits(teacher, *state, scale=guidance_scales(rule, scale, mask_ratio))
            q = auxiliary if isinstance(auxiliary, Tensor) else self._logits(auxiliary, *state)
            p, q = tempered(p, self.teacher_temperature), tempered(q, self.auxiliary_temperature)
            gradient = logit_gradient(  # Eq. 4
                self.divergence, teacher_logits=p, auxiliary_logits=q, beta=self.beta
            )
            if self.weighting != "constant":
                z = tempered(gather_positions(student_logits, state[-1]), self.student_temperature)
                gradient = gradient / gradient_divisor(
                    self.weighting, student_logits=z, teacher_logits=p, mask=kept
                )
            gradient = gradient.masked_fill(~kept[..., None], 0.0)
            gradient = scatter_positions(gradient, state[-1], student_logits)
        count = len(labels) if self.loss_reduction == "sum" else student_logits.numel()
        # d/dz of <z, g> with g held fixed is g itself; the value is that of |z - (z - g)|^2 / 2
        product = (student_logits * gradient).sum()
        loss = (product - product.detach() + gradient.square().sum() / 2) / count
        return StudentLoss(loss, gradient)

    def auxiliary_loss(
        self,
        auxiliary: MaskedModel,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor,
        *,
        student_logits: Tensor | None = None,
    ) -> AuxiliaryLoss:
        """Cross-entropy of the student's tokens at the masked positions (Eq. 5).

        With soft targets, (1 - alpha) of it plus alpha T^2 KL(softmax(z / T) || softmax(q / T)),
        which needs `student_logits`. Arguments as for `student_loss`.
        """
        state, kept = intermediate_state(auxiliary, tokens, mask, labels)
        q = self._logits(auxiliary, *state)
        logits = q[kept]  # [N, V], in the order of the mask
        loss = F.cross_entropy(logits, tokens[mask], label_smoothing=self.label_smoothing)
        if self.soft_targets:
            assert student_logits is not None, "soft targets are the student's distribution"
            soft = soft_target_loss(
                student_logits=student_logits.detach()[mask],
                auxiliary_logits=logits,
                temperature=self.soft_target_temperature,
                reduction=self.soft_target_reduction,
            )
            loss = self.soft_targets * soft + (1 - self.soft_targets) * loss
        return AuxiliaryLoss(loss, q.detach())

    def _logits(self, model: MaskedModel, *state: Any, scale: float | Tensor = 1.0) -> Tensor:
        tokens, labels, positions = state
        return self._visible(model, guided_logits(model, tokens, labels, scale, positions))

    def _visible(self, model: MaskedModel, logits: Tensor) -> Tensor:
        return logits[..., : model.codebook_size + self.keep_mask_class].float()
