"""Checks a set of images against a protocol, and computes its content hash."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bench.images.codec import LOSSY_CODECS, ImageInfo
from bench.images.labels import first_out_of_order, labels_sha256
from bench.images.source import Labels, counted, shown

K = TypeVar("K")
_MODES = {3: ("RGB",), 1: ("L", "RGB")}  # by the protocol's channels; a grey RGB file is grey
_MAX_DUPLICATES = 0.1  # of the set
_MAX_BAD_NAMES = 20


@dataclass(frozen=True)
class Findings:
    """Result of checking a set: one line per finding, and the number of duplicates.

    `errors` prevent scoring; `nonconforming` findings make the score off-protocol.
    """

    errors: list[str]
    nonconforming: list[str]
    notes: list[str]
    duplicates: int


def content_sha256(infos: Sequence[ImageInfo], labels: Labels | None) -> str:
    """Hash of a set's images, their order and their labels.

    Order counts, because image i belongs to random stream i and is shuffled into splits.
    """
    digest = hashlib.sha256(f"{len(infos)}\n".encode())
    for info in infos:
        digest.update(f"{info.sha256}\n".encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def find_problems(
    infos: Sequence[ImageInfo],
    labels: Labels | None,
    *,
    names: Sequence[str],
    ignored: Sequence[str],
    count: int,
    resolution: tuple[int, int],
    channels: int,
    num_classes: int | None,
    balanced: bool,
    unused: str = "",
) -> Findings:
    """Compares a scanned set with the protocol's requirements.

    Args:
        infos: One per image, from `ImageSet.scan`.
        labels: int64 [N], or None if unknown.
        channels: 3 for RGB; 1 for grey, which may be stored as RGB.
        num_classes: Labels are in 0 to `num_classes` - 1; None without classes.
        balanced: Whether each label must occur equally often.
        unused: Why the set's own labels are not among `labels`, see `unusable`.
    """
    assert len(infos) == len(names)
    assert labels is None or len(labels) == len(names)
    pairs = list(zip(infos, names, strict=True))
    readable = [(info, name) for info, name in pairs if info.problem is None]
    sizes = _group(((info.height, info.width), name) for info, name in readable)
    duplicates = [
        (copy, same[0])
        for same in _group((info.sha256, name) for info, name in readable).values()
        for copy in same[1:]
    ]
    errors = list(_unreadable([(i.problem, name) for i, name in pairs if i.problem], len(pairs)))
    if not pairs:
        errors.append("0 images; allowed: at least 1; check the path")
    if len(sizes) > 1:
        errors.append(sizes_text(sizes))
    nonconforming = [
        *_wrong_count(len(pairs), count),
        *_wrong_size(sizes, resolution),
        *_wrong_kind(readable, _MODES[channels]),
        *_wrong_labels(labels, names, num_classes, balanced),
    ]
    notes = [unused] if unused else list(_unknown(labels, num_classes))
    notes += _remarks(names, ignored, num_classes)
    if duplicates:
        many = len(duplicates) > _MAX_DUPLICATES * len(pairs)
        examples = ", ".join(f"{copy!r} of {first!r}" for copy, first in duplicates[:3])
        text = (
            f"{len(duplicates):,} of {len(pairs):,} images are exact copies of others ({examples})"
        )
        rule = f"; allowed: {_MAX_DUPLICATES:.0%}; check that each image has its own noise"
        (nonconforming if many else notes).append(text + rule * many)
    return Findings(errors, nonconforming, notes, len(duplicates))


def sizes_text(sizes: Mapping[tuple[int, int], Sequence[str]]) -> str:
    """The line for images of several sizes, given the names by (height, width)."""
    ordered = sorted(sizes.items(), key=lambda item: -len(item[1]))
    examples = [f"{height} x {width} in {_images(names)}" for (height, width), names in ordered[:3]]
    more = f" and {len(ordered) - 3:,} more sizes" if len(ordered) > 3 else ""
    return f"images of {len(ordered):,} sizes (height x width): {', '.join(examples)}{more}; " + (
        "allowed: one size; resize or generate them alike"
    )


def _unreadable(bad: Sequence[tuple[str, str]], total: int) -> Iterator[str]:
    if bad:
        examples = [
            f"{problem}: {', '.join(map(repr, names))}"
            for problem, names in _group(bad[:_MAX_BAD_NAMES]).items()
        ]
        more = f"; and {len(bad) - _MAX_BAD_NAMES:,} more" if len(bad) > _MAX_BAD_NAMES else ""
        yield (
            f"{len(bad):,} of {total:,} images cannot be scored ({'; '.join(examples)}{more}); "
            "allowed: whole 8-bit images; make them again"
        )


def _wrong_count(size: int, count: int) -> Iterator[str]:
    if size != count:
        gap = f"{count - size:,} missing" if size < count else f"{size - count:,} too many"
        yield f"{counted(size, 'image')}; allowed: {count:,} ({gap}); generate exactly that many"


def _wrong_size(
    sizes: Mapping[tuple[int, int], Sequence[str]], resolution: tuple[int, int]
) -> Iterator[str]:
    for (height, width), names in sizes.items():
        if (height, width) != tuple(resolution):
            yield (
                f"size {height} x {width} in {_images(names)}; allowed: {resolution[0]} x "
                f"{resolution[1]} (height x width); generate at that size"
            )


def _wrong_kind(readable: Sequence[tuple[ImageInfo, str]], modes: Sequence[str]) -> Iterator[str]:
    for mode, names in _group((info.mode, name) for info, name in readable).items():
        if mode not in modes:
            yield (
                f"mode {mode} in {_images(names)}; allowed: {' or '.join(modes)} of 8 bits; "
                "save them as such"
            )
    for codec, names in _group((info.codec, name) for info, name in readable).items():
        if codec in LOSSY_CODECS:
            yield (
                f"lossy codec {codec} in {_images(names)}; allowed: lossless (PNG, npz); save the "
                "generator's output again, as converting does not bring back what is lost"
            )


def _wrong_labels(
    labels: Labels | None,
    names: Sequence[str],
    num_classes: int | None,
    balanced: bool,
) -> Iterator[str]:
    if labels is None or num_classes is None or not len(labels):
        return
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        where = _images([names[i] for i in outside.tolist()])
        yield (
            f"labels from {labels.min()} to {labels.max()}, out of range in {where}; "
            f"allowed: 0 to {num_classes - 1}; correct them"
        )
    elif balanced:
        counts = np.bincount(labels, minlength=num_classes)
        few, many = int(counts.argmin()), int(counts.argmax())
        if counts[few] != counts[many]:
            yield (
                f"labels are not balanced: {counts[few]:,} images of label {few}, {counts[many]:,} "
                f"of label {many}; allowed: equally many of each of {num_classes:,}; generate them "
                "so"
            )


def unusable(labels: Labels | None, num_classes: int) -> str:
    """Why labels that a sampler stored with its images do not count; empty if they do.

    ADM's draws them at random, and its evaluator does not read them.
    """
    if labels is None or labels.min() < 0 or labels.max() >= num_classes:
        return ""  # out of range they are a mistake
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() == counts.max():
        return ""
    return (
        f"labels stored with the images are not balanced (from {counts.min():,} to "
        f"{counts.max():,} images of a label) and are left out; to use them give --labels FILE"
    )


def _unknown(labels: Labels | None, num_classes: int | None) -> Iterator[str]:
    if labels is None and num_classes is not None:
        yield (
            "labels are unknown, so their balance is not checked; give --labels filename, "
            "cyclic:1000 or a manifest"
        )


def _remarks(
    names: Sequence[str], ignored: Sequence[str], num_classes: int | None
) -> Iterator[str]:
    if ignored:
        yield f"{counted(len(ignored), 'other file')} left out ({shown(ignored, _MAX_BAD_NAMES)})"
    disorder = None if num_classes is None else first_out_of_order(names)
    if disorder:
        yield (
            f"sorted by name {disorder[0]!r} comes before {disorder[1]!r}: dimo compare pairs "
            "images by position, in that order; pad the numbers with zeros"
        )


def _group(pairs: Iterable[tuple[K, str]]) -> dict[K, list[str]]:
    groups: dict[K, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups


def _images(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'image')} ({shown(names)})"


@dataclass(frozen=True)
class Content:
    """The images of one row of a table.

    Attributes:
        images_sha256: Over the hashes of all images and their labels, in order.
        labels_sha256: Empty without labels.
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


def infos_of(images: Iterable[npt.NDArray[np.uint8]]) -> list[ImageInfo]:
    """Infos of images [H, W, 3] that were made here, hashed as an npz would store them."""
    infos = []
    for pixels in images:
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        height, width, _ = pixels.shape
        infos.append(ImageInfo(digest, height, width, "RGB", "array", None))
    return infos


def content_of(
    infos: Sequence[ImageInfo], labels: Labels | None, *, paths: Sequence[Path] = ()
) -> Content:
    """The content of a row; `paths` were read, none for generated images."""
    copies = len(infos) - len({info.sha256 for info in infos})
    notes = list(_notes(infos, copies)) if paths else []
    return Content(
        content_sha256(infos, labels),
        labels_sha256(labels),
        copies,
        tuple(map(str, paths)),
        tuple(notes),
    )


def _notes(infos: Sequence[ImageInfo], copies: int) -> Iterator[str]:
    if copies:
        yield f"{copies} images are copies of others"
    lossy = Counter(info.codec for info in infos if info.codec in LOSSY_CODECS)
    for codec, count in lossy.items():
        yield f"{count} images are stored with a loss ({codec})"
