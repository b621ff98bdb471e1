"""Encoding images into a token cache, resumable at every batch.

`OUT.part` holds the tokens so far and `OUT.part.json` their number, origin and pixel hash. Tokens
are synced before they are counted: an interrupted call resumes after the last complete batch, and
the result has the same bytes.
"""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from dimo.data.tokens import CacheInfo, CacheTarget, read_cache_info, save_tokens, tokenizer_sha256
from dimo.errors import DimoError
from dimo.models import Tokenizer
from dimo.util.files import remove_temporaries, sha256_bytes, try_lock, write_atomic
from dimo.util.schema import Origin, canonical_json, decode
from dimo.util.terminal import signals_wait, stop_if_asked


@dataclass(frozen=True)
class EncodingRun:
    """Result of a call; `made` images were encoded by it, the others before."""

    made: int
    info: CacheInfo


@dataclass(frozen=True)
class _Journal:
    """`OUT.part.json`; `info.source_sha256` is that of the first `done` images."""

    info: CacheInfo
    done: int = 0


def encode_images(
    batches: Callable[[int], Iterable[Tensor]],
    labels: Tensor,
    out: Path,
    *,
    names: Sequence[str],
    target: CacheTarget,
    tokenizer: Tokenizer,
    crop: str = "none",
    mirrored: bool = False,
    force: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> EncodingRun:
    """Encodes the remaining images, and writes the cache once all are encoded.

    Args:
        batches: Returns the images from an index on, in order, as uint8 [b, 3, H, W]; b affects
            only speed and memory.
        labels: int64 [N].
        names: Of the images; with the labels they identify the data set.
        tokenizer: On the device to use.
        crop: How the images were cropped, for the record.
        mirrored: Follow each image by its mirror image.
        force: Start over and replace `out`.
        progress: Called with the number of encoded images.

    Raises:
        Stopped: A signal came; what is encoded is kept.
        DimoError: A label out of range, images of another size, another cache at `out`, another
            process that writes it, or a file that cannot be written.
    """
    _check_labels(labels, names, target)
    assert tokenizer.codebook_size <= 2**16, "tokens are stored as uint16"
    named = canonical_json([[*names], labels.tolist()])
    info = CacheInfo(
        format=1,
        teacher=target.name,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        images=len(names),
        names_sha256=sha256_bytes(named.encode()),
        crop=crop,
        mirrored=mirrored,
    )
    part = out.with_name(f"{out.name}.part")
    journal_path = out.with_name(f"{out.name}.part.json")
    if out.exists() and not force:
        present = read_cache_info(out)
        _check_same(present, info, out)
        _remove(part, journal_path)
        return EncodingRun(0, present)
    copies, width = (2 if mirrored else 1), target.num_tokens
    with _opened(part) as file:
        if force:
            _remove(out, journal_path)
        for path in (out, journal_path):
            remove_temporaries(path.parent, glob.escape(path.name))
        journal = _read_journal(journal_path, info)
        if part.stat().st_size < journal.done * copies * width * 2:
            journal = _Journal(info)  # there are fewer tokens than it counts
        start = journal.done
        file.truncate(start * copies * width * 2)
        if start:
            progress(start)
        with signals_wait():
            for images in batches(start) if start < len(names) else ():
                _check_size(images, target, names[journal.done])
                _append(file, _tokens(tokenizer, images, mirrored), part)
                journal = _advanced(journal, images)
                write_atomic(journal_path, canonical_json(dataclasses.asdict(journal)))
                progress(journal.done)
                counts = f"{journal.done:,} of {len(names):,} images are encoded"
                stop_if_asked(f"{counts}; rerun the same command to continue")
        rows = len(names) * copies
        tokens = torch.from_file(str(part), size=rows * width, dtype=torch.uint16)  # memory-mapped
        save_tokens(out, tokens.view(rows, width), labels.repeat_interleave(copies), journal.info)
    _remove(part, journal_path)
    return EncodingRun(len(names) - start, journal.info)


@torch.inference_mode()
def _tokens(tokenizer: Tokenizer, images: Tensor, mirrored: bool) -> Tensor:
    """uint16 [b, L] on the CPU; if `mirrored` [2 b, L]: image, mirror image, image, ..."""
    tokens = tokenizer.encode(images)
    if mirrored:
        tokens = torch.stack([tokens, tokenizer.encode(images.flip(-1))], 1).flatten(0, 1)
    return tokens.cpu().to(torch.uint16)


def _advanced(journal: _Journal, images: Tensor) -> _Journal:
    """The journal after these images; pixel hashes are chained, so that they can be resumed."""
    digest = journal.info.source_sha256
    for image in images:
        digest = hashlib.sha256(digest.encode() + image.contiguous().numpy().data).hexdigest()
    info = dataclasses.replace(journal.info, source_sha256=digest)
    return _Journal(info, journal.done + len(images))


def _append(file: FileIO, tokens: Tensor, path: Path) -> None:
    data = tokens.numpy().astype("<u2", copy=False).tobytes()
    try:
        while data:
            data = data[file.write(data) :]  # an unbuffered write may be partial
        os.fsync(file.fileno())
    except OSError as error:
        raise DimoError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder, then "
            "run the same command again"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """Opens the file for appending and locks it against other processes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise DimoError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    with file:
        if not try_lock(file.fileno()):
            raise DimoError(f"{path} is being written by another process; wait until it ends")
        yield file


def _read_journal(path: Path, info: CacheInfo) -> _Journal:
    if not path.is_file():
        return _Journal(info)
    origin = Origin(str(path), "start over with --force")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise origin.error(f"cannot be read: {error}") from error
    journal = decode(_Journal, content, origin)
    _check_same(journal.info, info, path)
    return journal


def _check_same(saved: CacheInfo, requested: CacheInfo, path: Path) -> None:
    old, new = dataclasses.asdict(saved), dataclasses.asdict(requested)
    different = [
        f"{key} {str(old[key])[:12]}, not {str(new[key])[:12]}"
        for key in new
        if key != "source_sha256" and old[key] != new[key]
    ]
    if different:
        raise DimoError(
            f"{path} was made with {', '.join(different)}; choose another --out, or start over "
            "with --force"
        )


def _check_labels(labels: Tensor, names: Sequence[str], target: CacheTarget) -> None:
    bad = ((labels < 0) | (labels >= target.num_classes)).nonzero().flatten().tolist()
    if bad:
        raise DimoError(
            f"{len(bad):,} of {len(names):,} labels are out of range, e.g. {int(labels[bad[0]])} "
            f"of {names[bad[0]]!r}; allowed for teacher {target.name!r}: 0 to "
            f"{target.num_classes - 1}; correct them, or give others with --labels"
        )


def _check_size(images: Tensor, target: CacheTarget, name: str) -> None:
    side = target.image_size
    if images.shape[2:] != (side, side):
        height, width = images.shape[2:]
        raise DimoError(
            f"{name!r} is {height} x {width}; allowed for teacher {target.name!r}: {side} x "
            f"{side}; crop and resize all images with --centre-crop"
        )


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
