"""Images that are files: of a folder, a zip or a tar (also a WebDataset shard)."""

import json
import os
import posixpath
import tarfile
import threading
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.images.codec import IMAGE_SUFFIXES, ImageInfo, decode_image, inspect_image
from bench.images.labels import parse_label, read_manifest
from bench.images.source import READ_ERRORS, Labels, Manifest, counted, reason, shown, unreadable
from dimo.errors import DimoError

_MANIFESTS = ("labels.csv", "labels.json")
_SIDECARS = (".cls", ".json")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class _FileSource:
    """A `Source` of files.

    Args:
        path: As the user gave it.
        images: Names of the image files.
        others: Names of all other files.
        read: A name -> its bytes.
        base: Folder that all these names are below, inside an archive.
        sidecars: Whether labels may be in WebDataset files beside the images.
    """

    def __init__(
        self,
        path: Path,
        images: Iterable[str],
        others: Iterable[str],
        read: Callable[[str], bytes],
        base: str = "",
        sidecars: bool = False,
    ) -> None:
        self.path, self.names = path, list(images)
        self._read, self._base = read, base
        self._others = frozenset(others)
        stems = {posixpath.splitext(name)[0] for name in self.names} if sidecars else set()
        self._sidecars = {
            name
            for name in self._others
            if name.endswith(_SIDECARS) and posixpath.splitext(name)[0] in stems
        }
        self.ignored = sorted(self._others - self._sidecars - set(_MANIFESTS))

    def labels(self) -> Labels | Manifest | None:
        found = [name for name in _MANIFESTS if name in self._others]
        if len(found) > 1:
            raise DimoError(f"{self.path} holds {' and '.join(found)}; keep one of them")
        if found:
            return Manifest(f"{self.path}/{found[0]}", self._read_other(found[0]))
        labels = next(filter(None, map(self._sidecar_labels, _SIDECARS)), None)
        if labels is not None:
            return np.array(labels, dtype=np.int64)
        if self.path.is_file():
            for path in (self.path.parent / name for name in _MANIFESTS):
                if path.is_file():
                    return read_manifest(path)
        return None

    def raw(self, rows: range) -> Iterator[int]:
        return iter(rows)

    def inspect(self, item: int) -> ImageInfo:
        try:
            return inspect_image(self._read(self._base + self.names[item]))
        except READ_ERRORS as error:
            return ImageInfo("", 0, 0, "", "", f"cannot be read: {reason(error)}")

    def decode(self, item: int, *, lossy: bool) -> npt.NDArray[np.uint8]:
        name = self.names[item]
        try:
            return decode_image(self._read(self._base + name), lossy=lossy)
        except READ_ERRORS as error:  # DimoError is a ValueError
            raise DimoError(f"{name!r} in {self.path}: {reason(error)}; replace it") from error

    def _sidecar_labels(self, suffix: str) -> list[int]:
        """WebDataset: the label of key.png is in key.cls, or in key.json as "label" or "cls"."""
        names = [posixpath.splitext(name)[0] + suffix for name in self.names]
        values = [self._sidecar_value(name) if name in self._sidecars else None for name in names]
        bare = [name for name, value in zip(names, values, strict=True) if value is None]
        if bare and len(bare) < len(names):
            raise DimoError(
                f"{self.path} has labels in {suffix} files, but none in {len(bare):,} of "
                f"{len(names):,} ({shown(bare)}); add them, or give all labels with --labels"
            )
        return [
            parse_label(value, f"{name!r} in {self.path}")
            for name, value in zip(names, values, strict=True)
            if value is not None
        ]

    def _sidecar_value(self, name: str) -> object:
        text = self._read_other(name)
        try:
            table = json.loads(text) if name.endswith(".json") else text.decode()
        except ValueError as error:
            raise DimoError(f"cannot read {name!r} in {self.path}: {error}; correct it") from error
        return table.get("label", table.get("cls")) if isinstance(table, dict) else table

    def _read_other(self, name: str) -> bytes:
        try:
            return self._read(self._base + name)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error


def open_folder(path: Path, *, recursive: bool) -> _FileSource:
    """The images in a folder, with `recursive` also in the folders below it.

    Raises:
        DimoError: It cannot be read or holds no image.
    """

    def fail(error: OSError) -> None:
        raise error

    try:
        if recursive:
            tree = os.walk(path, onerror=fail)
            found = [Path(top, name) for top, _, files in tree for name in files]
            files, folders = [file.relative_to(path).as_posix() for file in found], list[str]()
        else:
            with os.scandir(path) as entries:
                kinds = {entry.name: entry.is_dir() for entry in entries}
            files = [name for name, is_folder in kinds.items() if not is_folder]
            folders = [f"{name}/" for name, is_folder in kinds.items() if is_folder]
    except OSError as error:
        raise DimoError(f"cannot read folder {path}: {error.strerror}; check the path") from error
    images = sorted(filter(_is_image, files))
    if not images:
        raise _no_images(path, files, folders)
    others = [*(name for name in files if not _is_image(name)), *folders]
    return _FileSource(path, images, others, lambda name: (path / name).read_bytes())


def open_zip(path: Path, *, recursive: bool) -> _FileSource:
    """The images of a zip.

    Raises:
        DimoError: It cannot be read, is encrypted, holds a name twice or no image, or holds
            images in several folders without `recursive`.
    """
    try:
        archive = zipfile.ZipFile(path)
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    infos = [info for info in archive.infolist() if not info.is_dir()]
    members = {_normal(info.filename): info for info in infos}
    lock = threading.Lock()  # ZipFile counts its readers without one

    def read(name: str) -> bytes:
        with lock:
            return archive.read(members[name])

    weakref.finalize(read, archive.close)
    if any(info.flag_bits & 1 for info in infos):
        raise DimoError(f"{path} is encrypted; allowed: a zip without a password; unpack it")
    return _open_archive(path, [_normal(info.filename) for info in infos], read, recursive)


def open_tar(path: Path, *, recursive: bool) -> _FileSource:
    """The images of an uncompressed tar; a WebDataset shard brings labels in .cls or .json files.

    Raises:
        DimoError: As `open_zip`; it is compressed; or a label is missing or no integer.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
    lock = threading.Lock()
    names: list[str] = []
    places: dict[str, tuple[int, int]] = {}  # name -> first byte, size

    def read(name: str) -> bytes:
        start, size = places[name]
        with lock:
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise EOFError("the tar is cut short")
        return data

    weakref.finalize(read, file.close)
    if file.read(6).startswith(_COMPRESSED):
        raise compressed_tar(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = _normal(member.name)
                if member.isreg() and not member.issparse():
                    places[name] = member.offset_data, member.size
                elif _is_image(name):
                    raise EOFError(f"{name!r} is a link, not a file")
                if not member.isdir():
                    names.append(name)
            file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile does not look
            raise EOFError("it is cut short or damaged")
    except (*READ_ERRORS, tarfile.TarError) as error:
        raise unreadable(path, error) from error
    return _open_archive(path, names, read, recursive)


def compressed_tar(path: Path) -> DimoError:
    """The error for a tar that is compressed."""
    return DimoError(
        f"{path} is a compressed tar; allowed: .tar, as images are compressed already; "
        "decompress it, e.g. with gunzip, unxz or unzstd"
    )


def _open_archive(
    path: Path, members: list[str], read: Callable[[str], bytes], recursive: bool
) -> _FileSource:
    images = sorted(filter(_is_image, members))
    if not images:
        raise _no_images(path, members)
    twice = [name for name, count in Counter(members).items() if count > 1]
    if twice:
        raise DimoError(f"{path} holds {shown(twice)} more than once; pack it again")
    folders = sorted({posixpath.dirname(name) for name in images})
    if len(folders) > 1 and not recursive:
        raise DimoError(
            f"{path} holds images in {len(folders)} folders ({shown(folders)}); allowed: one; "
            "take all of them with --recursive"
        )
    common = posixpath.commonpath(folders) if all(folders) else ""
    base = f"{common}/" if common else ""
    inside = {name: name.removeprefix(base) for name in members}
    others = [inside[name] for name in members if not _is_image(name)]
    sidecars = path.suffix.lower() == ".tar"
    return _FileSource(path, [inside[name] for name in images], others, read, base, sidecars)


def _is_image(name: str) -> bool:
    """By suffix; nothing hidden, and not the copies that macOS adds to archives."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(IMAGE_SUFFIXES)


def _normal(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _no_images(path: Path, files: list[str], folders: list[str] | None = None) -> DimoError:
    held = counted(len(files), "other file") + (f" ({shown(sorted(files))})" if files else "")
    if folders:
        return DimoError(
            f"{path} holds no images, but the folders {shown(sorted(folders))} and {held}; "
            "look into the folders with --recursive"
        )
    return DimoError(
        f"{path} holds no images, but {held}; allowed: {' '.join(IMAGE_SUFFIXES)}; check the path"
    )
