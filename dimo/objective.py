"""The Di[M]O objective (Zhu et al., arXiv 2503.15457) on one screen. Read this page first.

A student turns x_init into tokens x in one step. x is re-masked to the intermediate state x~_t,
where the frozen teacher p and the auxiliary model q (trained to predict the student's own tokens)
are compared token by token. The gradient of their divergence in q's logits is pushed into the
student's logits (Eq. 3), so the student moves until no intermediate state tells the two apart.
"""

__all__ = ["AuxiliaryLoss", "DiMOObjective", "Draws", "StudentLoss"]

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo import rng
from dimo.divergence import logit_gradient
from dimo.guidance import guided_logits
from dimo.masking import mask_count, mask_ratio, random_mask
from dimo.models import MaskedModel
from dimo.samplers.one_step import TokenInitialization, initial_state


@dataclass(frozen=True)
class Draws:
    """Every random number of one update, so that a step is a function of its inputs."""

    labels: Tensor  # [B] int64, uniform over the classes
    initial: TokenInitialization  # x_init and the noise of its embedding
    gumbel: Tensor  # [B, L, V] float32, chooses the student's tokens
    mask: Tensor  # [B, L] bool, True = re-masked in the intermediate state


@dataclass(frozen=True)
class StudentLoss:
    """`loss` has the gradient of Eq. 3; the rest is for logging."""

    loss: Tensor  # scalar: sum over tokens, mean over the batch
    logit_gradient: Tensor  # [B, L, V], zero where not re-masked


@dataclass(frozen=True)
class AuxiliaryLoss:
    loss: Tensor  # scalar: mean cross-entropy of the masked tokens


@dataclass(frozen=True)
class DiMOObjective:
    """What is fixed during one distillation.

    Attributes:
        divergence: "forward_kl", "reverse_kl" or "jeffreys".
        beta: Share of the reverse KL in "jeffreys"; may be negative.
        init_mask_ratio: r, the share of masked tokens in x_init.
        embedding_noise: sigma, the perturbation of x_init's embeddings.
        mask_schedule: gamma, how much of the student's output is re-masked.
        guidance_scale: s of the teacher; the auxiliary model is never guided.
        label_smoothing: That of the teacher's own training, so that it cancels in p = q.
        keep_mask_class: True compares the mask class too, as the official code does; by default
            the student cannot emit the mask token, so its logit is left out everywhere.
    """

    divergence: str = "jeffreys"
    beta: float = 0.0
    init_mask_ratio: float = 0.6
    embedding_noise: float = 0.1
    mask_schedule: str = "arccos"
    guidance_scale: float = 1.0
    label_smoothing: float = 0.0
    keep_mask_class: bool = False

    def draw(self, model: MaskedModel, seed: int, index: Tensor, purpose: str) -> Draws:
        """The random numbers of images `index` [B] for one purpose ("student" or "auxiliary")."""
        length, vocabulary = model.num_tokens, model.codebook_size + self.keep_mask_class
        u = rng.uniform(seed, index, f"{purpose}/mask_ratio", ())
        ranks = rng.random_ranks(seed, index, f"{purpose}/mask", length)
        return Draws(
            labels=rng.integers(seed, index, f"{purpose}/label", (), model.num_classes),
            initial=initial_state(
                model,
                rng.ImageNoise(seed, index),
                purpose,
                init_mask_ratio=self.init_mask_ratio,
                embedding_noise=self.embedding_noise,
            ),
            gumbel=rng.gumbel(
                seed, index, f"{purpose}/sample", (length, vocabulary), dtype=torch.float32
            ),
            mask=random_mask(ranks, mask_count(mask_ratio(self.mask_schedule, u), length)),
        )

    def generate(self, student: MaskedModel, draws: Draws) -> tuple[Tensor, Tensor]:
        """One step of the student: logits z [B, L, V] and tokens x ~ softmax(z), int64 [B, L]."""
        initial = draws.initial
        logits = self._visible(
            student,
            student(
                initial.tokens,
                draws.labels,
                embedding_noise=self.embedding_noise,
                noise=initial.noise,
            ),
        )
        return logits, (logits.detach() + draws.gumbel).argmax(-1)

    def student_loss(
        self,
        student_logits: Tensor,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor,
        *,
        teacher: MaskedModel,
        auxiliary: MaskedModel,
    ) -> StudentLoss:
        """The surrogate whose gradient in the student's logits is Eq. 3.

        Args:
            student_logits: z [B, L, V], with their graph.
            tokens: x [B, L], the student's sample.
            mask: [B, L] bool, which of them the intermediate state hides.
            labels: [B].
            teacher: Frozen, in eval mode.
            auxiliary: The auxiliary model.
        """
        with torch.no_grad():
            intermediate_tokens = tokens.masked_fill(mask, teacher.mask_token_id)
            p = guided_logits(teacher, intermediate_tokens, labels, self.guidance_scale)
            q = auxiliary(intermediate_tokens, labels)
            gradient = logit_gradient(
                self.divergence,
                teacher_logits=self._visible(teacher, p),
                auxiliary_logits=self._visible(auxiliary, q),
                beta=self.beta,
            )
            gradient = gradient * mask[..., None]
        # d/dz of <z, g> with g held fixed is g itself.
        loss = (student_logits * gradient).sum() / len(labels)
        return StudentLoss(loss, gradient)

    def auxiliary_loss(
        self, auxiliary: MaskedModel, tokens: Tensor, mask: Tensor, labels: Tensor
    ) -> AuxiliaryLoss:
        """Cross-entropy of the student's tokens at the masked positions (Eq. 5)."""
        logits = auxiliary(tokens.masked_fill(mask, auxiliary.mask_token_id), labels)
        loss = F.cross_entropy(
            self._visible(auxiliary, logits)[mask],
            tokens[mask],
            label_smoothing=self.label_smoothing,
        )
        return AuxiliaryLoss(loss)

    def _visible(self, model: MaskedModel, logits: Tensor) -> Tensor:
        return logits[..., : model.codebook_size + self.keep_mask_class].float()
