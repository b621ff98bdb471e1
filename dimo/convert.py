"""Official pickles -> safetensors that say where they come from."""

__all__ = ["convert"]

from pathlib import Path
from typing import Any

import torch

from dimo.errors import DimoError
from dimo.files import sha256_file
from dimo.models.vqgan import TRAINING_KEYS, VQGAN, read_config
from dimo.weights import (
    KINDS,
    VQGAN_KIND,
    check_state,
    load_metadata,
    looks_like,
    read_state_dict,
    save_tensors,
    state_sha256,
)


def convert(
    path: Path, out: Path, *, config: Path | None = None, force: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Writes the network of a checkpoint, without what only its training needs.

    The tensors keep their official names and bits; they are mapped, so that memory holds one at a
    time where the checkpoint is a zip file, as PyTorch has written them since 1.6.

    Args:
        path: An official checkpoint.
        out: Folder of the result, which has the checkpoint's name and ends in `.safetensors`.
        config: The `model.yaml` of a VQGAN; None: the one beside the checkpoint.
        force: Replace a result that exists.

    Returns:
        The result and the metadata in it: source_file, source_sha256, kind, state_sha256,
        dropped (number of tensors left out) and, for a VQGAN, config.

    Raises:
        DimoError: A file that is unreadable, converted already or of no known network; a result
            that exists or cannot be written; a configuration that is missing or does not fit.
    """
    if path.suffix == ".safetensors" and path.is_file():
        origin = load_metadata(path).get("source_file")
        raise DimoError(
            f"{path} is safetensors already{f', converted from {origin}' if origin else ''}; "
            "use it as it is"
        )
    result = out / Path(path.name).with_suffix(".safetensors")
    if result.exists() and not force:
        raise DimoError(f"{result} exists; replace it with --force or choose another folder")
    state = read_state_dict(path)
    kind = looks_like(state)
    if kind is None:
        raise DimoError(
            f"{path} holds no network that dimo knows ({len(state)} tensors, e.g. "
            f"{next(iter(state), 'none')}); allowed: {', '.join(KINDS)}"
        )
    metadata: dict[str, Any] = {"source_file": path.name, "kind": kind}
    kept = state
    if kind == VQGAN_KIND:
        metadata["config"] = read_config(path, config)
        with torch.device("meta"):
            network = VQGAN(**metadata["config"])
        kept = check_state(network, state, name=str(path), ignore=TRAINING_KEYS)
    elif config is not None:
        raise DimoError(f"--config is for a {VQGAN_KIND}, but {path} holds a {kind}; leave it out")
    metadata["dropped"] = len(state) - len(kept)
    metadata["source_sha256"] = sha256_file(path)
    metadata["state_sha256"] = state_sha256(kept)
    save_tensors(result, kept, metadata)
    return result, metadata
