"""Atomic checkpoints: folders written under a temporary name, hashed and renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dimo.errors import DimoError
from dimo.util.files import sha256_file, sync_folder, write_atomic
from dimo.util.terminal import ignore

STATE_FILE, _META = "state.pt", "checkpoint.json"
_FORMAT = 2


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], *, keep: int = 2, keep_every: int = 0
) -> None:
    """Writes `folder/step-N` whole, then removes all but the `keep` newest.

    Those at multiples of `keep_every` remain, too. The state (nested containers of tensors, numbers
    and strings) streams to disk: no copy of it is made, and tensors leave a GPU one by one.

    Raises:
        DimoError: The folder cannot be written; earlier checkpoints are untouched.
    """
    final, temporary = folder / f"step-{step:07d}", folder / f".step-{step:07d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        meta = {"format": _FORMAT, "step": step, "sha256": _stream(state, temporary / STATE_FILE)}
        write_atomic(temporary / _META, json.dumps(meta))
        shutil.rmtree(final, ignore_errors=True)  # exists only if it is damaged
        temporary.replace(final)
        sync_folder(folder)
    except OSError as error:
        raise DimoError(
            f"cannot write checkpoint {final}: {error.strerror}; earlier ones are intact; free "
            "space, then repeat the command"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(folder)[:-keep]:
        if not keep_every or _step(old) % keep_every:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(
    folder: Path, warn: Callable[[str], None] = ignore
) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest whole checkpoint, or None if there is no checkpoint.

    Damaged ones are skipped with a warning. The tensors are mapped from the file: copy what is
    kept.

    Raises:
        DimoError: None of them is whole, or the newest is of another format.
    """
    paths = _checkpoints(folder)
    for path in reversed(paths):
        if (found := read_checkpoint(path)) is not None:
            return found
        warn(f"checkpoint {path} is damaged; an older one is looked for")
    if paths:
        raise DimoError(f"no checkpoint in {folder} is whole; remove the run and start it again")
    return None


def read_checkpoint(path: Path) -> tuple[int, dict[str, Any]] | None:
    """Step and state of one checkpoint, or None if it is damaged; errors as `latest_checkpoint`."""
    try:
        meta = dict(json.loads((path / _META).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if meta.get("format") != _FORMAT:
        raise DimoError(
            f"checkpoint {path} has format {meta.get('format', 1)}, this version reads "
            f"{_FORMAT}; finish the run with the version that began it, or start again"
        )
    state = path / STATE_FILE
    if not state.is_file() or meta.get("sha256") != sha256_file(state):
        return None
    content = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    return int(meta["step"]), dict(content)


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a checkpoint, perhaps a damaged one."""
    return (path / _META).is_file()


def kept_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are in the folder."""
    return list(map(_step, _checkpoints(folder)))


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left of a checkpoint."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


class _HashedFile:
    """Writes to a file and hashes; keeps the first error, which torch's writer would lose."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None: ...


def _stream(state: dict[str, Any], path: Path) -> str:
    """Writes the state and syncs it; returns its SHA-256."""
    with path.open("wb") as file:
        hashed = _HashedFile(file)
        torch.save(state, hashed)  # type: ignore[arg-type]
        if hashed.error is not None:
            raise hashed.error
        file.flush()
        os.fsync(file.fileno())
    return hashed.digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Those of the run, oldest first: not the copies that a user keeps beside them."""
    own = (p for p in folder.glob("step-*") if re.fullmatch("step-[0-9]{7,}", p.name))
    return sorted((p for p in own if p.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
