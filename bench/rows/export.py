"""Images 0..count-1 of a row as files that `dimo eval` reads: a folder of PNGs or ADM's npz.

An interrupted export is resumed, and ranks share what is missing. The images are the same after any
interruption, at any batch size and on any number of ranks.
"""

import csv
import glob
import importlib.metadata
import io
import json
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from bench.images.codec import IMAGE_SUFFIXES, encode_png, is_whole_png
from bench.rows.rows import Job
from bench.rows.settings import sample_images
from dimo.engine.distributed import ALONE, Ranks, peak_memory_bytes
from dimo.errors import DimoError
from dimo.models.text import TextConditioned
from dimo.util.files import remove_temporaries, replacing, write_atomic
from dimo.util.terminal import Progress, Stopped, asked_to_stop, quiet, signals_wait

Pixels: TypeAlias = npt.NDArray[np.uint8]

_UINT8 = "round"  # the rounding rule of every bundled protocol
_BLOCK = 500  # images in a block of an unfinished npz
_THREADS = 8  # compress and write PNGs
_ABOUT = "sampling.json"
_LABELS = "labels.csv"


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    made: int  # images sampled by this call; the others existed
    seconds: float  # of sampling and writing
    peak_memory_bytes: int  # highest of all processes


class _Store(ABC):
    """Writes images; `prepare` and `finish` run on the first rank, `save` on any."""

    def __init__(self, out: Path, about: dict[str, Any], count: int, classes: int) -> None:
        self._out, self._about, self._count, self._classes = out, about, count, classes

    @abstractmethod
    def prepare(self, batch_size: int, *, force: bool) -> list[range]:
        """Checks what exists, removes it with `force`; returns the missing ranges of images."""

    @abstractmethod
    def save(self, rows: range, parts: Sequence[Pixels]) -> None:
        """Writes the images of one such range, uint8 [n, H, W, 3] in parts."""

    def finish(self) -> None:  # noqa: B027 - a folder has nothing to finish
        """Called when everything is saved."""


def export_images(
    job: Job,
    out: Path,
    *,
    seed: int,
    count: int,
    batch_size: int,
    device: torch.device,
    force: bool = False,
    ranks: Ranks = ALONE,
    progress: Progress = quiet,
) -> Exported:
    """Writes those `count` images of `bench.rows.settings.generate` that do not exist yet.

    Args:
        out: A folder, or an `.npz` file.
        force: Remove what an earlier export wrote to `out`.
        ranks: Processes that share the work; all see the same files.

    Raises:
        Stopped: A signal came; what is written is kept.
        DimoError: `out` holds something else or other images, or cannot be written; on all ranks.
    """
    start = time.monotonic()
    about = _describe(job, seed, count, device)
    classes = job.loaded.num_conditions
    store: _Store = (_Npz if out.suffix.lower() == ".npz" else _Folder)(out, about, count, classes)

    def prepare() -> list[range]:
        try:
            return store.prepare(batch_size, force=force) if ranks.is_first else []
        except OSError as error:
            raise DimoError(
                f"cannot use {error.filename or out}: {error.strerror}; choose another --out"
            ) from error

    missing = ranks.all_gather(prepare)[0]
    mine = ranks.split(len(missing))
    batches = _work(job, missing[mine.start : mine.stop], store, seed, batch_size, device)
    made, already = 0, count - sum(map(len, missing))
    with signals_wait():
        while True:  # in lockstep: an error on one rank ends all, and the first reports progress
            counts = ranks.all_gather(lambda: next(batches, 0))
            if not any(counts):
                break
            made += sum(counts)
            progress(job.caption, already + made, count, "images")
            if stopped := ranks.largest(asked_to_stop()):
                raise Stopped(stopped, "rerun the same command to continue")
    ranks.all_gather(lambda: store.finish() if ranks.is_first else None)
    peak = max(ranks.all_gather(lambda: peak_memory_bytes(device)))
    return Exported(made, time.monotonic() - start, peak)


def _work(
    job: Job,
    chunks: Sequence[range],
    store: _Store,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[int]:
    """Samples and saves chunk by chunk; yields the size of each finished batch."""
    assert job.settings is not None
    for chunk in chunks:
        parts: list[Pixels] = []
        for start in range(chunk.start, chunk.stop, batch_size):
            index = torch.arange(start, min(start + batch_size, chunk.stop), device=device)
            labels = index % job.loaded.num_conditions
            batch = sample_images(
                job.loaded, job.settings, labels=labels, seed=seed, index=index, uint8=_UINT8
            )
            parts.append(batch.images.permute(0, 2, 3, 1).cpu().numpy())
            if start + batch_size >= chunk.stop:
                store.save(chunk, parts)
            yield len(index)


def _describe(job: Job, seed: int, count: int, device: torch.device) -> dict[str, Any]:
    """Everything that the images depend on, as JSON data."""
    assert job.settings is not None
    loaded, student = job.loaded, job.loaded.student
    model = loaded.model
    prompts = {"prompts": model.conditions.sha256} if isinstance(model, TextConditioned) else {}
    known = {} if loaded.known is None else {"known_tokens": loaded.known.sha256}
    names = ("init_mask_ratio", "embedding_noise")
    return {
        "format": 1,
        "model": loaded.name,
        "teacher": loaded.teacher.name,
        "weights_sha256": loaded.weights_sha256,
        "sampler": job.settings.plain(),
        "token_initialization": None
        if student is None
        else {name: getattr(student, name) for name in names},
        "seed": seed,
        "count": count,
        "labels": f"index modulo {loaded.num_conditions}",
        **prompts,
        **known,
        "uint8": _UINT8,
        "device": device.type,
        "dimo": importlib.metadata.version("dimo"),
        "torch": importlib.metadata.version("torch"),
    }


class _Folder(_Store):
    """`000000.png`, `000001.png`, ... with `labels.csv`, and `sampling.json`, written first."""

    def prepare(self, batch_size: int, *, force: bool) -> list[range]:
        _claim(self._out, self._about, force=force)
        if not (self._out / _LABELS).is_file():
            text = io.StringIO(newline="")
            table = csv.writer(text, lineterminator="\n")
            table.writerow(("file", "label"))
            table.writerows((self._path(i).name, i % self._classes) for i in range(self._count))
            write_atomic(self._out / _LABELS, text.getvalue())
        whole = [is_whole_png(self._path(i)) for i in range(self._count)]
        return [rows for rows in _cut(self._count, batch_size) if not all(whole[i] for i in rows)]

    def save(self, rows: range, parts: Sequence[Pixels]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._save_one, rows, (image for part in parts for image in part)))

    def _save_one(self, index: int, image: Pixels) -> None:
        if not is_whole_png(self._path(index)):
            write_atomic(self._path(index), encode_png(image))

    def _path(self, index: int) -> Path:
        return self._out / _png_name(index, self._count)


class _Npz(_Store):
    """ADM's layout, arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N]; `FILE.npz.json` describes it.

    The folder `FILE.npz.parts` holds finished blocks until all are finished.
    """

    def __init__(self, out: Path, about: dict[str, Any], count: int, classes: int) -> None:
        super().__init__(out, about, count, classes)
        self._parts = out.with_name(f"{out.name}.parts")
        self._description = out.with_name(f"{out.name}.json")

    def prepare(self, batch_size: int, *, force: bool) -> list[range]:
        if self._description.is_file():
            _check_same(self._description, self._about, force=force)
        elif self._out.exists() and not force:
            raise DimoError(
                f"output {self._out} exists; replace it with --force or choose another --out"
            )
        if self._out.parent.is_dir():
            remove_temporaries(self._out.parent, glob.escape(self._out.name))
        if self._out.exists() and not force:
            self._remove_parts()
            return []
        _claim(self._parts, self._about, force=force)
        if force:
            self._out.unlink(missing_ok=True)
            self._description.unlink(missing_ok=True)
        return [rows for rows in self._blocks() if not self._path(rows).is_file()]

    def save(self, rows: range, parts: Sequence[Pixels]) -> None:
        with replacing(self._path(rows)) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))

    def finish(self) -> None:
        """Copies the blocks into the npz one by one, then removes them."""
        if self._out.exists():
            return
        write_atomic(self._description, _json(self._about))
        labels = np.arange(self._count, dtype=np.int64) % self._classes
        with replacing(self._out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                for rows in self._blocks():
                    block = self._read(rows)
                    if rows.start == 0:
                        shape = (self._count, *block.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(stream, header)
                    stream.write(np.ascontiguousarray(block).data)
            with archive.open("arr_1.npy", "w") as stream:
                np.lib.format.write_array(stream, labels)
        self._remove_parts()

    def _read(self, rows: range) -> Pixels:
        path = self._path(rows)
        try:
            block: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DimoError(
                f"cannot read {path}: {error}; remove it and run the same command again"
            ) from error
        return block

    def _blocks(self) -> list[range]:
        return _cut(self._count, _BLOCK)

    def _path(self, rows: range) -> Path:
        return self._parts / _block_name(rows.start)

    def _remove_parts(self) -> None:
        if self._parts.is_dir():
            _clear(self._parts, self._count)


def _claim(folder: Path, about: dict[str, Any], *, force: bool) -> None:
    """Prepares `folder` for the images that `about` describes; with `force` removes others."""
    description = folder / _ABOUT
    if description.is_file():
        saved = _check_same(description, about, force=force)
        if force:
            _clear(folder, saved["count"])
    elif folder.exists():
        if not folder.is_dir():
            raise DimoError(f"output {folder} is a file; choose a folder or an .npz as --out")
        names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
        read = (*IMAGE_SUFFIXES, ".npy", _LABELS, "labels.json")
        if others := [name for name in names if name.lower().endswith(read)]:
            raise DimoError(
                f"output {folder} holds {min(others)} and no {_ABOUT}, so `dimo sample --count` "
                "did not make it; choose another --out"
            )
    if folder.is_dir():
        _remove_unfinished(folder)
    if not description.is_file():
        write_atomic(description, _json(about))


def _clear(folder: Path, count: int) -> None:
    """Removes what an export of `count` images wrote to `folder`, its description last."""
    _remove_unfinished(folder)
    blocks = [_block_name(rows.start) for rows in _cut(count, _BLOCK)]
    names = [*(_png_name(i, count) for i in range(count)), *blocks, _LABELS, _ABOUT]
    existing = {path.name for path in folder.iterdir()}
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if existing <= set(names):
        folder.rmdir()


def _remove_unfinished(folder: Path) -> None:
    """Removes temporary files of killed exports."""
    for names in ("[0-9]*.png", "[0-9]*.npy", _ABOUT, _LABELS):
        remove_temporaries(folder, names)


def _check_same(path: Path, about: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """Reads the description of an export; without `force` it must equal `about`."""
    try:
        saved = json.loads(path.read_bytes())
        if not isinstance(saved, dict) or not isinstance(saved.get("count"), int):
            raise ValueError("it does not describe an export")
    except (OSError, ValueError) as error:
        raise DimoError(f"cannot read {path}: {error}; choose another --out") from error
    requested = json.loads(_json(about))
    keys = [key for key in {**requested, **saved} if saved.get(key) != requested.get(key)]
    if keys and not force:
        raise DimoError(
            f"{path} describes images made with other settings ({', '.join(keys)}); choose another "
            "--out, or replace them with --force"
        )
    return saved


def _json(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=2, ensure_ascii=False) + "\n"


def _png_name(index: int, count: int) -> str:
    return f"{index:0{max(6, len(str(count - 1)))}d}.png"


def _block_name(start: int) -> str:
    return f"{start:08d}.npy"


def _cut(count: int, size: int) -> list[range]:
    """range(count) in ranges of `size`; the last may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
