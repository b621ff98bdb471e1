"""The objective of di4c (Hayakawa et al., arXiv 2410.08709).

The student is a mixture of products: p_theta(x_0 | x_t) = E_lambda prod_d p_theta(x_0^d | x_t,
lambda), lambda ~ U[0, 1]. Unlike a product it can represent the dependence between tokens that are
revealed together. x_t is data with gamma(r) of its tokens masked (t = 1 - r):

- distillation, where r >= 1 - delta: E_lambda KL(teacher || student_lambda), weight 1 / delta: few
  tokens are masked there, and a product is nearly exact;
- consistency, elsewhere: -log p_theta(x_0 | x_t) of x_0 ~ p_theta(. | x_u) held fixed, where x_u is
  one step of delta of the teacher's own sampler from x_t: one step of the student then learns to do
  what two do;
- data (di4c-d): alpha(r) times -log p_theta(x_0 | x_t) of the datum itself.

E_lambda is a mean over N latents. Control variate: in the sampled terms, log p_theta minus the log
of the product of its marginals, log(p / prod_d p^d); plus the exact mean of what was subtracted,
the cross-entropy of the target's marginals. Those of the consistency's target are known; those of
the data are the teacher's, and this marginal term has weight 1 at every r. Only the rest, the
correlation, has the weight alpha. alpha = 0 is this repository's "di4c": what the official code
does with `--alpha_const 0`; the paper's own di4c has no published settings.

Differences from the official code: sums run over masked tokens only (revealed ones are known) and
leave out the mask class; each step of the teacher reveals at least one token; its confidence noise
falls to zero over its own 1 / delta steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dimo import rng
from dimo.masking import mask_count, mask_ratio, random_mask
from dimo.methods.di4c.network import Di4CStudent
from dimo.methods.masked_data import (
    DataDraw,
    draw_categorical,
    draw_data,
    log_probabilities,
    reveal,
)
from dimo.models import MaskedModel

_STEEPNESS, _MIDDLE = 20.0, 0.5  # of alpha(r), the official `sigmoid`


@dataclass(frozen=True)
class Draws:
    """Every random number of one update."""

    data: DataDraw
    r: Tensor  # [B], 0 = all masked, 1 = nothing
    mask: Tensor  # [B, L] bool, what x_t hides
    count: Tensor  # [B] int64, tokens that the teacher's step reveals
    latents: Tensor  # [B, N], at t
    target_latents: Tensor  # [B, N], at u
    proposal: Tensor  # [B, N, L] uniform, the teacher's tokens
    choice: Tensor  # [B, N, L] Gumbel, the teacher's confidence noise
    sample: Tensor  # [B, N, L] uniform, x_0 of the target


@dataclass(frozen=True)
class Target:
    """The targets of the losses, without gradients."""

    tokens: Tensor  # x_t [B, L]
    teacher: Tensor  # log p [B, L, V] at x_t
    samples: Tensor  # [B, 1 + N, L]: the datum, then x_0 ~ p_theta(. | x_u), one a latent
    marginal: Tensor  # [B, L, V], exact mean of those samples given x_u and their latents


@dataclass(frozen=True)
class Losses:
    """Per image [B], weighted."""

    distillation: Tensor
    consistency: Tensor
    data: Tensor

    @property
    def total(self) -> Tensor:
        """Scalar, the mean of their sum."""
        return (self.distillation + self.consistency + self.data).mean()


class LatentMixture(nn.Module):
    """The student under N latents, in chunks that are recomputed in the backward pass.

    An update differentiates one call of this module. Besides the activations of a chunk of
    `chunk` latents (0: all, and nothing is recomputed), memory grows with N by [B, S, N], and by
    [B, L, V] per chunk.
    """

    def __init__(self, student: Di4CStudent, chunk: int) -> None:
        super().__init__()
        self.student, self.chunk = student, chunk

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor,
        drop: Tensor,
        latents: Tensor,
        samples: Tensor,
        teacher: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the losses need of the mixture, from x_t, samples x_0 [B, S, L] and latents [B, N].

        Returns:
            sum_d log p(x_0^d | x_t, lambda) [B, S, N]; log of the marginals
            E_lambda p(. | x_t, lambda) [B, L, V]; E_lambda KL(teacher || student_lambda) [B].
        """
        count = latents.shape[1]
        state = (tokens, mask, labels, drop, samples, teacher)
        if not 0 < self.chunk < count:
            results = [self._of_chunk(latents, *state)]
        else:
            results = [
                checkpoint(self._of_chunk, part, *state, use_reentrant=False)
                for part in torch.split(latents, self.chunk, dim=1)
            ]
        joint, marginal, cross_entropy = zip(*results, strict=True)
        log_marginal = torch.stack(marginal).logsumexp(0) - math.log(count)
        entropy = -(_masked_sum(teacher.exp() * teacher, mask))
        divergence = torch.stack(cross_entropy).sum(0) / count - entropy  # what is left is small
        return torch.cat(joint, dim=2), log_marginal, divergence.float()

    def _of_chunk(
        self,
        latents: Tensor,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor,
        drop: Tensor,
        samples: Tensor,
        teacher: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` for some latents [B, n], as sums over them."""
        log_p = under_latents(self.student, tokens[:, None], labels, drop, latents)  # [B, n, L, V]
        index = samples.mT[:, None].expand(-1, log_p.shape[1], -1, -1)  # [B, n, L, S]
        joint = (log_p.gather(-1, index) * mask[:, None, :, None]).sum(2)  # [B, n, S]
        cross_entropy = -_masked_sum(teacher.exp() * log_p.sum(1), mask)
        return joint.mT, log_p.logsumexp(1), cross_entropy


def under_latents(
    student: MaskedModel, tokens: Tensor, labels: Tensor, drop: Tensor, latents: Tensor
) -> Tensor:
    """log p(. | x, lambda), float32 [B, n, L, V], of tokens [B, 1 or n, L] and latents [B, n]."""
    batch, n = latents.shape
    rows = tokens.expand(-1, n, -1).flatten(0, 1)
    repeated = (value.repeat_interleave(n) for value in (labels, drop))
    log_p = log_probabilities(student, rows, *repeated, z=latents.flatten())
    return log_p.view(batch, n, *log_p.shape[1:])


@dataclass(frozen=True)
class Di4CObjective:
    """The settings of one distillation; the fields are keys of `Di4CRecipe`."""

    num_latents: int = 32
    latent_chunk: int = 0
    step_size: float = 0.05  # delta
    alpha: float = 0.1
    control_variate: bool = True
    mask_schedule: str = "arccos"  # gamma
    choice_temperature: float = 4.5
    label_dropout: float = 0.1

    def draw(self, tokens: Tensor, labels: Tensor, seed: int, index: Tensor) -> Draws:
        """The draws of images `index` [B], data from tokens [M, L] and labels [M]."""
        length = tokens.shape[1]
        data = draw_data(tokens, labels, seed, index, label_dropout=self.label_dropout)
        r = rng.uniform(seed, index, "r", ())
        masked = mask_count(mask_ratio(self.mask_schedule, r), length)
        after = (mask_ratio(self.mask_schedule, (r + self.step_size).clamp_max(1)) * length).round()
        by_latent = (self.num_latents, length)
        return Draws(
            data,
            r,
            mask=random_mask(rng.random_ranks(seed, index, "mask", length), masked),
            count=(masked - after.to(masked)).clamp_min(1),
            latents=rng.uniform(seed, index, "latents", (self.num_latents,)),
            target_latents=rng.uniform(seed, index, "target_latents", (self.num_latents,)),
            proposal=rng.uniform(seed, index, "proposal", by_latent),
            choice=rng.gumbel(seed, index, "choice", by_latent, torch.float32),
            sample=rng.uniform(seed, index, "sample", by_latent),
        )

    @torch.no_grad()
    def target(self, draws: Draws, *, teacher: MaskedModel, student: MaskedModel) -> Target:
        """One step of the teacher, then the student's mixture at x_u; both in eval mode."""
        data, mask = draws.data, draws.mask
        tokens = data.tokens.masked_fill(mask, teacher.mask_token_id)  # x_t
        log_p = log_probabilities(teacher, tokens, data.labels, data.drop)
        left = (1 - draws.r / (1 - self.step_size)).clamp_min(0)
        states = reveal(
            log_p,
            tokens,
            mask,
            count=draws.count,
            noise_scale=self.choice_temperature * left,
            uniform=draws.proposal,
            gumbel=draws.choice,
        )  # x_u [B, N, L]
        marginal, samples = torch.zeros_like(log_p), [data.tokens[:, None]]
        size = self.latent_chunk or self.num_latents
        parts = (states, draws.target_latents, draws.sample)
        chunks = (torch.split(part, size, dim=1) for part in parts)
        for state, latents, uniform in zip(*chunks, strict=True):
            p = under_latents(student, state, data.labels, data.drop, latents).exp()
            hidden = state == teacher.mask_token_id  # [B, n, L]
            drawn = draw_categorical(p, uniform[..., None])[..., 0]
            samples.append(torch.where(hidden, drawn, state))
            known = state.masked_fill(hidden, 0).mT  # [B, L, n]
            marginal += (p * hidden[..., None]).sum(1)
            marginal.scatter_add_(-1, known, (~hidden).mT.to(marginal))
        return Target(tokens, log_p, torch.cat(samples, dim=1), marginal / self.num_latents)

    def losses(self, mixture: Callable[..., Any], draws: Draws, target: Target) -> Losses:
        """The losses of `LatentMixture`, or of what wraps it, with their weights."""
        data, mask, samples = draws.data, draws.mask, target.samples
        state = (target.tokens, mask, data.labels, data.drop)
        joint, log_marginal, divergence = mixture(*state, draws.latents, samples, target.teacher)
        loss = math.log(joint.shape[-1]) - joint.logsumexp(-1)  # -log p_theta(x_0) [B, 1 + N]
        if self.control_variate:  # plus log prod_d p_theta^d(x_0^d)
            loss = (log_marginal.gather(-1, samples.mT) * mask[..., None]).sum(1) + loss
        consistency, of_data = loss[:, 1:].mean(1), self._alpha(draws.r) * loss[:, 0]
        if self.control_variate:
            consistency = consistency - _masked_sum(target.marginal * log_marginal, mask).float()
            of_data = of_data - _masked_sum(target.teacher.exp() * log_marginal, mask).float()
        is_end = draws.r >= 1 - self.step_size
        return Losses(
            distillation=divergence * is_end / self.step_size,
            consistency=consistency * ~is_end,
            data=of_data,
        )

    def _alpha(self, r: Tensor) -> Tensor:
        """alpha(r) [B], float32, which falls from alpha to 0 around the middle."""
        return (self.alpha * torch.sigmoid(_STEEPNESS * (_MIDDLE - r))).float()


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Over classes and masked tokens of [B, L, V]: float64 [B]."""
    return (values.sum(-1, dtype=torch.float64) * mask).sum(-1)
