"""The distillation methods: a folder for each, and a row of `METHODS`.

A method is a `dimo.methods.base.Distillation`: its recipe, its training task and what its students
need to be sampled. Adding one takes a folder here, a row below and a recipe in `dimo/recipes`.
This module does not import torch, so a list of the methods costs nothing.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dimo.methods.base import Distillation


@dataclass(frozen=True)
class Method:
    """A distillation method.

    Attributes:
        source: The implementation, or its "module:class", imported on first use.
        needs_data: Trains on encoded images; such a method distils class-conditional teachers only.
        is_one_step: Its students start from x_init and are sampled by `one_step` and `few_step`.
            Others start from masked tokens.
    """

    title: str  # in tables
    source: "str | type[Distillation]"
    needs_data: bool = True
    is_one_step: bool = False
    sampler: str = "confidence"  # of students that are not one-step
    default_steps: int = 4  # in the pictures and scores of a run

    @property
    def distillation(self) -> "Distillation":
        """The implementation."""
        if not isinstance(self.source, str):
            return self.source()
        module, _, name = self.source.partition(":")
        implementation: Distillation = getattr(import_module(module), name)()
        return implementation


METHODS: dict[str, Method] = {
    "dimo": Method(
        "Di[M]O",
        "dimo.methods.dimo.method:DiMO",
        needs_data=False,
        is_one_step=True,
        default_steps=1,
    ),
    "dimo-fd": Method(
        "Di[M]O-FD",
        "dimo.methods.frechet.method:DiMOFD",
        needs_data=False,
        is_one_step=True,
        default_steps=1,
    ),
    "di4c": Method("di4c", "dimo.methods.di4c.method:Di4C"),
    "di4c-d": Method("di4c-d", "dimo.methods.di4c.method:Di4C"),
    "sdtt": Method("SDTT", "dimo.methods.sdtt.method:SDTT"),
}
