"""The Di[M]O objective (Zhu et al., arXiv 2503.15457) on one screen. Read this page first.

A student turns x_init into tokens x in one step. x is re-masked to the intermediate state x~_t,
where the frozen teacher p and the auxiliary model q (trained to predict the student's own tokens)
are compared token by token. The gradient of their divergence in q's logits is pushed into the
student's logits (Eq. 3), so the student moves until no intermediate state tells the two apart.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo import rng
from dimo.config import DistillRecipe
from dimo.errors import unknown_name
from dimo.guidance import guidance_scales, guided_logits
from dimo.initialization import (
    TokenInitialization,
    embedding_noise_at,
    init_mask_ratio_at,
    initial_state,
)
from dimo.masking import mask_count, mask_ratio, random_mask
from dimo.methods.dimo.divergence import REDUCTIONS, gradient_divisor, logit_gradient
from dimo.models import MaskedModel
from dimo.models.layers import gather_positions
from dimo.samplers.base import masked_positions


@dataclass(frozen=True)
class Draws:
    """Every random number of one update, so that a step is a function of its inputs."""

    labels: Tensor  # [B] int64, uniform over the classes
    initial: TokenInitialization  # x_init and the noise of its embedding
    embedding_noise: float  # sigma of this step
    gumbel: Tensor  # [B, L, V] float32, chooses the student's tokens
    mask_ratio: Tensor  # [B] float64, the share to re-mask
    mask: Tensor  # [B, L] bool, True = re-masked in the intermediate state


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
    """What is fixed during one distillation.

    The fields are keys of a recipe and explained in `dimo.config.DistillRecipe`. Two differ:
    `guidance_scale` is its `teacher_guidance_scale`, and `label_smoothing` is resolved: that of the
    teacher's own training, so that it cancels in p = q, unless the recipe has one.

    Raises:
        DimoError: Unknown reduction; other names are refused where they are used.
    """

    divergence: str = "jeffreys"
    beta: float = 0.0
    weighting: str = "constant"
    loss_reduction: str = "sum"
    token_initialization: str = "mixed"
    init_mask_ratio: float = 0.6  # r
    init_mask_ratio_range: tuple[float, float] | None = None
    embedding_noise: float = 0.1  # sigma
    embedding_noise_warmup: str = "none"
    embedding_noise_warmup_steps: int = 0
    mask_schedule: str = "arccos"  # gamma
    auxiliary_mask_schedule: str | None = None
    mask_ratio_range: tuple[float, float] = (0.0, 1.0)
    guidance_scale: float = 1.0  # s of the teacher; the auxiliary model is never guided
    teacher_guidance: str = "constant"
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
        """The random numbers of images `index` [B] for one purpose ("student" or "auxiliary...").

        Those of a step (r and sigma) are functions of `seed` and `step`, shared by both purposes.
        """
        length, vocabulary = model.num_tokens, model.codebook_size + self.keep_mask_class
        sigma = embedding_noise_at(
            step,
            final=self.embedding_noise,
            warmup=self.embedding_noise_warmup,
            warmup_steps=self.embedding_noise_warmup_steps,
        )
        initial = initial_state(
            model,
            rng.ImageNoise(seed, index),
            purpose,
            init_mask_ratio=init_mask_ratio_at(
                seed,
                step,
                init_mask_ratio=self.init_mask_ratio,
                bounds=self.init_mask_ratio_range,
            ),
            embedding_noise=sigma,
            token_initialization=self.token_initialization,
        )
        ratio = self.remasked_share(purpose, rng.uniform(seed, index, f"{purpose}/mask_ratio", ()))
        ranks = rng.random_ranks(seed, index, f"{purpose}/mask", length)
        return Draws(
            labels=rng.integers(seed, index, f"{purpose}/label", (), model.num_classes),
            initial=initial,
            embedding_noise=sigma,
            gumbel=rng.gumbel(
                seed, index, f"{purpose}/sample", (length, vocabulary), dtype=torch.float32
            ),
            mask_ratio=ratio,
            mask=random_mask(ranks, mask_count(ratio, length)),
        )

    def remasked_share(self, purpose: str, u: Tensor) -> Tensor:
        """rho [B], the share of the student's tokens that is re-masked, for uniform u [B]."""
        schedule = self.mask_schedule
        if purpose != "student" and self.auxiliary_mask_schedule is not None:
            schedule = self.auxiliary_mask_schedule
        return mask_ratio(schedule, u).clamp(*self.mask_ratio_range)

    def generate(self, student: MaskedModel, draws: Draws) -> tuple[Tensor, Tensor]:
        """One step of the student: logits z [B, L, V] and tokens x ~ softmax(z / T), [B, L]."""
        initial = draws.initial
        logits = self._visible(
            student,
            student(
                initial.tokens,
                draws.labels,
                embedding_noise=draws.embedding_noise,
                noise=initial.noise,
            ),
        )
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
            scale = guidance_scales(self.teacher_guidance, self.guidance_scale, mask_ratio)
            p = _tempered(self._logits_at(teacher, *state, scale), self.teacher_temperature)
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
        target, found = (
            _tempered(z, temperature).log_softmax(-1) for z in (student_logits, logits)
        )
        by_class = F.kl_div(found, target, reduction="none", log_target=True)
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


def objective_of(recipe: DistillRecipe, *, label_smoothing: float) -> DiMOObjective:
    """The objective a recipe describes.

    Args:
        recipe: What to do.
        label_smoothing: That of the teacher's own training; the recipe's own value goes first.
    """
    smoothing = recipe.label_smoothing
    renamed: dict[str, Any] = {
        "guidance_scale": recipe.teacher_guidance_scale,
        "label_smoothing": label_smoothing if smoothing is None else smoothing,
    }
    names = {field.name for field in dataclasses.fields(DiMOObjective)} - renamed.keys()
    return DiMOObjective(**{name: getattr(recipe, name) for name in names}, **renamed)


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
