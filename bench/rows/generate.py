"""The images of a row, shard by shard: made or read, hashed, and handed to what looks at them.

Ranks share the shards. The first rank keeps what was found on disk until the row is recorded, so
that an interrupted row is continued. Shards are cut where the forwards of networks are, so no
number depends on ranks, interruptions or batch size.
"""

import shutil
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.features import FORWARD_BATCH
from bench.features.pipeline import RealSet
from bench.images import content_sha256
from bench.images.checks import Content, content_of, infos_of
from bench.images.codec import ImageInfo, read_image, to_uint8
from bench.metrics.reconstruction import Compare, Reconstruction, compare
from bench.records.record import RankSpeed, Speed
from bench.rows.rows import Arrays, Job, Look, RowImages
from bench.rows.settings import sample_images, sample_tokens
from dimo.data.tokens import tokenizer_sha256
from dimo.engine.distributed import Runtime, device_name, peak_memory_bytes
from dimo.errors import DimoError
from dimo.models import Tokenizer
from dimo.samplers.base import Samples
from dimo.util.files import replacing
from dimo.util.schema import encode
from dimo.util.terminal import Stopped, asked_to_stop, signals_wait, stop_if_asked

LARGEST_BATCH = 2048
_CONTINUE = "what is finished is kept; run the same command again to continue"
_FORGOTTEN = 30 * 24 * 3600  # seconds after which the shards of a row that nobody continued go
_OURS = ("sha256", "codec", "seconds")  # beside what a look finds


class SampledImages(RowImages):
    """Images that a network makes: image i depends on model, settings, seed and i alone."""

    def __init__(
        self, job: Job, *, seed: int, count: int, batch_size: int, uint8: str, runtime: Runtime
    ) -> None:
        assert job.settings is not None
        self.job, self.settings, self.seed, self.caption = job, job.settings, seed, job.caption
        self.uint8, self.runtime = uint8, runtime
        self.labels, self.count = np.arange(count) % job.loaded.num_conditions, count
        if job.loaded.weights_sha256:  # a network in training has none
            student = job.loaded.student
            self.identity = {
                "count": count,
                "seed": seed,
                "settings": self.settings.plain() | {"selected_by": ""},
                "weights": job.loaded.weights_sha256,
                "student": None if student is None else encode(student),
                "uint8": uint8,
            }
        self.samples = self._warm_up()
        self.batch_size = min(batch_size or self._fitting_batch(), count)

    def read(self, rows: range) -> tuple[Tensor, None]:
        """As of `RowImages`; where memory runs out, in smaller batches from then on."""
        device, parts, start = self.runtime.device, list[Tensor](), rows.start
        while start < rows.stop:
            index = torch.arange(start, min(start + self.batch_size, rows.stop), device=device)
            try:
                with _stops_between_forwards(self.job.loaded.model):
                    batch = sample_images(
                        self.job.loaded,
                        self.settings,
                        labels=index % self.job.loaded.num_conditions,
                        seed=self.seed,
                        index=index,
                        uint8=self.uint8,
                    )
            except torch.OutOfMemoryError as error:
                self._shrink(error)
                continue
            parts.append(batch.images)
            start += len(batch.images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return torch.cat(parts), None

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        if self.batch_size == 1:
            raise DimoError(
                f"{self.caption}: not enough memory on {self.runtime.device} for one image; free "
                "some, or choose another --device"
            ) from error
        self.batch_size //= 2
        torch.cuda.empty_cache()
        self.runtime.warn(
            f"{self.caption}: out of memory; going on with batches of {self.batch_size}"
        )

    @torch.inference_mode()
    def _fitting_batch(self) -> int:
        """Images that take four fifths of the free memory, from what 8 take; on a CPU 500."""
        device = self.runtime.device
        if device.type != "cuda":
            return 500
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.job.loaded.tokenizer.decode(self._warm_up().tokens)
        each = (torch.cuda.max_memory_allocated(device) - before) / 8
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        return max(1, min(LARGEST_BATCH, int(0.8 * free / each)))

    @torch.inference_mode()
    def _warm_up(self) -> Samples:
        """One small batch, to warm up and to know the cost."""
        index = torch.arange(8, device=self.runtime.device)
        labels = index % self.job.loaded.num_conditions
        return sample_tokens(
            self.job.loaded, self.settings, labels=labels, seed=self.seed, index=index
        )


@contextmanager
def _stops_between_forwards(model: torch.nn.Module) -> Iterator[None]:
    """Within it a signal raises `Stopped` before the next forward: a batch may take minutes."""
    hook = model.register_forward_pre_hook(lambda *_: stop_if_asked(_CONTINUE))
    try:
        yield
    finally:
        hook.remove()


class FixedImages(RowImages):
    """Images that are there: uint8 [N, 3, H, W] with labels int64 [N]."""

    caption = "Real data"

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.count = images, labels.numpy(), len(labels)

    def read(self, rows: range) -> tuple[Tensor, None]:
        """As of `RowImages`."""
        return self.images[rows.start : rows.stop], None


class FileImages(RowImages):
    """Images in files, of any sizes, with a label each; a file that cannot be read is an error."""

    def __init__(self, path: Path, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths, self.caption, self.files = [path], "images", files
        self.labels, self.count = np.array(labels, dtype=np.int64), len(files)

    def read(self, rows: range) -> tuple[list[npt.NDArray[np.uint8]], list[ImageInfo]]:
        """As of `RowImages`."""
        found = [read_image(self.files[row]) for row in rows]
        return [pixels for _, pixels in found], [info for info, _ in found]


class RealImages(RowImages):
    """Real images in files."""

    caption = "Real data"

    def __init__(self, real: RealSet) -> None:
        self.real, self.labels, self.count = real, real.labels, len(real.images)
        self.paths, self.notes = real.images.paths, (real.note,)
        self.identity = {"images": content_sha256(real.infos, real.labels), "side": real.side}

    def read(self, rows: range) -> tuple[Tensor, Sequence[ImageInfo]]:
        """As of `RowImages`."""
        images = self.real.images.load(rows, side=self.real.side)
        return images, self.real.infos[rows.start : rows.stop]


class Reconstructed(RowImages):
    """Real images after encoding and decoding, of which `found` also tells what is lost.

    Args:
        real: Whose `read` gives a tensor.
        comparisons: From `bench.metrics.scores.load_comparisons`.
    """

    caption = "Tokenizer reconstruction"

    def __init__(
        self, real: RowImages, tokenizer: Tokenizer, uint8: str, comparisons: Mapping[str, Compare]
    ) -> None:
        self.real, self.labels, self.count = real, real.labels, real.count
        self.paths, self.notes = real.paths, real.notes
        self.tokenizer, self.uint8, self.comparisons = tokenizer, uint8, comparisons
        if real.identity is not None:
            own = {"tokenizer": tokenizer_sha256(tokenizer), "uint8": uint8}
            self.identity = {**real.identity, **own, "compared": [*comparisons]}

    @torch.inference_mode()
    def read(self, rows: range) -> tuple[tuple[Tensor, Arrays], Sequence[ImageInfo]]:
        """Decoded images with the tokens and values of each, and their infos."""
        decoded, parts = list[Tensor](), list[Arrays]()
        for original in self.real.read(rows)[0].split(FORWARD_BATCH):
            tokens = self.tokenizer.encode(original)
            images = to_uint8(self.tokenizer.decode(tokens), self.uint8).cpu()
            parts.append({"tokens": tokens.numpy(force=True)})
            for name, function in self.comparisons.items():
                parts[-1][name] = compare(function, original=original.cpu(), decoded=images)
            decoded.append(images)
        images = torch.cat(decoded)
        lost = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return (images, lost), infos_of(images.permute(0, 2, 3, 1).contiguous().numpy())

    def found(self, look: Look, read: Any, rows: range) -> Arrays:
        """As of `RowImages`, with tokens and values."""
        images, lost = read
        return {**look(images, rows), **lost}

    def take(self, found: Arrays) -> Reconstruction:
        """Removes tokens and values from what was found of all images."""
        tokens = torch.from_numpy(found.pop("tokens"))
        values = {name: found.pop(name) for name in self.comparisons}
        return Reconstruction(tokens, self.tokenizer.codebook_size, values)


@dataclass(frozen=True)
class Collected:
    """All that was found out about the images of a row."""

    found: Arrays  # by the names of the look; texts are of dtype object
    content: Content
    speed: Speed


class Shelf:
    """What was found of some shards of a row, in a folder of its own; None: nothing is kept.

    Problems with it cost time, never a result. Only the first rank uses it.
    """

    def __init__(self, folder: Path | None, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = folder, warn

    def load(self, count: int) -> Iterator[tuple[range, Arrays]]:
        """The finished shards of a row of `count` images; damaged ones are left out."""
        if self.folder is None:
            return
        self._remove_forgotten(self.folder.parent)
        stop = 0
        for path in sorted(self.folder.glob("[0-9]*-[0-9]*.npz")):
            try:
                rows = range(*map(int, path.stem.split("-")))
                with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                if not stop <= rows.start < rows.stop <= count or set(_OURS) - arrays.keys():
                    raise ValueError
                if any(len(values) != len(rows) for values in arrays.values()):
                    raise ValueError
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):
                self.warn(f"{path} is damaged and left out; its images are made again")
                continue
            stop = rows.stop
            yield rows, arrays

    def save(self, rows: range, arrays: Arrays) -> None:
        """Keeps a shard; warns if the disk is full or the folder is read-only, and stops trying."""
        if self.folder is None:
            return
        path = self.folder / f"{rows.start:08d}-{rows.stop:08d}.npz"
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except DimoError as error:
            self.warn(f"an interruption will begin this row again: {error}; see --cache")
            self.folder = None

    def remove(self) -> None:
        """Removes all shards."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _remove_forgotten(folder: Path) -> None:
        with suppress(OSError):
            for path in folder.iterdir():
                if time.time() - path.stat().st_mtime > _FORGOTTEN:
                    shutil.rmtree(path, ignore_errors=True)


class _Columns:
    """Arrays of a whole row, written into place shard by shard."""

    def __init__(self, count: int) -> None:
        self.count, self.arrays = count, Arrays()

    def put(self, rows: range, arrays: Arrays) -> None:
        for name, values in arrays.items():
            if name not in self.arrays:
                kind = np.dtype(object) if values.dtype.kind == "U" else values.dtype
                self.arrays[name] = np.empty((self.count, *values.shape[1:]), kind)
            self.arrays[name][rows.start : rows.stop] = values


def collect(
    images: RowImages, look: Look, *, runtime: Runtime, batch_size: int, shelf: Shelf
) -> Collected | None:
    """Looks at all images of a row; None on every rank but the first.

    Args:
        look: Called with images as of `RowImages.read`, and their rows.
        batch_size: Images that a rank looks at at a time, at least `FORWARD_BATCH`.

    Raises:
        Stopped: A signal came; finished shards are on the shelf.
        DimoError: From reading or looking; on all ranks.
    """
    ranks, count, columns = runtime.ranks, images.count, _Columns(images.count)

    def resume() -> list[range]:
        done = []
        for rows, arrays in shelf.load(count) if ranks.is_first else ():
            columns.put(rows, arrays)
            done.append(rows)
        return done

    done = ranks.all_gather(resume)[0]
    before = finished = sum(map(len, done))
    shards = _shards(_missing(done, count), batch_size, ranks.count)
    start = time.monotonic()
    with signals_wait():
        for number in range(0, len(shards), ranks.count):  # in lockstep: errors end all ranks
            now = shards[number : number + ranks.count]
            mine = now[ranks.index] if ranks.index < len(now) else None
            parts = ranks.all_gather(partial(_look_at, images, look, mine), first_only=True)
            for rows, part in zip(now, parts, strict=False):
                if part is not None:
                    columns.put(rows, part)
                    shelf.save(rows, part)
            finished += sum(map(len, now))
            if stopped := ranks.largest(asked_to_stop()):
                raise Stopped(stopped, _CONTINUE)
            if ranks.is_first:
                runtime.progress(images.caption, finished, count, "images")
    seconds = time.monotonic() - start
    peaks = ranks.all_gather(lambda: peak_memory_bytes(runtime.device))
    if not ranks.is_first:
        return None
    found, ours = columns.arrays, {name: columns.arrays.pop(name) for name in _OURS}
    codecs = zip(ours["sha256"], ours["codec"], strict=True)
    infos = [ImageInfo(digest, 0, 0, "", codec, None) for digest, codec in codecs]
    content = content_of(infos, images.labels, paths=images.paths)
    together = None
    if ranks.count > 1 and finished > before:
        together = RankSpeed(ranks.count, (finished - before) / seconds, tuple(peaks))
    return Collected(
        found,
        replace(content, notes=(*content.notes, *images.notes)),
        _speed(images, ours["seconds"].tolist(), together, runtime.device),
    )


def try_out(images: RowImages, look: Look) -> tuple[float, int]:
    """Seconds and bytes of what is found of one image, from the first `FORWARD_BATCH` ones."""
    rows = range(min(FORWARD_BATCH, images.count))
    start = time.perf_counter()
    found = _look_at(images, look, rows)
    assert found is not None
    seconds = time.perf_counter() - start
    return seconds / len(rows), sum(values.nbytes for values in found.values()) // len(rows)


def _look_at(images: RowImages, look: Look, rows: range | None) -> Arrays | None:
    """What is found of a shard, and its seconds per image; None without one, or after a signal."""
    if rows is None:
        return None
    start = time.perf_counter()
    try:
        pixels, infos = images.read(rows)
    except Stopped:
        return None
    seconds = (time.perf_counter() - start) / len(rows)
    with ThreadPoolExecutor(1) as pool:  # hashes, which takes as long as a GPU's forward
        if infos is None:
            host = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            hashing = pool.submit(infos_of, host)
        found = images.found(look, pixels, rows)
        infos = hashing.result() if infos is None else infos
    return {
        **found,
        "sha256": np.array([info.sha256 for info in infos]),
        "codec": np.array([info.codec for info in infos]),
        "seconds": np.full(len(rows), seconds),
    }


def _speed(
    images: RowImages, seconds: Sequence[float], together: RankSpeed | None, device: torch.device
) -> Speed:
    """Speed of the median image; images that were not made here have none."""
    if not isinstance(images, SampledImages):
        return Speed(None, None, None, None, device_name(device))
    middle, size = statistics.median(seconds), images.batch_size
    peak = peak_memory_bytes(device)
    return Speed(1 / middle, size * middle, size, peak, device_name(device), together)


def _missing(done: Sequence[range], count: int) -> list[range]:
    """What is left of range(count)."""
    stops, starts = [0, *(rows.stop for rows in done)], [*(rows.start for rows in done), count]
    return [range(a, b) for a, b in zip(stops, starts, strict=True) if a < b]


def _shards(missing: Sequence[range], batch_size: int, ranks: int) -> list[range]:
    """Cuts ranges at multiples of `FORWARD_BATCH`, so that ranks have about equally many images."""
    blocks = [
        range(start, min(start + FORWARD_BATCH, rows.stop))
        for rows in missing
        for start in range(rows.start, rows.stop, FORWARD_BATCH)
    ]
    largest = max(1, batch_size // FORWARD_BATCH)
    rounds = -(-len(blocks) // (largest * ranks))
    number = min(len(blocks), rounds * ranks)
    cuts = [len(blocks) * i // number for i in range(number + 1)] if number else [0]
    shards: list[range] = []
    for first, last in pairwise(cuts):
        shards += _joined(blocks[first:last])
    return shards


def _joined(blocks: Sequence[range]) -> list[range]:
    """Consecutive ranges as one."""
    joined: list[range] = []
    for rows in blocks:
        if joined and joined[-1].stop == rows.start:
            joined[-1] = range(joined[-1].start, rows.stop)
        else:
            joined.append(rows)
    return joined
