"""The Di[M]O objective (Zhu et al., arXiv 2503.15457) on one screen. Read this page first.

A student turns x_init into tokens x in one step. x is re-masked to the intermediate state x~_t,
where the frozen teacher p and the auxiliary model q (trained to predict the student's own tokens)
are compared token by token. The gradient of their divergence in q's logits is pushed into the
student's logits (Eq. 3), so the student moves until no intermediate state tells the two apart.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo.errors import unknown_name
from dimo.guidance import guidance_scales, guided_logits
from dimo.methods.dimo.divergence import REDUCTIONS, gradient_divisor, logit_gradient
from dimo.methods.dimo.draws import Draws, Initialization, Masking, draw
from dimo.models import MaskedModel
from dimo.models.layers import gather_positions
from dimo.samplers.base import masked_positions


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
        sharpened = _tempered(logits.detach(), self.student_temperature)
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

        Teacher and auxiliary model are asked for the re-masked positions only.

        Args:
            student_logits: z [B, L, V], with their graph.
            tokens: x [B, L], the student's sample.
            mask: [B, L] bool, which of them the intermediate state hides.
            labels: [B].
            teacher: Frozen, in eval mode.
            auxiliary: The auxiliary model, or what `auxiliary_loss` found its logits to be here.
            mask_ratio: [B], the share that was drawn for the mask; adaptive guidance needs it.
        """
        assert not getattr(teacher, "training", False), "a teacher in train mode has dropout"
        with torch.no_grad():
            positions = _masked_positions(mask)
            kept = gather_positions(mask[..., None], positions)  # [B, K, 1]
            state = (tokens.masked_fill(mask, teacher.mask_token_id), labels, positions)
            rule, scale = self.guidance.teacher_guidance, self.guidance.teacher_guidance_scale
            scales = guidance_scales(rule, scale, mask_ratio)
            p = _tempered(self._logits_at(teacher, *state, scales), self.teacher_temperature)
            q = auxiliary if isinstance(auxiliary, Tensor) else self._logits_at(auxiliary, *state)
            q = _tempered(q, self.auxiliary_temperature)
            gradient = logit_gradient(
                self.divergence, teacher_logits=p, auxiliary_logits=q, beta=self.beta
            )
            if self.weighting != "constant":
                z = gather_positions(student_logits, positions)
                gradient = gradient / self._divisor(z, p, kept[..., 0])
            gradient = gradient.masked_fill(~kept, 0.0)
            gradient = _to_positions(gradient, positions, student_logits)
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

        With soft targets, (1 - alpha) of it plus alpha T^2 KL(softmax(z / T) || softmax(q / T)).

        Args:
            auxiliary: The auxiliary model.
            tokens: x [B, L], the student's sample.
            mask: [B, L] bool, which of them the intermediate state hides.
            labels: [B].
            student_logits: z [B, L, V], what x was drawn from; soft targets need it.
        """
        positions = _masked_positions(mask)
        state = (tokens.masked_fill(mask, auxiliary.mask_token_id), labels, positions)
        kept = gather_positions(mask[..., None], positions)[..., 0]
        asked = self._logits_at(auxiliary, *state)
        logits = asked[kept]  # [N, V], in the order of the mask
        loss = F.cross_entropy(logits, tokens[mask], label_smoothing=self.label_smoothing)
        if self.soft_targets:
            assert student_logits is not None, "soft targets are the student's distribution"
            soft = self._soft_loss(logits, student_logits.detach()[mask])
            loss = self.soft_targets * soft + (1 - self.soft_targets) * loss
        return AuxiliaryLoss(loss, asked.detach())

    def _divisor(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
        return gradient_divisor(
            self.weighting,
            student_logits=_tempered(student_logits, self.student_temperature),
            teacher_logits=teacher_logits,
            mask=mask,
        )

    def _soft_loss(self, logits: Tensor, student_logits: Tensor) -> Tensor:
        """T^2 KL(student || auxiliary), mean over the tokens of [N, V]."""
        temperature = self.soft_target_temperature
        log_p, log_q = (_tempered(z, temperature).log_softmax(-1) for z in (student_logits, logits))
        by_class = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        by_token = by_class.sum(-1) if self.soft_target_reduction == "sum" else by_class.mean(-1)
        return by_token.mean() * temperature**2

    def _logits_at(
        self,
        model: MaskedModel,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        return self._visible(model, guided_logits(model, tokens, labels, scale, positions))

    def _visible(self, model: MaskedModel, logits: Tensor) -> Tensor:
        return logits[..., : model.codebook_size + self.keep_mask_class].float()


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _masked_positions(mask: Tensor) -> Tensor | None:
    """Positions [B, K] that hold every masked one of mask [B, L], or None for all of them."""
    positions = masked_positions(mask)
    return None if positions.shape == mask.shape else positions


def _to_positions(values: Tensor, positions: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of `gather_positions`: values [B, K, V] in a [B, L, V] that is zero elsewhere."""
    if positions is None:
        return values
    whole = values.new_zeros(like.shape)
    return whole.scatter_(1, positions[..., None].expand_as(values), values)
