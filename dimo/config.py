"""Recipes: TOML <-> frozen dataclasses. An unknown key is an error that names the nearest one."""

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from dimo.errors import DimoError, unknown_name
from dimo.methods import METHODS
from dimo.methods.base import DistillationRecipe, Optimization
from dimo.methods.pretraining import ExtractorRecipe, TrainRecipe
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
    return cast(_R, decode(recipes[kind], content, origin))


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def to_toml(recipe: Optimization) -> str:
    """The recipe with every value resolved, readable by `load_recipe`."""
    values = {"kind": recipe.kind, **dataclasses.asdict(recipe)}
    # a JSON scalar or list is TOML, which has no null
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if value is not None
    ]
    return "".join(lines)
