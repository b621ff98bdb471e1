"""A set of images from one or more paths, read in ranges."""

import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.images.checks import sizes_text
from bench.images.codec import ImageInfo, centre_crop
from bench.images.labels import find_labels
from bench.images.readers import compressed_tar, open_folder, open_npz, open_tar, open_zip
from bench.images.source import Labels, Source, shown
from dimo.errors import DimoError

T = TypeVar("T")
R = TypeVar("R")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAX_THREADS = 8


class ImageSet:
    """Images by number, however they are stored. Made by `open_images`.

    Attributes:
        names: Each image's path below its folder, or `FILE.npz[3]` in an npz.
        labels: int64 [N]; None if unknown.
        labels_given: Whether someone gave them; see `find_labels`.
        ignored: Names of files and folders that are no part of the set.
    """

    def __init__(
        self, sources: Sequence[Source], labels: Labels | None, labels_given: bool
    ) -> None:
        self.paths = [source.path for source in sources]
        self.names = [name for source in sources for name in source.names]
        self.ignored = [name for source in sources for name in source.ignored]
        self.labels, self.labels_given = labels, labels_given
        self._sources = sources
        self._ends = list(accumulate(len(source.names) for source in sources))

    def __len__(self) -> int:
        return len(self.names)

    def scan(
        self, rows: range, on_done: Callable[[int], None], *, lossy: bool = False
    ) -> list[ImageInfo]:
        """Reads every byte of the images `rows` (ascending) and inspects them.

        Continues after a bad image, which gets a `problem`. Files are hashed as stored, arrays by
        shape and pixels, so hashes are comparable within one kind of storage. `on_done` is called
        every few images with how many of `rows` are done; `lossy` as in `decode_image`.
        """
        infos = []
        for info in self._run(rows, lambda source: partial(source.inspect, lossy=lossy)):
            infos.append(info)
            if len(infos) % 64 == 0 or len(infos) == len(rows):
                on_done(len(infos))
        return infos

    def batches(self, rows: range, size: int, *, side: int | None = None) -> Iterator[Tensor]:
        """Like `load`, `size` images at a time; the next are read while the caller works."""
        pending: Future[Tensor] | None = None
        with ThreadPoolExecutor(1) as reader:
            for start in range(rows.start, rows.stop, size):
                part = range(start, min(start + size, rows.stop))
                ahead = reader.submit(self.load, part, side=side)
                if pending is not None:
                    yield pending.result()
                pending = ahead
            if pending is not None:
                yield pending.result()

    def load(self, rows: range, *, side: int | None = None) -> Tensor:
        """The images `rows` (ascending, not empty) as uint8 [n, 3, H, W].

        With `side`, each is cropped and resized to it by `bench.images.codec.centre_crop`, and
        colours that lose something on the way to RGB are accepted.

        Raises: DimoError: One is no image, not 8-bit RGB without a loss or guess, or sizes differ.
        """
        images = None
        sizes: dict[tuple[int, int], list[str]] = {}

        def decoder(source: Source) -> Callable[[Any], npt.NDArray[np.uint8]]:
            if side is None:
                return lambda item: source.decode(item, lossy=False)
            return lambda item: centre_crop(source.decode(item, lossy=True), side)

        for place, pixels in enumerate(self._run(rows, decoder)):
            height, width, _ = pixels.shape
            sizes.setdefault((height, width), []).append(self.names[rows[place]])
            if images is None:
                images = np.empty((len(rows), 3, height, width), np.uint8)
            if len(sizes) == 1:
                images[place] = pixels.transpose(2, 0, 1)
        assert images is not None, "no rows"
        if len(sizes) > 1:
            raise DimoError(sizes_text(sizes))
        return torch.from_numpy(images)

    def _run(self, rows: range, work: Callable[[Source], Callable[[Any], R]]) -> Iterator[R]:
        """Applies a method of each row's source in threads, in order."""
        assert rows.step > 0, rows
        assert not rows or 0 <= rows[0] <= rows[-1] < len(self), rows
        for source, end in zip(self._sources, self._ends, strict=True):
            first = end - len(source.names)
            part = rows[bisect_left(rows, first) : bisect_left(rows, end)]
            local = range(part.start - first, part.stop - first, part.step)
            yield from _ordered_map(work(source), source.raw(local))


def open_images(paths: Sequence[Path], *, recursive: bool = False, labels: str = "") -> ImageSet:
    """Opens a set of images without reading them.

    Args:
        paths: Folders, .zip, uncompressed .tar (also WebDataset) or .npz, shards of one set in this
            order. Within one, images are sorted by name as text, an array's by position.
        recursive: Also take images in folders below, also in linked ones, each folder once; in
            archives from several folders.
        labels: See `bench.images.labels.find_labels`.

    Raises: DimoError: A path is missing, unreadable, of another kind or without images; two
        images have one name; or the labels do not fit.
    """
    if not paths:
        raise DimoError("no paths of images; give a folder, .zip, .tar or .npz")
    sources = [_open(Path(path), recursive) for path in paths]
    owners: dict[str, Path] = {}
    for source in sources:
        shared = [name for name in source.names if name in owners]
        if shared:
            raise DimoError(
                f"{owners[shared[0]]} and {source.path} both hold {shown(shared)}; allowed: each "
                "name once in a set; give each path once, or rename the images of one"
            )
        owners.update(dict.fromkeys(source.names, source.path))
    return ImageSet(sources, *find_labels(sources, labels))


def _open(path: Path, recursive: bool) -> Source:
    name = path.name.lower()
    if not path.exists():
        raise DimoError(f"no images at {path}: it does not exist; check the path")
    if path.is_dir():
        return open_folder(path, recursive=recursive)
    if not path.is_file():
        raise DimoError(f"{path} is no file or folder but a pipe or a device; check the path")
    if name.endswith(".zip"):
        return open_zip(path, recursive=recursive)
    if name.endswith(".tar"):
        return open_tar(path, recursive=recursive)
    if name.endswith(".npz"):
        return open_npz(path)
    if name.endswith(_COMPRESSED_TARS):
        raise compressed_tar(path)
    raise DimoError(f"{path} is no set of images; allowed: a folder, .zip, .tar or .npz")


def _ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in threads with a bounded number of items in flight."""
    threads = min(_MAX_THREADS, _cpu_count())
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _cpu_count() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
