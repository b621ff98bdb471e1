"""Recipes: frozen dataclasses <-> TOML. An unknown key is an error that names the nearest one."""

import dataclasses
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from dimo.errors import DimoError, unknown_name
from dimo.guidance import GUIDANCE_RULES
from dimo.initialization import EMBEDDING_NOISE_WARMUPS, TOKEN_INITIALIZATIONS
from dimo.masking import MASK_SCHEDULES
from dimo.methods.dimo.divergence import DIVERGENCES, REDUCTIONS, WEIGHTINGS
from dimo.methods.recipe import Optimization, check, known
from dimo.methods.recipes import Di4CRecipe, SDTTRecipe
from dimo.util.schema import Origin, decode

_RECIPES = Path(__file__).parent / "recipes"
_AUXILIARY_SAMPLES = ("fresh", "shared")
_OPTIMIZERS = ("adamw", "muon")
_TEMPERATURES = (
    "temperature",
    "student_temperature",
    "teacher_temperature",
    "auxiliary_temperature",
    "soft_target_temperature",
)


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(Optimization):
    """One Di[M]O distillation; names as in `dimo.methods.dimo.objective` and DESIGN's vocabulary.

    Attributes:
        teacher: A row of `dimo.zoo.teachers`.
        auxiliary_learning_rate: That of the auxiliary model; `learning_rate` is the student's.
        auxiliary_steps: Auxiliary updates after each student update. The official `fake_rounds` = k
            makes the same sequence of updates, counting k steps where this counts one.
        auxiliary_samples: What the first of them learns from: fresh (official), new images of the
            updated student; or shared, those of the student's own update in the same intermediate
            states, which saves a forward of either network.
        divergence: forward_kl, reverse_kl, jeffreys, js, hellinger or pearson.
        beta: Share of the reverse KL in jeffreys; may be negative.
        weighting: constant (official weight factor 1), or dmd: each image's gradient divided by
            its mean |p_theta - p_phi|.
        loss_reduction: sum over an image's tokens and classes, or mean over them.
        token_initialization: mixed, or the ablations masked, random (tokens), fixed (token).
        init_mask_ratio: r, the masked share of x_init.
        init_mask_ratio_range: [low, high]: one r drawn for each step, the official random_low_high.
        inference_mask_ratio: r the student is sampled with; the middle of the range unless given.
        embedding_noise: sigma, at the end of its warm-up and in sampling.
        embedding_noise_warmup: none, linear, cos or exp, from 0 to sigma; the official ramps go to
            1, which embedding_noise = 1 restores.
        embedding_noise_warmup_steps: Length of that, in steps since the start of the training.
        mask_schedule: Law of the re-masked share: arccos, cosine, linear, square, mage.
        auxiliary_mask_schedule: That of the auxiliary update, the same unless given.
        mask_ratio_range: Bounds the re-masked share is clamped to, (0.02, 0.98) for Meissonic.
        teacher_guidance_scale: s of the teacher, 1 = off.
        teacher_guidance: constant, or adaptive: 1 + (s - 1) times the re-masked share.
        student_temperature: Divides the logits the student's tokens are drawn from in training.
        teacher_temperature: Divides the teacher's logits.
        auxiliary_temperature: Divides the auxiliary model's logits where it meets the teacher's.
        soft_targets: alpha, share of the student's distribution in the auxiliary model's targets.
        soft_target_temperature: T of both distributions in that term.
        soft_target_reduction: Of its KL over the classes: sum, or the official mean, V times less.
        label_smoothing: Of the auxiliary cross-entropy, that of the teacher's row unless given.
        dropout: Of student and auxiliary model while they train; the teacher has none.
        keep_mask_class: The student may emit the mask token, as the official one may; else that
            token's logit is left out everywhere.
        temperature: Divides the student's logits when it is sampled.
        temperature_selected_by: How that was chosen.
        prompts: Text file with the prompts of a text-conditioned teacher, one a line.
    """

    kind: ClassVar[str] = "distill"
    teacher: str
    auxiliary_learning_rate: float
    auxiliary_steps: int = 1
    auxiliary_samples: str = "fresh"
    divergence: str = "jeffreys"
    beta: float = 0.0
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
    mask_ratio_range: tuple[float, float] = (0.0, 1.0)
    teacher_guidance_scale: float = 1.0
    teacher_guidance: str = "constant"
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    auxiliary_temperature: float = 1.0
    soft_targets: float = 0.0
    soft_target_temperature: float = 1.0
    soft_target_reduction: str = "sum"
    label_smoothing: float | None = None
    dropout: float = 0.0
    keep_mask_class: bool = False
    temperature: float = 1.0
    temperature_selected_by: str = "default"
    prompts: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names()
        rate = self.auxiliary_learning_rate
        check(0 < rate < 1, "auxiliary_learning_rate", rate, "0 < x < 1")
        check(self.auxiliary_steps >= 1, "auxiliary_steps", self.auxiliary_steps, ">= 1")
        for key in ("init_mask_ratio", "embedding_noise", "soft_targets", "inference_mask_ratio"):
            value = getattr(self, key)
            check(value is None or 0 <= value <= 1, key, value, "0 <= x <= 1")
        for key in ("dropout", "label_smoothing"):
            value = getattr(self, key)
            check(value is None or 0 <= value < 1, key, value, "0 <= x < 1")
        for key in ("init_mask_ratio_range", "mask_ratio_range"):
            low, high = getattr(self, key) or (0.0, 1.0)
            check(0 <= low <= high <= 1, key, [low, high], "0 <= low <= high <= 1")
        for key in _TEMPERATURES:
            check(getattr(self, key) > 0, key, getattr(self, key), "> 0")
        for key in ("beta", "teacher_guidance_scale"):
            check(math.isfinite(getattr(self, key)), key, getattr(self, key), "a finite number")
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
        known("mask schedule", self.mask_schedule, MASK_SCHEDULES)
        if self.auxiliary_mask_schedule is not None:
            known("mask schedule", self.auxiliary_mask_schedule, MASK_SCHEDULES)
        known("auxiliary samples", self.auxiliary_samples, _AUXILIARY_SAMPLES)
        if self.auxiliary_samples == "shared" and self.auxiliary_mask_schedule is not None:
            raise DimoError(
                f"recipe key auxiliary_mask_schedule = {self.auxiliary_mask_schedule!r} needs "
                'auxiliary_samples = "fresh": shared samples lie in the student update\'s '
                "intermediate states; leave one of them out"
            )

    @property
    def method(self) -> str:
        """A key of `dimo.zoo.students.METHODS`."""
        return "dimo"

    @property
    def sampling_mask_ratio(self) -> float:
        """r the student is sampled with: as given, the middle of the range, or the fixed one."""
        if self.inference_mask_ratio is not None:
            return self.inference_mask_ratio
        if self.init_mask_ratio_range is not None:
            return sum(self.init_mask_ratio_range) / 2
        return self.init_mask_ratio


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(Optimization):
    """Training of an embedded teacher from data: masked cross-entropy, label dropout, EMA.

    Its tokenizer is trained first, in `tokenizer_steps` if it is a network.

    Attributes:
        optimizer: adamw, or muon: that for the matrices of the blocks and AdamW for the rest.
    """

    kind: ClassVar[str] = "train"
    teacher: str
    optimizer: str = "adamw"
    mask_schedule: str = "arccos"
    label_smoothing: float = 0.0
    label_dropout: float = 0.1
    dropout: float = 0.1
    tokenizer_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        known("optimizer", self.optimizer, _OPTIMIZERS)
        steps = self.tokenizer_steps
        check(steps >= 0, "tokenizer_steps", steps, ">= 0")
        for key in ("label_smoothing", "label_dropout", "dropout"):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), "0 <= x < 1")
        known("mask schedule", self.mask_schedule, MASK_SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class ExtractorRecipe(Optimization):
    """Training of an embedded feature extractor."""

    kind: ClassVar[str] = "extractor"
    extractor: str
    label_smoothing: float = 0.1
    pixel_noise: float = 12.0
    shift_probability: float = 0.3


DistillationRecipe: TypeAlias = DistillRecipe | Di4CRecipe | SDTTRecipe
Recipe: TypeAlias = DistillationRecipe | TrainRecipe | ExtractorRecipe
_DISTILLATIONS: tuple[type[Recipe], ...] = (DistillRecipe, Di4CRecipe, SDTTRecipe)
_R = TypeVar("_R", bound=Recipe)
_KINDS: dict[str, type[Recipe]] = {
    c.kind: c for c in (*_DISTILLATIONS, TrainRecipe, ExtractorRecipe)
}


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def load_recipe(expected: type[_R], name_or_path: str, overrides: Sequence[str] = ()) -> _R:
    """Reads a recipe by name or path and applies `key=value` overrides.

    Raises:
        DimoError: Unknown recipe, key or kind, bad type or value.
    """
    recipe = _load((expected,), name_or_path, overrides)
    assert isinstance(recipe, expected)
    return recipe


def load_distillation(name_or_path: str, overrides: Sequence[str] = ()) -> DistillationRecipe:
    """As `load_recipe`, for the recipe of any distillation method.

    Raises:
        DimoError: As `load_recipe`.
    """
    recipe = _load(_DISTILLATIONS, name_or_path, overrides)
    assert isinstance(recipe, DistillationRecipe)
    return recipe


def _load(expected: tuple[type[Any], ...], name_or_path: str, overrides: Sequence[str]) -> Recipe:
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = _RECIPES / f"{name_or_path}.toml"
        if not path.is_file():
            raise unknown_name(
                "recipe", name_or_path, list_recipes(), "or give the path of a .toml file"
            )
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise DimoError(
            f"no recipe file at {path}; packaged recipes: {', '.join(list_recipes())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DimoError(f"recipe {path} is not valid TOML: {error}; correct the file") from error
    kind = content.pop("kind", None)
    if kind not in _KINDS:
        raise unknown_name("recipe kind", kind, _KINDS, f"set kind in {path}")
    if _KINDS[kind] not in expected:
        wanted = " or ".join(repr(cls.kind) for cls in expected)
        raise DimoError(f"recipe {name_or_path!r} is of kind {kind!r}, this command needs {wanted}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise DimoError(f"--set {override!r} is not key=value; e.g. --set steps=500")
        content[key.strip()] = _parse_value(value.strip())
    origin = Origin(f"recipe {name_or_path!r}", "keys are explained in dimo/config.py")
    recipe: Recipe = decode(_KINDS[kind], content, origin)
    return recipe


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def to_toml(recipe: Recipe) -> str:
    """The recipe with every value resolved, readable by `load_recipe`."""
    lines = [f'kind = "{recipe.kind}"']
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value is None:
            continue  # TOML has no null; to leave a key out is to leave it open
        if isinstance(value, str):
            text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        elif isinstance(value, bool):
            text = str(value).lower()
        else:
            text = str(list(value)) if isinstance(value, tuple) else repr(value)
        lines.append(f"{field.name} = {text}")
    return "\n".join(lines) + "\n"
