"""Loading weights safely and strictly; saving them with their provenance.

The one door to safetensors and to `torch.load`. Pickles load with `weights_only=True`; every key
and shape must fit, else the error says which do not.
"""

__all__ = [
    "ASSETS",
    "load_metadata",
    "load_state_dict",
    "read_state_dict",
    "save_tensors",
    "state_sha256",
]

import hashlib
import json
import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.files import write_atomic

ASSETS = Path(__file__).parent / "assets"  # the small weights that come with the package

# Where a trainer's checkpoint keeps the network: Maskgit-pytorch and di4c, VQGAN, LlamaGen.
_CONTAINERS = ("model_state_dict", "state_dict", "model")


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Reads a `.safetensors`, or a pickle holding only tensors and plain containers, to CPU.

    Raises:
        DimoError: Missing, truncated or unreadable file, or one that holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise DimoError(f"no weights file at {path}; give the path of a checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DimoError(
            f"cannot read weights {path}: {reason}; "
            "fetch the file again, or convert it to safetensors"
        ) from error
    for key in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise DimoError(f"{path} holds no state dict; give the checkpoint of a network")
    return content


def load_state_dict(
    model: nn.Module, source: str | PathLike[str] | dict[str, Tensor], *, name: str | None = None
) -> None:
    """Loads weights in place. Nothing is loaded unless every key and shape fits.

    Raises:
        DimoError: Says how many keys are missing, unexpected or of another shape, with examples.
    """
    if not isinstance(source, dict):
        name = name or str(source)
        source = read_state_dict(source)
    own = model.state_dict()
    missing = sorted(own.keys() - source.keys())
    unexpected = sorted(source.keys() - own.keys())
    shapes = [k for k in own if k in source and own[k].shape != source[k].shape]
    wrong = (("missing", missing), ("unexpected", unexpected), ("of other shape", shapes))
    parts = [f"{len(k)} {what} ({_example(k, own, source)})" for what, k in wrong if k]
    if parts:
        raise DimoError(
            f"weights {name or 'given'} do not fit {type(model).__name__}: "
            f"keys {', '.join(parts)}; check that file and configuration belong together"
        )
    model.load_state_dict(source, strict=True)


def _example(keys: list[str], own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    text = key = keys[0]
    if key in own and key in given:
        text = f"{key}: {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
    return text + (", ..." if len(keys) > 1 else "")


def save_tensors(
    path: str | PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Writes a safetensors file atomically; `metadata` is stored as JSON under the key `dimo`."""
    header = {"dimo": json.dumps(metadata, sort_keys=True)} if metadata is not None else None
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, safetensors.torch.save(contiguous, metadata=header))


def load_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON that `save_tensors` stored; empty when the file has none."""
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("dimo")
    return {} if text is None else dict(json.loads(text))


def state_sha256(state: dict[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and values; independent of file format and key order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
