"""The recipe of a Di[M]O distillation."""

import math
from dataclasses import dataclass
from typing import ClassVar

from dimo.errors import DimoError
from dimo.guidance import GUIDANCE_RULES
from dimo.initialization import EMBEDDING_NOISE_WARMUPS, TOKEN_INITIALIZATIONS
from dimo.masking import MASK_SCHEDULES
from dimo.methods.base import DistillationRecipe, check, known
from dimo.methods.dimo.divergence import DIVERGENCES, REDUCTIONS, WEIGHTINGS


@dataclass(frozen=True, kw_only=True)
class DiMORecipe(DistillationRecipe):
    """One Di[M]O distillation; `kind = "distill"` in its TOML files.

    Attributes:
        auxiliary_learning_rate: `learning_rate` is the student's.
        auxiliary_steps: Auxiliary updates per student update. The official `fake_rounds` = k makes
            the same sequence of updates, and counts k steps where this counts one.
        auxiliary_warmup_steps: Steps at the start in which the auxiliary model alone learns, for a
            run that starts from a student.
        auxiliary_samples: Samples of the first auxiliary update: fresh (official), drawn from the
            updated student; or shared, the student update's own, which saves two forwards.
        divergence: forward_kl, reverse_kl, jeffreys, js, hellinger or pearson.
        beta: Weight of the reverse KL in jeffreys; may be negative.
        beta_final: That of the last quarter of the run; beta moves to it in a line in the third.
        weighting: constant (official), or dmd: divided by each image's mean |p_theta - p_phi|.
        loss_reduction: sum over an image's tokens and classes, or mean over them.
        token_initialization: mixed, or the ablations masked, random (tokens), fixed (token).
        init_mask_ratio: r, the masked fraction of x_init.
        init_mask_ratio_range: [low, high]: one r drawn for each step, the official random_low_high.
        inference_mask_ratio: r in sampling; the middle of the range unless given.
        embedding_noise: sigma, at the end of its warm-up and in sampling.
        embedding_noise_warmup: none, linear, cos or exp, from 0 to sigma (officially to 1).
        embedding_noise_warmup_steps: Length of the warm-up, from step 0.
        mask_schedule: Law of the re-masked fraction: arccos, cosine, linear, square or mage.
        auxiliary_mask_schedule: That of the auxiliary update; the same unless given.
        fully_masked: Fraction of the states that have everything masked, outside the schedule and
            its range: they show what a student forgot of its condition, which its own tokens hide
            in all others.
        mask_ratio_range: Bounds of the re-masked fraction, (0.02, 0.98) for Meissonic.
        teacher_guidance_scale: s of the teacher, 1 = off.
        teacher_guidance: constant, or adaptive: 1 + (s - 1) times the re-masked fraction.
        student_temperature: Divides the logits the student's tokens are drawn from in training.
        teacher_temperature: Divides the teacher's logits.
        teacher_final_temperature: That of states with next to nothing masked, teacher_temperature
            then being that of fully masked ones: the inverse moves in a line with the re-masked
            fraction, as in sampling in random order. The same unless given.
        auxiliary_temperature: Divides the auxiliary model's logits in the divergence.
        soft_targets: alpha, weight of the student's distribution in the auxiliary model's targets.
        soft_target_temperature: T of both distributions in that term.
        soft_target_reduction: Of its KL over the classes: sum, or the official mean, V times less.
        label_smoothing: Of the auxiliary cross-entropy; that of the teacher's row unless given.
        keep_mask_class: Keep the mask token's logit, so the student may emit it (official).
        prompts: Text file with one prompt per line, for a text-conditioned teacher.
    """

    kind: ClassVar[str] = "distill"
    auxiliary_learning_rate: float
    auxiliary_steps: int = 1
    auxiliary_warmup_steps: int = 0
    auxiliary_samples: str = "fresh"
    divergence: str = "jeffreys"
    beta: float = 0.0
    beta_final: float | None = None
    weighting: str = "constant"
    loss_reduction: str = "sum"
    token_initialization: str = "mixed"
    init_mask_ratio: float = 0.6
    init_mask_ratio_range: tuple[float, float] | None = None
    inference_mask_ratio: float | None = None
    embedding_noise: float = 0.1
    embedding_noise_warmup: str = "none"
    embedding_noise_warmup_steps: int = 0
    mask_schedule: str = "arccos"
    auxiliary_mask_schedule: str | None = None
    fully_masked: float = 0.0
    mask_ratio_range: tuple[float, float] = (0.0, 1.0)
    teacher_guidance_scale: float = 1.0
    teacher_guidance: str = "constant"
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    teacher_final_temperature: float | None = None
    auxiliary_temperature: float = 1.0
    soft_targets: float = 0.0
    soft_target_temperature: float = 1.0
    soft_target_reduction: str = "sum"
    label_smoothing: float | None = None
    keep_mask_class: bool = False
    prompts: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names()
        rate = self.auxiliary_learning_rate
        check(0 < rate < 1, "auxiliary_learning_rate", rate, "0 < x < 1")
        check(self.auxiliary_steps >= 1, "auxiliary_steps", self.auxiliary_steps, ">= 1")
        waited = self.auxiliary_warmup_steps
        check(waited >= 0, "auxiliary_warmup_steps", waited, ">= 0")
        ratios = ("init_mask_ratio", "inference_mask_ratio", "fully_masked")
        for key in (*ratios, "embedding_noise", "soft_targets"):
            value = getattr(self, key)
            check(value is None or 0 <= value <= 1, key, value, "0 <= x <= 1")
        smoothing = self.label_smoothing
        check(smoothing is None or 0 <= smoothing < 1, "label_smoothing", smoothing, "0 <= x < 1")
        for key in ("init_mask_ratio_range", "mask_ratio_range"):
            low, high = getattr(self, key) or (0.0, 1.0)
            check(0 <= low <= high <= 1, key, [low, high], "0 <= low <= high <= 1")
        for name in ("student", "teacher", "teacher_final", "auxiliary", "soft_target"):
            key = f"{name}_temperature"
            value = getattr(self, key)
            check(value is None or value > 0, key, value, "> 0")
        for key in ("beta", "beta_final", "teacher_guidance_scale"):
            value = getattr(self, key)
            check(value is None or math.isfinite(value), key, value, "a finite number")
        least = 0 if self.embedding_noise_warmup == "none" else 1
        steps = self.embedding_noise_warmup_steps
        check(steps >= least, "embedding_noise_warmup_steps", steps, f">= {least}")

    def _check_names(self) -> None:
        known("divergence", self.divergence, DIVERGENCES)
        known("weighting", self.weighting, WEIGHTINGS)
        known("token initialization", self.token_initialization, TOKEN_INITIALIZATIONS)
        known("embedding noise warm-up", self.embedding_noise_warmup, EMBEDDING_NOISE_WARMUPS)
        known("guidance rule", self.teacher_guidance, GUIDANCE_RULES)
        known("loss reduction", self.loss_reduction, REDUCTIONS)
        known("soft target reduction", self.soft_target_reduction, REDUCTIONS)
        for schedule in (self.mask_schedule, self.auxiliary_mask_schedule or self.mask_schedule):
            known("mask schedule", schedule, MASK_SCHEDULES)
        known("auxiliary samples", self.auxiliary_samples, ("fresh", "shared"))
        if self.is_shared and self.auxiliary_mask_schedule is not None:
            raise DimoError(
                f"recipe key auxiliary_mask_schedule = {self.auxiliary_mask_schedule!r} needs "
                'auxiliary_samples = "fresh": shared samples have the student update\'s '
                "intermediate states; leave one of them out"
            )

    @property
    def method(self) -> str:
        return "dimo"

    def learning_rate_at(self, step: int) -> float:
        return 0.0 if step < self.auxiliary_warmup_steps else super().learning_rate_at(step)

    def beta_at(self, step: int) -> float:
        """The weight of the reverse KL at one step, without saved state."""
        if self.beta_final is None:
            return self.beta
        moved = min(1.0, max(0.0, 4 * step / self.steps - 2))
        return self.beta + (self.beta_final - self.beta) * moved

    @property
    def is_shared(self) -> bool:
        """Whether the auxiliary model's first update uses the student's own samples."""
        return self.auxiliary_samples == "shared"

    @property
    def sampling_mask_ratio(self) -> float:
        """r the student is sampled with: as given, the middle of the range, or the fixed one."""
        if self.inference_mask_ratio is not None:
            return self.inference_mask_ratio
        if self.init_mask_ratio_range is not None:
            return sum(self.init_mask_ratio_range) / 2
        return self.init_mask_ratio
