"""What `dimo distill` does, as a function."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimo.config import DistillationRecipe, load_distillation
from dimo.engine import runs
from dimo.engine.distributed import choose_device
from dimo.errors import DimoError, unknown_name
from dimo.zoo.loading import Generator, load
from dimo.zoo.students import METHODS
from dimo.zoo.teachers import get_teacher


def distill(
    teacher: str,
    *,
    out: str | Path,
    recipe: str = "",
    method: str = "",
    settings: Sequence[str] = (),
    device: str = "auto",
    weights: str | Path | None = None,
    data: str | Path | None = None,
    **options: Any,
) -> Generator:
    """Distils a teacher and returns the student; an unfinished run in `out` is resumed.

    Args:
        teacher: A key of `dimo.zoo.teachers.TEACHERS`.
        out: Run folder.
        recipe: Name or path of a recipe; default: the teacher's for `method`.
        method: A key of `METHODS`; default: the recipe's, or "dimo".
        settings: "key=value" strings that replace keys of the recipe.
        device: "auto" takes a GPU if there is one.
        weights: Folder of the teacher's weight files; default: the bundled or the fetched ones.
        data: Token cache, for a method that needs data; default: the bundled data.
        **options: Further arguments of `dimo.engine.runs.distill`, e.g. `on_step`.

    Raises:
        DimoError: As `choose_recipe` and `dimo.engine.runs.distill`.
    """
    name, loaded = choose_recipe(teacher, method, recipe, settings)
    folder = None if weights is None else Path(weights)
    runs.distill(
        loaded,
        Path(out),
        recipe_name=name,
        device=choose_device(device),
        weights=folder,
        data=None if data is None else Path(data),
        **options,
    )
    return load(out, device=device, weights=folder)


def choose_recipe(
    teacher: str, method: str, recipe: str, settings: Sequence[str]
) -> tuple[str, DistillationRecipe]:
    """The name and the content of the recipe that the arguments of `distill` ask for.

    Raises:
        DimoError: Unknown teacher, method or recipe; no recipe of this method for this teacher; a
            recipe of another method.
    """
    if method and method not in METHODS:
        raise unknown_name("method", method, METHODS)
    name = recipe or get_teacher(teacher).recipes.get(method or "dimo")
    if name is None:
        raise DimoError(
            f"there is no recipe of method {method or 'dimo'!r} for teacher {teacher!r} yet; "
            "name one with --recipe NAME or --recipe FILE.toml"
        )
    loaded = load_distillation(name, [f'teacher="{teacher}"', *settings])
    if method and loaded.method != method:
        raise DimoError(
            f"recipe {name!r} is one of method {loaded.method!r}, not {method!r}; "
            "leave --method out, or name another recipe"
        )
    return Path(name).stem, loaded
