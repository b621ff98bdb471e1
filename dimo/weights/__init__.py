"""Files of weights: which there are, safe loading, download, conversion, exchange."""

__all__ = ["ASSETS", "read_state_dict", "save_tensors"]

from typing import TYPE_CHECKING, Any

from dimo.weights.catalog import ASSETS

if TYPE_CHECKING:
    from dimo.weights.files import read_state_dict, save_tensors


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first used."""
    if name not in ("read_state_dict", "save_tensors"):
        raise AttributeError(f"module 'dimo.weights' has no attribute {name!r}")
    from dimo.weights import files

    return getattr(files, name)
