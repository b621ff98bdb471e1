"""Arrays of an npz: images (as ADM's evaluator takes them), streamed, and features."""

import hashlib
import threading
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from bench.features import Features
from bench.features.stats import check_features
from bench.images.codec import ImageInfo
from bench.images.source import READ_ERRORS, Labels, reason, unreadable
from dimo.errors import DimoError

_IMAGE_KEYS, _LABEL_KEYS = ("arr_0", "images"), ("arr_1", "labels")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class _ArraySource:
    """A `Source` of uint8 [N, H, W, C]: one pass over a zip member, row by row.

    Rows asked for in ascending order are read once; a step back starts again from the first.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, key: str) -> None:
        self.path, self._archive, self._member = path, archive, f"{key}.npy"
        weakref.finalize(self, archive.close)
        self._stream = archive.open(self._member)
        shape, dtype = _read_header(self._stream, f"{key} of {path}")
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
        return _check_labels(labels, len(self.names), f"{key} of {self.path}")

    def raw(self, rows: range) -> Iterator[tuple[int, npt.NDArray[np.uint8] | None]]:
        for row in rows:
            with self._lock:
                item = row, self._read(row)
            yield item

    def inspect(self, item: tuple[int, npt.NDArray[np.uint8] | None]) -> ImageInfo:
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
        """One image, or None from the place on where the file is damaged."""
        if row >= self._bad_from:
            return None
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

    Labels are int [N] under `arr_1` or `labels`. Nothing but one image is ever in memory.

    Raises:
        DimoError: It cannot be read, has no such arrays, or their shapes or sizes do not fit.
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

    Raises:
        DimoError: It is called .npz and cannot be read.
    """
    if path.suffix != ".npz":
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DimoError(f"cannot read {path}: {error}; fetch or make the file again") from error


def read_features(path: Path) -> Features:
    """Features made elsewhere: an npz with `features` [N, D] and, where there are, `logits`
    [N, C], `spatial` [N, S] and `labels` int [N].

    Returns:
        Real numbers as float32, labels as int64.

    Raises:
        DimoError: It cannot be read, has no `features`, or an array has another form or holds
            numbers that are not finite.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            keys = sorted(file.files)
            for key in ("features", "logits", "spatial", "labels"):
                if key in keys:
                    arrays[key] = file[key]
    except (*READ_ERRORS, AttributeError, TypeError) as error:
        raise DimoError(
            f"cannot read features from {path}: {reason(error)}; give an npz with the key features"
        ) from error
    if "features" not in arrays:
        raise DimoError(
            f"{path} lacks features (it has: {', '.join(keys) or 'nothing'}); allowed: an npz with "
            "features [N, D] and, where there are, logits, spatial and labels; add them"
        )
    count = len(arrays["features"]) if arrays["features"].ndim else 0
    labels = arrays.pop("labels", None)
    found: dict[str, npt.NDArray[np.float32]] = {}
    for key, array in arrays.items():
        with np.errstate(over="ignore"):  # too large for float32 is found to be infinite
            array = check_features(array, name=f"{key} of {path}").astype(np.float32, copy=False)
        found[key] = check_features(array, name=f"{key} of {path} in float32")
        if len(array) != count:
            raise DimoError(
                f"{key} of {path} have {len(array):,} rows, its features {count:,}; allowed: one "
                "row an image in each; make the file again"
            )
    return Features(
        features=found["features"],
        logits=found.get("logits"),
        spatial=found.get("spatial"),
        labels=None if labels is None else _check_labels(labels, count, f"labels of {path}"),
    )


def _read_header(stream: IO[bytes], what: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise DimoError(f"{what} is of npy version {version}; allowed: 1.0, 2.0; save it again")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    if fortran_order:
        raise DimoError(f"{what} is in Fortran order; allowed: C order; save it again")
    return shape, dtype


def _check_labels(labels: npt.NDArray[Any], count: int, what: str) -> Labels:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DimoError(
            f"{what} is {labels.dtype} {list(labels.shape)}; allowed: integers [{count}]; "
            "correct or remove it"
        )
    return labels.astype(np.int64)
