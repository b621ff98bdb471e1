"""Recipes: frozen dataclasses <-> TOML. An unknown key is an error that names the nearest one."""

__all__ = [
    "DistillRecipe",
    "ExtractorRecipe",
    "TrainRecipe",
    "list_recipes",
    "load_recipe",
    "to_toml",
]

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from dimo.divergence import DIVERGENCES
from dimo.errors import DimoError, unknown_name
from dimo.masking import MASK_SCHEDULES
from dimo.strict import Origin, decode

_RECIPES = Path(__file__).parent / "recipes"
_LEARNING_RATE_SCHEDULES = ("constant", "cosine", "linear")
_PRECISIONS = ("float32", "bfloat16")


def _check(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise DimoError(f"recipe key {key} = {value!r} is out of range; allowed: {allowed}")


def _known(kind: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise unknown_name(kind, value, allowed)


@dataclass(frozen=True, kw_only=True)
class _Optimization:
    """What every training has."""

    seed: int = 0
    steps: int
    batch_size: int = 256
    learning_rate: float
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 100
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "bfloat16"
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "checkpoint_every"):
            _check(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        _check(self.lr_warmup_steps >= 0, "lr_warmup_steps", self.lr_warmup_steps, ">= 0")
        _check(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "0 < x < 1")
        _check(self.adam_eps > 0, "adam_eps", self.adam_eps, "> 0")
        _check(self.grad_clip > 0, "grad_clip", self.grad_clip, "> 0")
        _check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 <= x < 1")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        _check(
            all(0 <= b < 1 for b in self.adam_betas), "adam_betas", self.adam_betas, "0 <= x < 1"
        )
        _known("lr_schedule", self.lr_schedule, _LEARNING_RATE_SCHEDULES)
        _known("precision", self.precision, _PRECISIONS)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of one step: a pure function, so nothing of it needs saving."""
        return self.learning_rate * self.learning_rate_factor(step)

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then constant, or a fall to zero along a cosine or a line."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, self.steps - self.lr_warmup_steps)
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if self.lr_schedule == "linear" else 1.0


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(_Optimization):
    """One Di[M]O distillation; names as in `dimo.objective` and DESIGN's vocabulary."""

    kind: ClassVar[str] = "distill"
    teacher: str
    auxiliary_learning_rate: float
    auxiliary_steps: int = 1
    divergence: str = "jeffreys"
    beta: float = 0.0
    init_mask_ratio: float = 0.6
    embedding_noise: float = 0.1
    mask_schedule: str = "arccos"
    teacher_guidance_scale: float = 1.0
    dropout: float = 0.0
    keep_mask_class: bool = False
    temperature: float = 1.0
    temperature_selected_by: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.auxiliary_learning_rate
        _check(0 < rate < 1, "auxiliary_learning_rate", rate, "0 < x < 1")
        _check(self.auxiliary_steps >= 1, "auxiliary_steps", self.auxiliary_steps, ">= 1")
        for key in ("init_mask_ratio", "embedding_noise"):
            _check(0 <= getattr(self, key) <= 1, key, getattr(self, key), "0 <= x <= 1")
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= x < 1")
        _check(self.temperature > 0, "temperature", self.temperature, "> 0")
        for key in ("beta", "teacher_guidance_scale"):
            _check(math.isfinite(getattr(self, key)), key, getattr(self, key), "a finite number")
        _known("divergence", self.divergence, DIVERGENCES)
        _known("mask schedule", self.mask_schedule, MASK_SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(_Optimization):
    """Training of an embedded teacher from data: masked cross-entropy, label dropout, EMA."""

    kind: ClassVar[str] = "train"
    teacher: str
    mask_schedule: str = "arccos"
    label_smoothing: float = 0.0
    label_dropout: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("label_smoothing", "label_dropout", "dropout"):
            _check(0 <= getattr(self, key) < 1, key, getattr(self, key), "0 <= x < 1")
        _known("mask schedule", self.mask_schedule, MASK_SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class ExtractorRecipe(_Optimization):
    """Training of an embedded feature extractor."""

    kind: ClassVar[str] = "extractor"
    extractor: str
    label_smoothing: float = 0.1
    pixel_noise: float = 12.0
    shift_probability: float = 0.3


Recipe: TypeAlias = DistillRecipe | TrainRecipe | ExtractorRecipe
_R = TypeVar("_R", DistillRecipe, TrainRecipe, ExtractorRecipe)
_KINDS: dict[str, type[DistillRecipe] | type[TrainRecipe] | type[ExtractorRecipe]] = {
    c.kind: c for c in (DistillRecipe, TrainRecipe, ExtractorRecipe)
}


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def load_recipe(expected: type[_R], name_or_path: str, overrides: Sequence[str] = ()) -> _R:
    """Reads a recipe by name or path and applies `key=value` overrides.

    Raises:
        DimoError: Unknown recipe, key or kind, bad type or value.
    """
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
    if _KINDS[kind] is not expected:
        raise DimoError(
            f"recipe {name_or_path!r} is of kind {kind!r}, this command needs {expected.kind!r}"
        )
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise DimoError(f"--set {override!r} is not key=value; e.g. --set steps=500")
        content[key.strip()] = _parse_value(value.strip())
    origin = Origin(f"recipe {name_or_path!r}", "keys are explained in dimo/config.py")
    return decode(expected, content, origin)


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
        if isinstance(value, str):
            text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        elif isinstance(value, bool):
            text = str(value).lower()
        else:
            text = str(list(value)) if isinstance(value, tuple) else repr(value)
        lines.append(f"{field.name} = {text}")
    return "\n".join(lines) + "\n"
