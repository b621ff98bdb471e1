"""Readers of images: files in a folder, zip or tar (also a WebDataset shard), arrays in an npz."""

import hashlib
import json
import os
import posixpath
import tarfile
import threading
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from bench.images.codec import IMAGE_SUFFIXES, ImageInfo, decode_image, inspect_image
from bench.images.labels import parse_label, read_manifest
from bench.images.source import READ_ERRORS, Labels, Manifest, counted, reason, shown, unreadable
from dimo.errors import DimoError

_MANIFESTS = ("labels.csv", "labels.json")
_SIDECARS = (".cls", ".json")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_IMAGE_KEYS, _LABEL_KEYS = ("arr_0", "images"), ("arr_1", "labels")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class _FileSource:
    """A `Source` of files.

    Args:
        path: As the user gave it.
        images: Names of the image files.
        others: Names of all other files.
        read: A name -> its bytes.
        base: Folder of the images inside an archive, which these names are without.
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
        present = [name for name in _MANIFESTS if name in self._others]
        if len(present) > 1:
            raise DimoError(f"{self.path} holds {' and '.join(present)}; keep one of them")
        if present:
            name = present[0]
            return Manifest(f"{self.path}/{name}", self._read_other(name), self._base)
        labels = next(filter(None, map(self._sidecar_labels, _SIDECARS)), None)
        if labels is not None:
            return np.array(labels, dtype=np.int64)
        if self.path.is_file():
            for path in (self.path.parent / name for name in _MANIFESTS):
                if path.is_file():
                    return replace(read_manifest(path), base=self._base)
        return None

    def raw(self, rows: range) -> Iterator[int]:
        return iter(rows)

    def inspect(self, item: int, *, lossy: bool) -> ImageInfo:
        try:
            return inspect_image(self._read(self.names[item]), lossy=lossy)
        except READ_ERRORS as error:
            return ImageInfo("", 0, 0, "", "", f"cannot be read: {reason(error)}")

    def decode(self, item: int, *, lossy: bool) -> npt.NDArray[np.uint8]:
        name = self.names[item]
        try:
            return decode_image(self._read(name), lossy=lossy)
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
            words = text.decode("utf-8-sig")
            table = json.loads(words) if name.endswith(".json") else words
        except ValueError as error:
            raise DimoError(f"cannot read {name!r} in {self.path}: {error}; correct it") from error
        return table.get("label", table.get("cls")) if isinstance(table, dict) else table

    def _read_other(self, name: str) -> bytes:
        try:
            return self._read(name)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error


def open_folder(path: Path, *, recursive: bool) -> _FileSource:
    """The images in a folder, with `recursive` also in the folders below it.

    Raises: DimoError: It cannot be read or holds no image.
    """

    try:
        files, left_out = _listed(path, recursive=recursive)
    except OSError as error:
        raise DimoError(f"cannot read folder {path}: {error.strerror}; check the path") from error
    images = sorted(filter(_is_image, files))
    if not images:
        raise _no_images(path, files, left_out)
    others = [*(name for name in files if not _is_image(name)), *left_out]
    return _FileSource(path, images, others, lambda name: (path / name).read_bytes())


def _listed(path: Path, *, recursive: bool) -> tuple[list[str], list[str]]:
    """The files of a folder, and what is left out: folders, `sub/`, and pipes and devices.

    With `recursive` each folder below is read once, also where a link leads out of `path`.
    """
    files, left_out, top = list[str](), list[str](), os.path.realpath(path)
    seen, waiting = {top}, [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(path / below) as entries:
            for entry in entries:
                name = below + entry.name
                if not entry.is_dir():
                    is_file = entry.is_file() or not Path(entry.path).exists()  # a broken link
                    (files if is_file else left_out).append(name)
                    continue
                real = os.path.realpath(entry.path)
                known = entry.is_symlink() and f"{real}/".startswith(f"{top}/")
                if recursive and not known and real not in seen:
                    seen.add(real)
                    waiting.append(f"{name}/")
                else:
                    left_out.append(f"{name}/")
    return files, left_out


def open_zip(path: Path, *, recursive: bool) -> _FileSource:
    """The images of a zip.

    Raises: DimoError: It cannot be read, is encrypted, holds a name twice, no image, or images in
        several folders without `recursive`.
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

    Raises: DimoError: As `open_zip`; it is compressed; or a label is missing or no integer.
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
    members.sort(key=lambda name: name.startswith(base))  # those outside are behind those inside
    places = {name.removeprefix(base): name for name in members}
    others = [name for name, place in places.items() if not _is_image(place)]
    names, sidecars = [name.removeprefix(base) for name in images], path.suffix.lower() == ".tar"
    return _FileSource(path, names, others, lambda name: read(places[name]), base, sidecars)


def _is_image(name: str) -> bool:
    """By suffix; neither hidden files nor the copies that macOS adds to archives."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(IMAGE_SUFFIXES)


def _normal(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _no_images(path: Path, files: list[str], left_out: list[str] | None = None) -> DimoError:
    held = counted(len(files), "other file") + (f" ({shown(sorted(files))})" if files else "")
    if folders := [name for name in left_out or () if name.endswith("/")]:
        return DimoError(
            f"{path} holds no images, but the folders {shown(sorted(folders))} and {held}; "
            "look into the folders with --recursive"
        )
    return DimoError(
        f"{path} holds no images, but {held}; allowed: {' '.join(IMAGE_SUFFIXES)}; check the path"
    )


class _ArraySource:
    """A `Source` of uint8 [N, H, W, C]: one pass over a zip member, row by row.

    Rows in ascending order are read once; a step back starts again from the first.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, key: str) -> None:
        self.path, self._archive, self._member = path, archive, f"{key}.npy"
        weakref.finalize(self, archive.close)
        self._stream = archive.open(self._member)
        shape, dtype, fortran_order = _read_header(self._stream, f"{key} of {path}")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            swapped = len(shape) == 4 and shape[1] in (1, 3) and dtype == np.uint8
            hint = "transpose it to (0, 2, 3, 1)" if swapped else "convert it"
            raise DimoError(
                f"{key} of {path} is {dtype} {list(shape)}; allowed: uint8 [N, H, W, 3]; {hint}"
            )
        self._start, self._shape = self._stream.tell(), shape[1:]
        self._row_bytes = shape[1] * shape[2] * shape[3]
        size = archive.getinfo(self._member).file_size
        if size != self._start + shape[0] * self._row_bytes:
            raise DimoError(
                f"{key} of {path} is {list(shape)} by its header, but has {size - self._start:,} "
                f"bytes, not {shape[0] * self._row_bytes:,}; make the file again"
            )
        self._whole: bytes | None = None
        if fortran_order:  # its images do not lie one after another: all are read at once
            data = np.frombuffer(self._stream.read(), np.uint8)
            self._whole = data.reshape(shape[::-1]).T.tobytes()
        self.names = [f"{path}[{row}]" for row in range(shape[0])]
        self.ignored: list[str] = []
        self._next, self._lock = 0, threading.Lock()
        self._bad_from, self._problem = shape[0], ""

    def labels(self) -> Labels | None:
        keys = self._archive.namelist()
        key = next((key for key in _LABEL_KEYS if f"{key}.npy" in keys), None)
        if key is None:
            return None
        try:
            with self._archive.open(f"{key}.npy") as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error
        return check_labels(labels, len(self.names), f"{key} of {self.path}")

    def raw(self, rows: range) -> Iterator[tuple[int, npt.NDArray[np.uint8] | None]]:
        for row in rows:
            with self._lock:
                item = row, self._read(row)
            yield item

    def inspect(self, item: tuple[int, npt.NDArray[np.uint8] | None], *, lossy: bool) -> ImageInfo:
        height, width, channels = self._shape
        mode, pixels = "RGB" if channels == 3 else "L", item[1]
        if pixels is None:
            return ImageInfo("", height, width, mode, "array", self._problem)
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(pixels.data)
        return ImageInfo(digest.hexdigest(), height, width, mode, "array", None)

    def decode(
        self, item: tuple[int, npt.NDArray[np.uint8] | None], *, lossy: bool
    ) -> npt.NDArray[np.uint8]:
        row, pixels = item
        if pixels is None:
            raise DimoError(f"{self.names[row]!r}: {self._problem}; make the file again")
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))

    def _read(self, row: int) -> npt.NDArray[np.uint8] | None:
        """One image, or None from the row on where the file is damaged."""
        if row >= self._bad_from:
            return None
        if self._whole is not None:
            start = row * self._row_bytes
            return np.frombuffer(self._whole, np.uint8, self._row_bytes, start).reshape(self._shape)
        try:
            if row < self._next:
                self._stream = self._archive.open(self._member)
            self._stream.seek(self._start + row * self._row_bytes)
            data = self._stream.read(self._row_bytes)
            if len(data) < self._row_bytes:
                raise EOFError("the array is cut short")
            if row == len(self.names) - 1:
                self._stream.read(1)  # the end is where zipfile compares the checksum of it all
        except READ_ERRORS as error:
            self._bad_from, self._problem = row, f"damaged: {reason(error)}"
            return None
        self._next = row + 1
        return np.frombuffer(data, np.uint8).reshape(self._shape)


def open_npz(path: Path) -> _ArraySource:
    """The images of an npz: uint8 [N, H, W, 3] under `arr_0` or `images`; [N, H, W, 1] is grey.

    Labels are int [N] under `arr_1` or `labels`. Only one image at a time is in memory, unless the
    array is in Fortran order.

    Raises: DimoError: It cannot be read, has no such arrays, or their shapes or sizes do not fit.
    """
    try:
        archive = zipfile.ZipFile(path)
        keys = {name.removesuffix(".npy") for name in archive.namelist()}
        key = next((key for key in _IMAGE_KEYS if key in keys), None)
        if key is None:
            archive.close()
            raise DimoError(
                f"{path} holds no images but {', '.join(sorted(keys)) or 'nothing'}; allowed: "
                "uint8 [N, H, W, 3] under arr_0 or images; give an npz of images"
            )
        return _ArraySource(path, archive, key)
    except DimoError:
        raise
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def npz_keys(path: Path) -> set[str]:
    """Names of the arrays in an npz; empty for any other kind of file.

    Raises: DimoError: It is called .npz and cannot be read.
    """
    if path.suffix.lower() != ".npz" or not path.is_file():
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DimoError(f"cannot read {path}: {error}; fetch or make the file again") from error


def _read_header(stream: IO[bytes], what: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise DimoError(f"{what} is of npy version {version}; allowed: 1.0, 2.0; save it again")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    return shape, dtype, fortran_order


def check_labels(labels: npt.NDArray[Any], count: int, what: str) -> Labels:
    """`labels` as int64 if they are integers `[count]`; else a DimoError that names `what`."""
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DimoError(
            f"{what} is {labels.dtype} {list(labels.shape)}; allowed: integers [{count}]; "
            "correct or remove it"
        )
    return labels.astype(np.int64)
