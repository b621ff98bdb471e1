"""The interface of the readers, one per path, and helpers for their errors."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from bench.images.codec import ImageInfo
from dimo.errors import DimoError

Labels: TypeAlias = npt.NDArray[np.int64]
# what reading a damaged archive raises
READ_ERRORS = (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Manifest:
    """The bytes of a file of labels; `origin` is its path, the same only for the same file.

    Names in it may begin with `base`, the folder of the images in an archive.
    """

    origin: str
    data: bytes
    base: str = ""


class Source(Protocol):
    """The images of one path. `raw` runs in one thread, `inspect` and `decode` in many.

    Attributes:
        path: As the user gave it.
        names: Names of the images, in order.
        ignored: Names of all other files.
    """

    path: Path
    names: list[str]
    ignored: list[str]

    def labels(self) -> Labels | Manifest | None:
        """Labels stored with the images: int64 [N], or a manifest in the set or beside it."""

    def raw(self, rows: range) -> Iterator[Any]:
        """Each image's `item`: raw bytes or pixels, before the work that threads share."""

    def inspect(self, item: Any, *, lossy: bool) -> ImageInfo:
        """Checks one image; never raises for a bad one. `lossy` as in `decode_image`."""

    def decode(self, item: Any, *, lossy: bool) -> npt.NDArray[np.uint8]:
        """One image, uint8 [H, W, 3]; a DimoError names it. `lossy` as in `decode_image`."""


def reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return {"File is not a zip file": "it is no zip file, or cut short"}.get(text, text)


def unreadable(path: Path, error: Exception) -> DimoError:
    return DimoError(f"cannot read {path}: {reason(error)}; copy or make it again")


def counted(count: int, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def shown(names: Iterable[str], limit: int = 3) -> str:
    """Quoted names, at most `limit` of them, and how many more there are."""
    names = list(names)
    more = [f"and {len(names) - limit:,} more"] if len(names) > limit else []
    return ", ".join([repr(name) for name in names[:limit]] + more)
