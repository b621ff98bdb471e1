"""Checkpoints of a training: directories written beside, hashed and renamed; whole or not there."""

__all__ = ["latest_checkpoint", "save_checkpoint"]

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dimo.errors import DimoError
from dimo.files import sha256_bytes, write_atomic

_STATE, _META = "state.pt", "checkpoint.json"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> None:
    """Writes `folder/step-N` whole, then removes all but the newest `keep`.

    Args:
        folder: The run's checkpoint folder.
        step: Number of steps done.
        state: Nested containers of tensors and numbers.
        keep: How many checkpoints remain.

    Raises:
        DimoError: The folder cannot be written; earlier checkpoints are untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    final, beside = folder / f"step-{step:07d}", folder / f".step-{step:07d}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    write_atomic(beside / _STATE, payload)
    write_atomic(beside / _META, json.dumps({"step": step, "sha256": sha256_bytes(payload)}))
    try:
        shutil.rmtree(final, ignore_errors=True)
        beside.replace(final)
    except OSError as error:
        raise DimoError(f"cannot write checkpoint {final}: {error.strerror}; free space") from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest whole checkpoint, or None. A damaged one is passed over."""
    for path in reversed(_checkpoints(folder)):
        try:
            payload = (path / _STATE).read_bytes()
            meta = json.loads((path / _META).read_text())
        except (OSError, ValueError):
            continue
        if meta.get("sha256") == sha256_bytes(payload):
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            return int(meta["step"]), dict(state)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())
