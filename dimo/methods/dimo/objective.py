"""The Di[M]O objective (Zhu et al., arXiv 2503.15457). Read this file first.

A student turns x_init into tokens x in one step. x is re-masked to the intermediate state x~_t,
where the frozen teacher p and the auxiliary model q (trained to predict the student's own tokens)
are compared token by token. The gradient of their divergence in q's logits is pushed into the
student's logits (Eq. 3), so the student moves until no intermediate state tells the two apart.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo.guidance import guidance_scales, guided_logits
from dimo.methods.base import known
from dimo.methods.dimo import divergence
from dimo.methods.dimo.divergence import tempered
from dimo.methods.dimo.draws import Draws, Initialization, MaskedState, Masking, draw
from dimo.models import MaskedModel
from dimo.samplers.base import temperature_between


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
    logits: Tensor  # [B, K, V] at `MaskedState.positions`, detached


@dataclass(frozen=True)
class DiMOObjective:
    """The settings of one distillation; `dimo.methods.dimo.recipe.DiMORecipe` explains them."""

    initialization: Initialization = field(default_factory=Initialization)
    masking: Masking = field(default_factory=Masking)
    guidance: Guidance = field(default_factory=Guidance)
    divergence: str = "jeffreys"
    beta: float = 0.0
    weighting: str = "constant"
    loss_reduction: str = "sum"
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    teacher_final_temperature: float | None = None
    auxiliary_temperature: float = 1.0
    label_smoothing: float = 0.0
    soft_targets: float = 0.0  # alpha
    soft_target_temperature: float = 1.0  # T
    soft_target_reduction: str = "sum"
    keep_mask_class: bool = False  # False leaves the mask token's logit out everywhere

    def __post_init__(self) -> None:
        for value in (self.loss_reduction, self.soft_target_reduction):
            known("reduction", value, divergence.REDUCTIONS)

    def draw(
        self, model: MaskedModel, seed: int, index: Tensor, purpose: str, *, step: int = 0
    ) -> Draws:
        """As `dimo.methods.dimo.draws.draw`."""
        classes = model.codebook_size + self.keep_mask_class
        return draw(self.initialization, self.masking, model, seed, index, purpose, step, classes)

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
        """The surrogate whose gradient in the student's logits z [B, L, V] is Eq. 3.

        `tokens` [B, L] is the student's sample, re-masked where `mask` [B, L] is True. `auxiliary`
        may be `AuxiliaryLoss.logits` of the same state. Adaptive guidance and a final temperature
        need `mask_ratio` [B].
        """
        assert not getattr(teacher, "training", False), "a teacher in train mode has dropout"
        with torch.no_grad():
            state = MaskedState.of(teacher, tokens, mask, labels)  # x~_t
            rule, scale = self.guidance.teacher_guidance, self.guidance.teacher_guidance_scale
            p = self._logits(teacher, state, guidance_scales(rule, scale, mask_ratio))
            q = auxiliary if isinstance(auxiliary, Tensor) else self._logits(auxiliary, state)
            p = tempered(p, self._teacher_temperature(mask_ratio))
            q = tempered(q, self.auxiliary_temperature)
            gradient = divergence.logit_gradient(self.divergence, p, q, self.beta)  # Eq. 4
            if self.weighting != "constant":
                z = tempered(state.gather(student_logits), self.student_temperature)
                gradient /= divergence.gradient_divisor(self.weighting, z, p, state.mask)
            gradient = state.scatter(gradient)
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

        Soft targets make it (1 - alpha) of that + alpha T^2 KL(softmax(z / T) || softmax(q / T))
        with z = `student_logits`. Arguments as for `student_loss`.
        """
        state = MaskedState.of(auxiliary, tokens, mask, labels)
        q = self._logits(auxiliary, state)
        logits = q[state.mask]  # [N, V], in the order of the mask
        loss = F.cross_entropy(logits, tokens[mask], label_smoothing=self.label_smoothing)
        if self.soft_targets:
            assert student_logits is not None, "soft targets are the student's distribution"
            t, reduction = self.soft_target_temperature, self.soft_target_reduction
            soft = divergence.soft_target_loss(student_logits.detach()[mask], logits, t, reduction)
            loss = self.soft_targets * soft + (1 - self.soft_targets) * loss
        return AuxiliaryLoss(loss, q.detach())

    def _teacher_temperature(self, mask_ratio: Tensor | None) -> float | Tensor:
        """One for all, or one for each image, [B, 1, 1]."""
        if self.teacher_final_temperature is None:
            return self.teacher_temperature
        assert mask_ratio is not None, "a temperature that changes depends on the mask ratio"
        first, last = self.teacher_temperature, self.teacher_final_temperature
        return temperature_between(first, last, 1 - mask_ratio.float())[:, None, None]

    def _logits(self, model: MaskedModel, state: MaskedState, scale: float | Tensor = 1) -> Tensor:
        logits = guided_logits(model, state.tokens, state.labels, scale, state.positions)
        return self._visible(model, logits)

    def _visible(self, model: MaskedModel, logits: Tensor) -> Tensor:
        return logits[..., : model.codebook_size + self.keep_mask_class].float()
