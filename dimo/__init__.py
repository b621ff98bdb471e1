"""dimo: one-step distillation of masked diffusion models, and the benchmark around it."""

__all__ = ["DimoError", "Generator", "Images", "distill", "load"]

from typing import TYPE_CHECKING, Any

from dimo.errors import DimoError

if TYPE_CHECKING:
    from dimo.api import distill
    from dimo.zoo.loading import Generator, Images, load

__version__ = "0.2.0"

_MODULES = {
    "distill": "dimo.api",
    **dict.fromkeys(("Generator", "Images", "load"), "dimo.zoo.loading"),
}


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dimo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
