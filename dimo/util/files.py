"""Writing files whole or not at all, and naming them by content."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dimo.errors import DimoError


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`; the file written there is synced and takes its place.

    Whatever is raised meanwhile, nothing is left behind; only a killed process leaves its temporary
    file, see `remove_temporaries`.

    Raises:
        DimoError: The folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise DimoError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` to a temporary name beside `path`, syncs it and renames it.

    Raises:
        DimoError: The folder cannot be written; nothing is left behind.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_temporaries(folder: Path, names: str) -> None:
    """Removes what killed processes left of files in `folder` whose names match the glob `names`.

    Raises:
        OSError: One cannot be removed.
    """
    for path in folder.glob(f".{names}.*.tmp"):
        path.unlink(missing_ok=True)
