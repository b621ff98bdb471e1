"""Sets of image files -> checked, hashed, turned into features; cached, and sharded over ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bench.features import (
    FORWARD_BATCH,
    Extractor,
    Features,
    extract,
    extract_batches,
    join_features,
)
from bench.features.extraction import FeatureCache, feature_key
from bench.features.stats import FeatureStats, StreamingStats, check_features
from bench.images import (
    Findings,
    ImageSet,
    classes_of,
    content_sha256,
    find_problems,
    open_images,
)
from bench.images.checks import unusable
from bench.images.codec import ImageInfo
from bench.images.labels import labels_sha256
from bench.images.readers import check_labels
from bench.images.source import READ_ERRORS, Labels, counted, reason
from bench.protocol import Images, Protocol
from bench.protocol.catalog import METRICS
from dimo.engine.distributed import Ranks, Runtime
from dimo.errors import DimoError
from dimo.util.files import sha256_file
from dimo.util.terminal import Progress

_READ_AHEAD = 4 * FORWARD_BATCH  # images decoded while the network works on as many


@dataclass(frozen=True, eq=False)
class FeaturesOfSet:
    """A measured set of image files.

    Attributes:
        features: In order of the set; None on every rank but the first.
        images_sha256: Over all images and labels, in order.
        labels_sha256: Empty without labels.
    """

    features: Features | None
    count: int
    images_sha256: str
    labels_sha256: str
    findings: Findings


@dataclass(frozen=True, eq=False)
class RealSet:
    """Images that a reference was made of, with their labels, if known; see `real_images`."""

    images: ImageSet
    infos: Sequence[ImageInfo]
    labels: Labels | None
    side: int | None  # that they are cropped to
    note: str  # for the record


def features_of_paths(
    paths: Sequence[Path],
    spec: Images,
    extractor: Extractor,
    *,
    cache: FeatureCache,
    count: int | None,
    balanced: bool,
    runtime: Runtime,
    recursive: bool = False,
    labels: str = "",
    accept: Callable[[Findings, ImageSet], None] = lambda findings, images: None,
) -> FeaturesOfSet:
    """Reads, checks and extracts a set. Every rank reads a part; the first one gets the result.

    Args:
        paths: Folders or archives: shards of one set, in order.
        cache: Where features of sets extracted before are looked up.
        count: Required number of images; None for any.
        balanced: Whether every class must have as many.
        labels: Where labels come from, see `open_images`.
        accept: Called with findings and set before anything is extracted; refuses by raising.

    Raises: DimoError: The set cannot be read, or is not accepted; on all ranks.
    """
    ranks = runtime.ranks
    images = ranks.synchronized(lambda: open_images(paths, recursive=recursive, labels=labels))
    total = len(images)
    share = ranks.split(total, FORWARD_BATCH)
    meter = _Meter(runtime.progress, ranks, share, total)
    infos, findings = _scan(images, share, spec, ranks, meter, count=count, balanced=balanced)

    def check() -> None:
        if findings.errors:
            raise DimoError("; ".join(findings.errors))
        accept(findings, images)

    ranks.synchronized(check)
    content = content_sha256(infos, images.labels)
    key = feature_key(content, extractor, runtime.device.type)
    features = cache.get(key) if ranks.is_first else None
    if not ranks.all_gather(lambda: features is not None)[0]:
        parts = ranks.all_gather(
            lambda: _extract_share(images, share, extractor, meter.start("features")),
            first_only=True,
        )
        if ranks.is_first:
            features = join_features([part for part in parts if part is not None])
            cache.put(key, features)
    if features is not None:
        features = replace(features, labels=images.labels)
    return FeaturesOfSet(features, total, content, labels_sha256(images.labels), findings)


def read_features(path: Path) -> Features:
    """Precomputed features: an npz with `features` [N, D] and optionally `logits` [N, C], `spatial`
    [N, S] (real numbers, returned as float32) and `labels` int [N].

    Raises: DimoError: Unreadable, no `features`, wrong shapes, or numbers that are not finite.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            keys = sorted(file.files)
            known = ("features", "logits", "spatial", "labels")
            arrays = {key: file[key] for key in known if key in keys}
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
    outputs: dict[str, npt.NDArray[np.float32]] = {}
    for key, array in arrays.items():
        with np.errstate(over="ignore"):  # too large for float32 is found to be infinite
            array = check_features(array, name=f"{key} of {path}").astype(np.float32, copy=False)
        outputs[key] = check_features(array, name=f"{key} of {path} in float32")
        if len(array) != count:
            raise DimoError(
                f"{key} of {path} have {len(array):,} rows, its features {count:,}; allowed: one "
                "row an image in each; make the file again"
            )
    if labels is not None:
        labels = check_labels(labels, count, f"labels of {path}")
    return Features(**outputs, labels=labels)


def features_of_file(path: Path) -> FeaturesOfSet:
    """Features that were extracted elsewhere, from an npz: always off-protocol.

    Raises: DimoError: As `read_features`.
    """
    features = read_features(path)
    reason = f"{path} holds features, which do not say from which images and weights they come"
    count, digest = len(features.features), sha256_file(path)
    return FeaturesOfSet(
        features, count, digest, labels_sha256(features.labels), Findings([], [reason], [], 0)
    )


def scan_real(
    images: ImageSet, spec: Images, runtime: Runtime, *, side: int | None = None
) -> tuple[list[ImageInfo], list[str]]:
    """Reads every byte of real images: infos, and why they cannot be a protocol's reference.

    With `side` photos of any size and kind are cropped to it. The first rank warns of remarks.
    """
    share = runtime.ranks.split(len(images), FORWARD_BATCH)
    meter = _Meter(runtime.progress, runtime.ranks, share, len(images))
    infos, findings = _scan(images, share, spec, runtime.ranks, meter, side=side)
    for note in findings.notes if runtime.ranks.is_first else ():
        runtime.warn(note)
    return infos, [*findings.errors, *findings.nonconforming]


def real_images(
    paths: Sequence[Path],
    protocol: Protocol,
    runtime: Runtime,
    *,
    reference: Path,
    named: Mapping[str, Any],
) -> RealSet:
    """The images that a reference was made of, as it was made of them.

    A reference that does not name its images takes any. Photos are cropped as those of the
    reference were, and where nothing is known of these by ADM's rule.

    Args:
        paths: Folders, with subfolders, or archives: shards of one set, in order.
        reference, named: Its path, and `bench.features.references.images_named_by`.

    Raises: DimoError: They cannot be read, are not of the protocol's size, not those of the
        reference, or have other classes than the protocol.
    """
    where, (height, width) = " ".join(map(str, paths)), protocol.images.resolution
    images = runtime.ranks.synchronized(lambda: open_images(paths, recursive=True))
    labels = _labels_of(images, protocol, where)
    side = height if "crop" in named or (not named and height == width) else None
    infos, problems = scan_real(images, protocol.images, runtime, side=side)
    if problems:
        raise DimoError(
            f"--reference-images {where}: {'; '.join(problems)}; give the images that {reference} "
            "was made of"
        )
    content, known = content_sha256(infos, images.labels), named.get("sha256")
    if known not in (None, content):
        raise DimoError(
            f"--reference-images {where}: {counted(len(images), 'image')} with sha256 "
            f"{content[:12]}..., but {reference} was made of those of {' '.join(named['paths'])} "
            f"with {known[:12]}...; give these, or make a reference of yours: dimo reference"
        )
    whose = "those of the reference" if known else "the reference does not name its images"
    cropped = "" if side is None else f", cropped to {side} (adm)"
    note = f"real images with sha256 {content}{cropped}: {whose}"
    if not known and runtime.ranks.is_first:
        runtime.warn(note)
    return RealSet(images, infos, labels, side, note)


def _labels_of(images: ImageSet, protocol: Protocol, where: str) -> Labels | None:
    """Given labels, else those of class folders, else None."""
    expected = protocol.images.num_classes
    labels, names = classes_of(images.names, images.labels)
    if images.labels is None and names == ("images",) and expected > 1:
        asking = [m.name for m in protocol.metrics if METRICS[m.name].uses_labels]
        if asking:
            raise DimoError(
                f"--reference-images {where}: images without labels, which {asking[0]} needs; put "
                "them in one folder per class, or add labels.csv"
            )
        return None
    if len(names) > expected or (images.labels is None and len(names) < expected):
        raise DimoError(
            f"--reference-images {where}: {len(names):,} classes; allowed under protocol "
            f"{protocol.name!r}: {expected:,}; give one folder per class"
        )
    return labels


def statistics_of_images(
    images: ImageSet,
    spec: Images,
    extractor: Extractor,
    *,
    keep: int,
    runtime: Runtime,
    side: int | None = None,
) -> tuple[dict[str, FeatureStats], npt.NDArray[np.float32], str] | None:
    """Mean and covariance of a set of any size, in memory that does not grow with it.

    `keep` is the number of images, spread evenly over the set, whose features are kept; `side` as
    of `scan_real`. Returns statistics by the names of `Extractor.summarized`, features float32
    [keep, D] and the content hash; None on every rank but the first.

    Raises: DimoError: The set cannot be read, is off-protocol, or has fewer than `keep` images.
    """
    ranks = runtime.ranks
    infos, problems = scan_real(images, spec, runtime, side=side)
    if problems and side is None and spec.resolution[0] == spec.resolution[1]:
        problems.append(
            f"photos of any size and kind are taken with --centre-crop {spec.resolution[0]}"
        )
    if len(images) < keep:
        problems.append(f"{len(images):,} images; allowed: {keep:,} or more")
    if problems:
        raise DimoError(f"not a reference for this protocol: {'; '.join(problems)}")
    kept = {len(images) * row // keep for row in range(keep)}
    share = ranks.split(len(images), FORWARD_BATCH)
    meter = _Meter(runtime.progress, ranks, share, len(images))
    shares = ranks.all_gather(
        lambda: _accumulate(images, share, extractor, kept, meter.start("features"), side),
        first_only=True,
    )
    if not ranks.is_first:
        return None
    totals: dict[str, StreamingStats] = {}
    for parts, _ in shares:  # a rank without images has none
        for output, part in parts.items():
            totals.setdefault(output, StreamingStats(part.extractor, part.dim)).merge(part)
    rows = [block for _, blocks in shares for block in blocks]
    stats = {output: total.finalize() for output, total in totals.items()}
    return stats, np.concatenate(rows), content_sha256(infos, images.labels)


def _accumulate(
    images: ImageSet,
    share: range,
    extractor: Extractor,
    kept: Set[int],
    on_done: Callable[[int], None],
    side: int | None,
) -> tuple[dict[str, StreamingStats], list[npt.NDArray[np.float32]]]:
    totals: dict[str, StreamingStats] = {}
    rows: list[npt.NDArray[np.float32]] = []
    place = share.start
    batches = ((batch, None) for batch in images.batches(share, _READ_AHEAD, side=side))
    for outputs in extract_batches(extractor, batches):
        for output, values in extractor.summarized(outputs).items():
            empty = StreamingStats(extractor.identity, values.shape[1])
            totals.setdefault(output, empty).update(values)
        features = outputs["features"].cpu().numpy()
        chosen = [row for row in range(len(features)) if place + row in kept]
        rows.append(features[chosen])
        place += len(features)
        on_done(place - share.start)
    return totals, rows


def _scan(
    images: ImageSet,
    share: range,
    spec: Images,
    ranks: Ranks,
    meter: "_Meter",
    *,
    count: int | None = None,
    balanced: bool = False,
    side: int | None = None,
) -> tuple[list[ImageInfo], Findings]:
    """Reads every byte once: image infos, and what is wrong with the set.

    Labels that the protocol has no use for are removed from the set. With `side` size, kind and
    codec of the images do not matter: they are cropped to it.
    """
    unused = ""
    if balanced and not images.labels_given:
        unused = unusable(images.labels, spec.num_classes)
    if unused or (balanced and spec.num_classes == 1):
        images.labels = None
    lossy = side is not None
    scans = ranks.all_gather(lambda: images.scan(share, meter.start("read"), lossy=lossy))
    infos = [info for scan in scans for info in scan]
    if side is not None:
        infos = [replace(i, height=side, width=side, mode="RGB", codec="array") for i in infos]
    findings = find_problems(
        infos,
        images.labels,
        names=images.names,
        ignored=images.ignored,
        count=len(images) if count is None else count,
        resolution=spec.resolution,
        channels=spec.channels,
        num_classes=spec.num_classes if balanced and spec.num_classes > 1 else None,
        balanced=balanced,
        unused=unused,
    )
    return infos, findings


def _extract_share(
    images: ImageSet, share: range, extractor: Extractor, on_done: Callable[[int], None]
) -> Features | None:
    if not share:
        return None

    def batches() -> Iterator[tuple[Tensor, None]]:
        done = 0
        for batch in images.batches(share, _READ_AHEAD):
            yield batch, None
            done += len(batch)
            on_done(done)

    return extract(extractor, batches(), count=len(share))


class _Meter:
    """Turns this rank's counts into progress of the whole set, shown by the first rank."""

    def __init__(self, progress: Progress, ranks: Ranks, share: range, total: int) -> None:
        self.progress, self.ranks, self.share, self.total = progress, ranks, share, total

    def start(self, what: str) -> Callable[[int], None]:
        """A function to call with how many of this rank's images are done."""

        def on_done(done: int) -> None:
            if self.ranks.is_first and self.share:
                self.progress(what, self.total * done // len(self.share), self.total, "images")

        return on_done
