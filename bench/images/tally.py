"""What a record says about the scored images: their hashes, duplicates, notes."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bench.images.checks import content_sha256
from bench.images.codec import LOSSY_CODECS, ImageInfo, read_image
from bench.images.labels import labels_sha256
from dimo.util.terminal import Progress, quiet


@dataclass(frozen=True)
class Content:
    """The images of one row.

    Attributes:
        images_sha256: Over the hashes of all images and their labels, in order.
        labels_sha256: Over the labels in order; empty where there are none.
        copies: Number of images that equal an earlier one.
        paths: Paths of the set; empty for generated images.
        notes: One-line findings of the checks.
        nonconforming: Why the set is off-protocol; empty if it is not.
    """

    images_sha256: str
    labels_sha256: str
    copies: int = 0
    paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    nonconforming: tuple[str, ...] = ()


class Tally:
    """Hashes images on their way to a network. Generated ones get the hash of an npz of them."""

    def __init__(self) -> None:
        self._infos: list[ImageInfo] = []
        self._labels: list[npt.NDArray[np.int64]] = []

    def __len__(self) -> int:
        return len(self._infos)

    def add(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Counts a batch, uint8 [B, 3, H, W] with labels int64 [B], and returns it."""
        height, width = images.shape[2:]
        for pixels in images.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
            self._infos.append(ImageInfo(digest, height, width, "RGB", "array", None))
        self._labels.append(labels.cpu().numpy())
        return images, labels

    def read(
        self,
        files: Sequence[Path],
        labels: Iterable[int],
        progress: Progress = quiet,
        total: int | None = None,
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Reads and counts one image after the other: uint8 [H, W, 3].

        Args:
            files: In order.
            labels: One per file.
            progress: Called before each image.
            total: Number of images of the whole set; default: those of `files`.

        Raises:
            DimoError: A file cannot be read.
        """
        for file, label in zip(files, labels, strict=True):
            progress("images", len(self), len(files) if total is None else total, "images")
            info, pixels = read_image(file)
            self._infos.append(info)
            self._labels.append(np.array([label], dtype=np.int64))
            yield pixels

    def content(self, path: Path | None = None, nonconforming: Sequence[str] = ()) -> Content:
        """The content so far.

        Args:
            path: Folder that the images were read from; None: they were generated.
            nonconforming: Why the set is off-protocol.
        """
        labels = np.concatenate(self._labels)
        copies = len(self._infos) - len({info.sha256 for info in self._infos})
        notes = [] if path is None else list(self._notes(copies))
        return Content(
            content_sha256(self._infos, labels),
            labels_sha256(labels),
            copies,
            () if path is None else (str(path),),
            tuple(notes),
            tuple(nonconforming),
        )

    def _notes(self, copies: int) -> Iterator[str]:
        if copies:
            yield f"{copies} images are copies of others"
        lossy = Counter(info.codec for info in self._infos if info.codec in LOSSY_CODECS)
        for codec, count in lossy.items():
            yield f"{count} images are stored with a loss ({codec})"
