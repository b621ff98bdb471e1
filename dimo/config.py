"""Recipes: TOML <-> frozen dataclasses. An unknown key is an error that names the nearest one."""

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from dimo.errors import DimoError, unknown_name
from dimo.methods import METHODS
from dimo.methods.base import DistillationRecipe, Optimization, check
from dimo.methods.pretraining import ExtractorRecipe, TrainRecipe
from dimo.samplers import LARGEST
from dimo.util.schema import Origin, decode

_RECIPES = Path(__file__).parent / "recipes"
_R = TypeVar("_R", bound=Optimization)


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def load_distillation(name_or_path: str, overrides: Sequence[str] = ()) -> DistillationRecipe:
    """`load_recipe` for the recipe of any distillation method."""
    return load_recipe(DistillationRecipe, name_or_path, overrides)


def load_recipe(expected: type[_R], name_or_path: str, overrides: Sequence[str] = ()) -> _R:
    """Reads a packaged recipe, or a file that ends in ".toml", of the class `expected`.

    `overrides` are `key=value` with values in TOML; a bare word is a string.

    Raises:
        DimoError: Unknown recipe, key or kind; a value of the wrong type or out of range.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = _RECIPES / f"{name_or_path}.toml"
        if not path.is_file():
            next_step = "or give the path of a .toml file, as recipe.toml in the folder of a run"
            raise unknown_name("recipe", name_or_path, list_recipes(), next_step)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DimoError(
            f"no recipe file at {path}; packaged recipes: {', '.join(list_recipes())}"
        ) from None
    except OSError as error:
        raise DimoError(
            f"cannot read recipe {path}: {error.strerror}; give the path of a .toml file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DimoError(f"recipe {path} is not valid TOML: {error}; correct the file") from error
    classes: list[type[Optimization]] = [TrainRecipe, ExtractorRecipe]
    classes += [method.distillation.Recipe for method in METHODS.values()]
    recipes = {cls.kind: cls for cls in classes}
    kind = content.pop("kind", None)
    if kind not in recipes:
        raise unknown_name("recipe kind", kind, recipes, f"set kind in {path}")
    if not issubclass(recipes[kind], expected):
        allowed = " or ".join(repr(k) for k, cls in recipes.items() if issubclass(cls, expected))
        raise DimoError(
            f"recipe {name_or_path!r} is of kind {kind!r}, this command needs {allowed}"
        )
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise DimoError(f"--set {override!r} is not key=value; e.g. --set steps=500")
        content[key.strip()] = _parse_value(value.strip())
    origin = Origin(f"recipe {name_or_path!r}", "keys are explained in dimo/methods")
    recipe = cast(_R, decode(recipes[kind], content, origin))
    for key, number in vars(recipe).items():
        if isinstance(number, float):
            check(abs(number) <= LARGEST, key, number, f"at most {LARGEST:g}")
    return recipe


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def to_toml(recipe: Optimization) -> str:
    """The recipe with every value resolved, readable by `load_recipe`."""
    values = {"kind": recipe.kind, **dataclasses.asdict(recipe)}
    # a JSON scalar or list is TOML, which has no null, and no character 127
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if value is not None
    ]
    return "".join(lines).replace("\x7f", "\\u007f")
