"""What di4c and SDTT share: they learn from masked data, and their students take several steps."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dimo import rng
from dimo.engine.distributed import Runtime
from dimo.methods.base import (
    ALL_MASKED,
    Distillation,
    DistillationRecipe,
    Task,
    TeacherDefaults,
    check,
    frozen_teacher,
    known,
    teacher_sha256,
)
from dimo.models import MaskedModel

if TYPE_CHECKING:
    from dimo.data.tokens import TokenData

_SCHEDULES = ("arccos", "cosine")  # fall from 1 to 0, as a sampler's masked fraction does


@dataclass(frozen=True, kw_only=True)
class DataRecipe(DistillationRecipe):
    """Recipe keys of the methods that learn from data."""

    mask_schedule: str = "arccos"  # gamma, from all masked at r = 0 to nothing masked at r = 1
    choice_temperature: float = 4.5  # of the teacher's confidence noise
    label_dropout: float = 0.1  # fraction of images without their label
    dropout: float = 0.1  # of the networks in training; the teacher has none
    guidance_scale: float | None = None  # of the student's sampling; None: the teacher's

    def __post_init__(self) -> None:
        super().__post_init__()
        known("mask schedule", self.mask_schedule, _SCHEDULES)
        noise = self.choice_temperature
        check(noise >= 0, "choice_temperature", noise, ">= 0; 0 is no noise")
        check(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "0 <= x < 1")
        scale = self.guidance_scale
        check(scale is None or scale > 0, "guidance_scale", scale, "> 0")


class DataTask(Task):
    """Trains a student that starts with the teacher's weights; a subclass adds `updates`.

    Errors as for `dimo.methods.dimo.step.DiMOTask`.
    """

    def __init__(
        self,
        recipe: DataRecipe,
        teacher: MaskedModel,
        student: Any,
        data: "TokenData",
        runtime: Runtime,
    ) -> None:
        super().__init__(recipe, runtime, teacher_sha256(teacher) + data.sha256)
        self.teacher = frozen_teacher(teacher, recipe.precision, self.device)
        self.student = student.to(self.device).train()
        self.tokens, self.labels = data.tokens.to(self.device), data.labels.to(self.device)
        self.ema = self.make_ema(self.student)
        self.networks = {"student": self.student, "ema": self.ema}


class DataDistillation(Distillation):
    """A method of a `DataRecipe`."""

    task_class: ClassVar[type[DataTask]]

    def task(
        self,
        recipe: Any,
        teacher: MaskedModel,
        student: Any,
        data: "TokenData | None",
        defaults: TeacherDefaults,
        runtime: Runtime,
    ) -> Task:
        assert data is not None, "`Method.needs_data` is set"
        return self.task_class(recipe, teacher, student, data, runtime)

    def student_settings(self, recipe: Any) -> dict[str, Any]:
        return {**ALL_MASKED, "guidance_scale": recipe.guidance_scale}


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
    """One step of the confidence sampler (`dimo.samplers.confidence`), N times from one state x_t.

    Draws every masked token from log p [B, L, V] by `uniform` [B, N, L] and keeps the `count` [B]
    with the largest log p + `noise_scale` [B] * `gumbel` [B, N, L]. Returns x_u int64 [B, N, L].
    """
    proposal = draw_categorical(log_p.exp(), uniform.mT).mT  # [B, N, L]
    confidence = log_p.gather(-1, proposal.mT).mT + noise_scale[:, None, None] * gumbel
    confidence = confidence.masked_fill(~mask[:, None], -torch.inf)
    order = confidence.argsort(-1, descending=True).argsort(-1)
    return torch.where(order < count[:, None, None], proposal, tokens[:, None])
