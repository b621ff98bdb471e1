"""One job's images 0..count-1 as files that `dimo eval` reads: a folder of PNGs or ADM's npz.

A store knows what is missing, so an interrupted export goes on where it was, and ranks share what
is missing. Batches are cut at the same places each time: the same command makes the same bytes
after any interruption and on any number of ranks.
"""

import csv
import glob
import importlib.metadata
import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from bench.images.codec import encode_png, is_whole_png
from bench.rows.rows import Job
from bench.rows.settings import sample_images
from dimo.engine.distributed import ALONE, Ranks, peak_memory_bytes
from dimo.errors import DimoError
from dimo.models.text import TextConditioned
from dimo.util.files import remove_temporaries, replacing, write_atomic

Pixels: TypeAlias = npt.NDArray[np.uint8]

_UINT8 = "round"  # the rounding rule of every shipped protocol
_BLOCK = 500  # images in a block of an npz under way
_THREADS = 8  # that compress and write PNGs
_ABOUT = "sampling.json"
_LABELS = "labels.csv"


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        made: Images sampled now; the rest was there.
        seconds: Of sampling and writing.
        peak_memory_bytes: Of the process that needed most.
    """

    made: int
    seconds: float
    peak_memory_bytes: int


class _Store(Protocol):
    """Where images go. `prepare` and `finish` run on the first rank, `save` on any."""

    def prepare(self, batch_size: int, *, force: bool) -> list[range]:
        """Checks what is there, clears it with `force`; the ranges of images yet to be made."""

    def save(self, rows: range, parts: Sequence[Pixels]) -> None:
        """Writes the images of one such range, uint8 [n, H, W, 3] in parts."""

    def finish(self) -> None:
        """Called once everything is saved."""


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
    progress: Callable[[str, int, int, str], None] = lambda what, done, total, unit: None,
) -> Exported:
    """Writes the images that `bench.rows.settings.generate` makes, those that are not yet there.

    Args:
        job: A network with its settings.
        out: A folder, or a file called .npz.
        seed: Of the images.
        count: How many; the label of image i is i modulo the classes.
        batch_size: How many at a time.
        device: Where the network is.
        force: Whether to remove what an earlier export wrote to `out`.
        ranks: The processes that share the work; all see the same files.
        progress: Told how many of the images there are, on all ranks together.

    Raises:
        DimoError: `out` holds something else or other images, or cannot be written. All ranks
            raise it.
    """
    start = time.monotonic()
    about = _describe(job, seed, count, device)
    classes = job.loaded.num_conditions
    store: _Store = (_Npz if out.suffix.lower() == ".npz" else _Folder)(out, about, count, classes)
    missing = ranks.together(
        lambda: _prepared(store, out, batch_size, force=force) if ranks.is_first else []
    )[0]
    mine = ranks.share(len(missing))
    batches = _work(job, missing[mine.start : mine.stop], store, seed, batch_size, device)
    made, already = 0, count - sum(map(len, missing))
    while True:  # ranks go in step: an error of one ends all, and the first knows how far all are
        counts = ranks.together(lambda: next(batches, 0))
        if not any(counts):
            break
        made += sum(counts)
        progress(job.caption, already + made, count, "images")
    ranks.together(lambda: store.finish() if ranks.is_first else None)
    peak = max(ranks.together(lambda: peak_memory_bytes(device)))
    return Exported(made, time.monotonic() - start, peak)


def _prepared(store: _Store, out: Path, batch_size: int, *, force: bool) -> list[range]:
    try:
        return store.prepare(batch_size, force=force)
    except OSError as error:
        raise DimoError(
            f"cannot use {error.filename or out}: {error.strerror}; choose another --out"
        ) from error


def _work(
    job: Job,
    chunks: Sequence[range],
    store: _Store,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[int]:
    """Makes and saves one chunk after the other; yields the size of each batch when it is done."""
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
    """Everything that the images depend on, as JSON holds it."""
    assert job.settings is not None
    loaded, student = job.loaded, job.loaded.student
    model = loaded.model
    prompts = {"prompts": model.conditions.sha256} if isinstance(model, TextConditioned) else {}
    return {
        "format": 1,
        "model": loaded.name,
        "teacher": loaded.teacher.name,
        "weights_sha256": loaded.weights_sha256,
        "sampler": job.settings.plain(),
        "token_initialization": None
        if student is None
        else {
            "init_mask_ratio": student.init_mask_ratio,
            "embedding_noise": student.embedding_noise,
        },
        "seed": seed,
        "count": count,
        "labels": f"index modulo {loaded.num_conditions}",
        **prompts,
        "uint8": _UINT8,
        "device": device.type,
        "dimo": importlib.metadata.version("dimo"),
        "torch": importlib.metadata.version("torch"),
    }


class _Folder:
    """`000000.png` and on, with `labels.csv`, and `sampling.json`, which is written first."""

    def __init__(self, out: Path, about: dict[str, Any], count: int, classes: int) -> None:
        self._out, self._about, self._count, self._classes = out, about, count, classes

    def prepare(self, batch_size: int, *, force: bool) -> list[range]:
        _claim(self._out, self._about, force=force)
        if not (self._out / _LABELS).is_file():
            write_atomic(self._out / _LABELS, self._labels())
        there = [is_whole_png(self._path(i)) for i in range(self._count)]
        return [rows for rows in _cut(self._count, batch_size) if not all(there[i] for i in rows)]

    def save(self, rows: range, parts: Sequence[Pixels]) -> None:
        images = (image for part in parts for image in part)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._save_one, rows, images))

    def finish(self) -> None:
        pass

    def _save_one(self, index: int, image: Pixels) -> None:
        path = self._path(index)
        if not is_whole_png(path):
            write_atomic(path, encode_png(image))

    def _path(self, index: int) -> Path:
        return self._out / _png_name(index, self._count)

    def _labels(self) -> str:
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "label"))
        table.writerows((_png_name(i, self._count), i % self._classes) for i in range(self._count))
        return text.getvalue()


class _Npz:
    """ADM's layout, arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N]; `FILE.npz.json` describes it.

    Finished blocks lie in the folder `FILE.npz.parts` until all of them are there.
    """

    def __init__(self, out: Path, about: dict[str, Any], count: int, classes: int) -> None:
        self._out, self._about, self._count, self._classes = out, about, count, classes
        self._parts = out.with_name(f"{out.name}.parts")
        self._beside = out.with_name(f"{out.name}.json")

    def prepare(self, batch_size: int, *, force: bool) -> list[range]:
        if self._beside.is_file():
            _check_mine(self._beside, self._about, force=force)
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
            self._beside.unlink(missing_ok=True)
        return [rows for rows in self._blocks() if not self._path(rows).is_file()]

    def save(self, rows: range, parts: Sequence[Pixels]) -> None:
        with replacing(self._path(rows)) as temporary, temporary.open("wb") as file:
            _write_header(file, (len(rows), *parts[0].shape[1:]), np.dtype(np.uint8))
            for part in parts:
                file.write(np.ascontiguousarray(part).data)

    def finish(self) -> None:
        """Streams the blocks into the npz, then removes them."""
        if self._out.exists():
            return
        write_atomic(self._beside, _json(self._about))
        labels = np.arange(self._count, dtype=np.int64) % self._classes
        with (
            replacing(self._out) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            with _member(archive, "arr_0") as stream:
                for rows in self._blocks():
                    block = self._read(rows)
                    if rows.start == 0:
                        _write_header(stream, (self._count, *block.shape[1:]), block.dtype)
                    stream.write(np.ascontiguousarray(block).data)
            with _member(archive, "arr_1") as stream:
                _write_header(stream, labels.shape, labels.dtype)
                stream.write(labels.astype("<i8").data)
        self._remove_parts()

    def _read(self, rows: range) -> Pixels:
        path = self._path(rows)
        try:
            block: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
            if len(block) != len(rows):
                raise ValueError(f"it holds {len(block)} images, not {len(rows)}")
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
            _release(self._parts, self._count)


# --- a folder of ours --------------------------------------------------------------------------


def _claim(folder: Path, about: dict[str, Any], *, force: bool) -> None:
    """Makes `folder` one that is to hold what `about` says, and nothing else of an export.

    Raises:
        DimoError: It is a file, holds files of others, or what another command made.
    """
    description = folder / _ABOUT
    if description.is_file():
        found = _check_mine(description, about, force=force)
        if force:
            _release(folder, found["count"])
    elif folder.exists():
        if not folder.is_dir():
            raise DimoError(f"output {folder} is a file; choose a folder or an .npz as --out")
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise DimoError(
                f"output {folder} holds files and no {_ABOUT}, so `dimo sample --count` did not "
                "make it; choose another --out"
            )
    if folder.is_dir():
        _sweep(folder)
    if not description.is_file():
        write_atomic(description, _json(about))


def _release(folder: Path, count: int) -> None:
    """Removes what an export of `count` images wrote to `folder`, its description last."""
    blocks = [_block_name(rows.start) for rows in _cut(count, _BLOCK)]
    names = [*(_png_name(i, count) for i in range(count)), *blocks, _LABELS, _ABOUT]
    _sweep(folder)
    with os.scandir(folder) as entries:
        there = {entry.name for entry in entries}
    for name in names:
        if name in there:
            (folder / name).unlink()
    if there <= set(names):
        folder.rmdir()


def _sweep(folder: Path) -> None:
    """Removes what killed exports were about to write."""
    for names in ("[0-9]*.png", "[0-9]*.npy", _ABOUT, _LABELS):
        remove_temporaries(folder, names)


def _check_mine(path: Path, about: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """A description on disk.

    Raises:
        DimoError: It is none, or without `force` it says something else than `about`.
    """
    try:
        described = json.loads(path.read_bytes())
        if not isinstance(described, dict) or not isinstance(described.get("count"), int):
            raise ValueError("it does not describe an export")
    except (OSError, ValueError) as error:
        raise DimoError(f"cannot read {path}: {error}; choose another --out") from error
    found, wanted = _flat(described), _flat(json.loads(_json(about)))
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if keys and not force:
        told = ", ".join(
            f"{key} {_shown(found.get(key))}, not {_shown(wanted.get(key))}" for key in keys[:3]
        )
        more = f", and {len(keys) - 3} more differences" if len(keys) > 3 else ""
        raise DimoError(
            f"{path} says that these images were made with {told}{more}; choose another --out, or "
            "make them anew with --force"
        )
    return described


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else text[:20] + '..."'


def _json(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=2, ensure_ascii=False) + "\n"


# --- names and bytes ---------------------------------------------------------------------------


def _png_name(index: int, count: int) -> str:
    return f"{index:0{max(6, len(str(count - 1)))}d}.png"


def _block_name(start: int) -> str:
    return f"{start:08d}.npy"


def _cut(count: int, size: int) -> list[range]:
    """range(count) in ranges of `size`, the last perhaps shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _member(archive: zipfile.ZipFile, key: str) -> Any:
    """A member to write to, the same bytes at any time and on any system."""
    info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o600 << 16
    return archive.open(info, "w", force_zip64=True)


def _write_header(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
