"""TorchScript archives: networks that bring their own code with their weights."""

__all__ = ["is_torchscript", "load_torchscript"]

import warnings
import zipfile
from pathlib import Path

import torch

from dimo.errors import DimoError


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive; a plain checkpoint has no `constants.pkl`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """Loads an archive to the CPU, in evaluation mode.

    Raises:
        DimoError: The file is damaged or no TorchScript archive.
    """
    try:
        with warnings.catch_warnings():
            # PyTorch advises its users against writing such files; these exist.
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            module: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location="cpu"
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DimoError(
            f"cannot read the TorchScript archive {path}: {reason}; fetch the file again"
        ) from error
    return module.eval()
