"""What di4c and SDTT share: they learn from masked data, and their students take several steps."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dimo import rng
from dimo.methods.base import ALL_MASKED, Distillation, DistillationRecipe, check, known
from dimo.models import MaskedModel

if TYPE_CHECKING:
    from dimo.data.tokens import TokenData

_SCHEDULES = ("arccos", "cosine")  # fall from 1 to 0, as a sampler's masked fraction does


@dataclass(frozen=True, kw_only=True)
class DataRecipe(DistillationRecipe):
    """Recipe keys of the methods that learn from data.

    Attributes:
        mask_schedule: gamma, from all masked at r = 0 to nothing masked at r = 1.
        choice_temperature: Of the teacher's confidence noise.
        label_dropout: Fraction of images without their label, which the unconditional branch of
            guided sampling needs.
        guidance_scale: Of the student's sampling; that of the teacher's row unless given.
    """

    mask_schedule: str = "arccos"
    choice_temperature: float = 4.5
    label_dropout: float = 0.1
    dropout: float = 0.1
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known("mask schedule", self.mask_schedule, _SCHEDULES)
        noise = self.choice_temperature
        check(noise >= 0, "choice_temperature", noise, ">= 0; 0 is no noise")
        check(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "0 <= x < 1")
        scale = self.guidance_scale
        check(scale is None or scale > 0, "guidance_scale", scale, "> 0")


class DataDistillation(Distillation):
    """A method of a `DataRecipe`."""

    def student_settings(self, recipe: Any) -> dict[str, Any]:
        return {**ALL_MASKED, "guidance_scale": recipe.guidance_scale}


def required(data: "TokenData | None") -> "TokenData":
    assert data is not None, "`Method.needs_data` says that it comes"
    return data


@dataclass(frozen=True)
class DataDraw:
    """Tokenized images of the data set."""

    tokens: Tensor  # x_0 [B, L] int64
    labels: Tensor  # [B] int64
    drop: Tensor  # [B] bool, True = label dropped


def draw_data(
    tokens: Tensor, labels: Tensor, seed: int, index: Tensor, *, label_dropout: float
) -> DataDraw:
    """Images drawn with replacement from tokens [N, L] and labels [N], for rows `index` [B]."""
    rows = rng.integers(seed, index, "row", (), len(tokens))
    drop = rng.uniform(seed, index, "drop", ()) < label_dropout
    return DataDraw(tokens[rows], labels[rows], drop)


def log_probabilities(
    model: MaskedModel, tokens: Tensor, labels: Tensor, drop: Tensor, **inputs: Any
) -> Tensor:
    """log p(x_0 | x_t) of the codebook, float32 [B, L, V]; no image holds a mask token."""
    logits = model(tokens, labels, drop=drop, **inputs)
    return logits[..., : model.codebook_size].float().log_softmax(-1)


def draw_categorical(p: Tensor, uniform: Tensor) -> Tensor:
    """Classes of p [.., V] by its inverse CDF at uniform numbers [.., K]: int64 [.., K]."""
    cdf = p.cumsum(-1)
    at = (uniform.to(cdf) * cdf[..., -1:]).contiguous()
    return torch.searchsorted(cdf, at, right=True).clamp_max_(p.shape[-1] - 1)


def reveal(
    log_p: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    count: Tensor,
    noise_scale: Tensor,
    uniform: Tensor,
    gumbel: Tensor,
) -> Tensor:
    """One step of the confidence sampler (`dimo.samplers.confidence`), N times from one state.

    Draws every masked token and keeps those with the largest log p plus scaled Gumbel noise.

    Args:
        log_p: The teacher's [B, L, V].
        tokens: x_t [B, L].
        mask: [B, L] bool, what x_t hides.
        count: [B] int64, how many tokens are revealed.
        noise_scale: [B], of the confidence noise.
        uniform: [B, N, L] in (0, 1), chooses the tokens.
        gumbel: [B, N, L], the confidence noise.

    Returns:
        x_u [B, N, L] int64.
    """
    proposal = draw_categorical(log_p.exp(), uniform.mT).mT  # [B, N, L]
    confidence = log_p.gather(-1, proposal.mT).mT + noise_scale[:, None, None] * gumbel
    confidence = confidence.masked_fill(~mask[:, None], -torch.inf)
    order = confidence.argsort(-1, descending=True).argsort(-1)
    return torch.where(order < count[:, None, None], proposal, tokens[:, None])
