"""dimo: one-step distillation of masked diffusion models, and the benchmark around it."""

__all__ = ["DimoError", "Generator", "Images", "distill", "load"]

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimo.errors import DimoError

if TYPE_CHECKING:
    from dimo.engine.loop import OnStep
    from dimo.zoo.generator import Generator, Images
    from dimo.zoo.loading import load

__version__ = "0.2.0"


def distill(
    teacher: str = "",
    *,
    out: str | Path | None = None,
    recipe: str = "",
    method: str = "",
    settings: Sequence[str] = (),
    device: str = "auto",
    weights: str | Path | None = None,
    data: str | Path | None = None,
    on_step: "OnStep | None" = None,
) -> "Generator":
    """Distils a teacher and returns the student; an unfinished run in `out` is resumed.

    Args:
        teacher: A key of `dimo.zoo.teachers.TEACHERS`; default: the recipe's, or "digits".
        out: Run folder; default: runs/RECIPE.
        recipe: Name or path of a recipe; default: the teacher's for `method`.
        method: A key of `dimo.methods.METHODS`; default: the recipe's, or "dimo".
        settings: "key=value" strings that replace keys of the recipe.
        device: "auto" takes a GPU if there is one.
        weights: Folder of the teacher's weight files; default: the bundled or the fetched ones.
        data: Token cache, for a method that needs data; default: the bundled data.
        on_step: Called with the step and, now and then, its scalars.

    Raises:
        DimoError: As `dimo.engine.runs.find_recipe` and `dimo.engine.runs.distill`.
    """
    from dimo.engine.runs import distill_teacher
    from dimo.zoo.loading import load

    folder = None if weights is None else Path(weights)
    run = distill_teacher(
        teacher,
        method=method,
        recipe=recipe,
        settings=settings,
        out=out,
        device=device,
        weights=folder,
        data=None if data is None else Path(data),
        on_step=on_step,
    )
    return load(run, device=device, weights=folder)


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first used."""
    if name not in ("Generator", "Images", "load"):
        raise AttributeError(f"module 'dimo' has no attribute {name!r}")
    from dimo.zoo import generator, loading

    return getattr(loading if name == "load" else generator, name)
