"""Files written completely or not at all, locks, and content hashes."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
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


def at_home(path: str) -> Path:
    """The path with `~/` for the home folder; as it is for a user without one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (that of Path raises)


def user_home() -> Path:
    """The user's home folder, in which caches are.

    Raises:
        DimoError: There is none, as in a container whose user has no name.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise DimoError(
            "this user has no home folder for caches; set HOME to a folder that can be written, "
            "or DIMO_WEIGHTS and DIMO_CACHE"
        ) from error


@contextmanager
def replacing(
    path: str | os.PathLike[str], place: Callable[[Path, Path], object] = os.replace
) -> Iterator[Path]:
    """A temporary name beside `path`; the file written there is synced and becomes `path`.

    `place(temporary, path)` gives it that name. An exception leaves nothing behind; a killed
    process leaves its temporary file, see `remove_temporaries`.

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
        place(temporary, path)
    except OSError as error:
        raise DimoError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_temporaries(folder: Path, names: str) -> None:
    """Removes temporary files that killed processes left of files matching the glob `names`."""
    for path in folder.glob(f".{names}.*.tmp"):
        path.unlink(missing_ok=True)


def check_folder(folder: Path, what: str) -> None:
    """Raises a DimoError unless files can be written to a folder, which need not exist yet."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise DimoError(f"{what} {folder}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DimoError(f"{what} {folder}: {place} cannot be written; choose another folder")


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Locks an open file or folder until it is closed; False if another process holds the lock.

    The lock ends with the process. On a file system or system without locks nothing happens.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        pass
    return True
