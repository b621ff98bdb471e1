"""Writing files whole or not at all, and naming them by content."""

__all__ = ["sha256_bytes", "sha256_file", "write_atomic"]

import hashlib
import os
import tempfile
from pathlib import Path

from dimo.errors import DimoError


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` to a temporary name beside `path`, syncs it and renames it.

    Raises:
        DimoError: The folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise DimoError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error
