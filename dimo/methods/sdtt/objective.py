"""The objective of SDTT (Deschenaux & Gulcehre, arXiv 2410.21035): self-distillation through time.

From masked data, the teacher takes m sampling steps. The target of a token is the teacher's
prediction at the step that reveals it, or at the last step if none does. The student learns all
targets at once, KL(target || student), and so samples with m times fewer steps. After each round
the student's EMA becomes teacher, student and EMA of the next (Algorithms 1 and 2).

Two differences from the paper, which takes ancestral steps at any t: x_t has as many masked tokens
as the sampler has at its steps, and the teacher takes the steps of MaskGIT's confidence sampler.
The optimizer's moments are kept from round to round.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dimo import rng
from dimo.masking import random_mask, tokens_per_step
from dimo.methods.masked_data import DataDraw, draw_data, log_probabilities, reveal
from dimo.models import MaskedModel


@dataclass(frozen=True)
class Draws:
    """Every random number of one update."""

    data: DataDraw
    step: Tensor  # [B] int64, the student's sampling step, 0 = all masked
    mask: Tensor  # [B, L] bool, what x_t hides
    proposal: Tensor  # [B, m, L] uniform, the teacher's tokens
    choice: Tensor  # [B, m, L] Gumbel, the teacher's confidence noise


@dataclass(frozen=True)
class SDTTObjective:
    """The settings of one round; the other fields are keys of `SDTTRecipe`."""

    num_steps: int  # sampling steps of this round's teacher
    substeps: int = 2  # m
    mask_schedule: str = "arccos"  # gamma
    choice_temperature: float = 4.5
    label_dropout: float = 0.1

    def draw(self, tokens: Tensor, labels: Tensor, seed: int, index: Tensor) -> Draws:
        """The draws of images `index` [B], data from tokens [M, L] and labels [M]."""
        length = tokens.shape[1]
        data = draw_data(tokens, labels, seed, index, label_dropout=self.label_dropout)
        step = rng.integers(seed, index, "step", (), self.num_steps // self.substeps)
        counts = self._counts(data.tokens)
        revealed = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[step * self.substeps]
        shape = (self.substeps, length)
        return Draws(
            data,
            step,
            mask=random_mask(rng.random_ranks(seed, index, "mask", length), length - revealed),
            proposal=rng.uniform(seed, index, "proposal", shape),
            choice=rng.gumbel(seed, index, "choice", shape, torch.float32),
        )

    @torch.no_grad()
    def target(self, draws: Draws, *, teacher: MaskedModel) -> Tensor:
        """Log-probabilities of the masked tokens, float32 [B, L, V], by m steps of the teacher."""
        data, mask = draws.data, draws.mask
        counts = self._counts(data.tokens)
        tokens = data.tokens.masked_fill(mask, teacher.mask_token_id)
        target: Tensor | None = None
        for substep in range(self.substeps):
            number = draws.step * self.substeps + substep  # [B], of the teacher's step
            log_p = log_probabilities(teacher, tokens, data.labels, data.drop)
            hidden = tokens == teacher.mask_token_id
            target = log_p if target is None else torch.where(hidden[..., None], log_p, target)
            tokens = reveal(
                log_p,
                tokens,
                hidden,
                count=counts[number],
                noise_scale=self.choice_temperature * (1 - number / (self.num_steps - 1)),
                uniform=draws.proposal[:, substep, None],
                gumbel=draws.choice[:, substep, None],
            )[:, 0]
        assert target is not None, "there are at least two substeps"
        return target

    def loss(self, student: MaskedModel, draws: Draws, target: Tensor) -> Tensor:
        """KL(target || student), scalar: mean over the masked tokens."""
        data, mask = draws.data, draws.mask
        tokens = data.tokens.masked_fill(mask, student.mask_token_id)
        log_p = log_probabilities(student, tokens, data.labels, data.drop)
        divergence = (target.exp() * (target - log_p)).sum(-1)  # [B, L]
        return (divergence * mask).sum() / mask.sum()

    def _counts(self, tokens: Tensor) -> Tensor:
        """Number of tokens that each sampling step reveals, [num_steps]."""
        counts = tokens_per_step(self.mask_schedule, self.num_steps, tokens.shape[1])
        return torch.tensor(counts, device=tokens.device)
