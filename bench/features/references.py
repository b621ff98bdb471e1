"""References of protocols: a bundled set, a statistics file of any tool, or images."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.features import Extractor, Features, extract, load_extractor
from bench.features.pipeline import read_features, statistics_of_images
from bench.features.stats import FeatureStats, compute_stats, load_stats, save_stats, stats_key
from bench.images import ImageSet, classes_of, npz_keys, open_images
from bench.images.source import READ_ERRORS
from bench.protocol import (
    Protocol,
    draft_protocol,
    protocol_sha256,
    protocol_toml,
    validate_file,
)
from bench.protocol.catalog import ANY, BUNDLED_REFERENCES, METRICS, load
from dimo.data import scenes
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError
from dimo.util.files import sha256_bytes, sha256_file, write_atomic
from dimo.util.schema import canonical_json

_OTHER_FILES = {
    ".npy": "a single array",
    **dict.fromkeys((".pt", ".pth", ".pkl", ".pickle"), "a file of PyTorch or Python"),
}
_ALLOWED = (
    "allowed: an .npz with mu [D] and sigma [D, D], with features [N, D] or with images uint8 "
    "[N, H, W, 3] in arr_0; or a folder, .zip or .tar of images"
)
_SCENES_SEED = 4000  # of no other pictures: 1000 is reported, 2000 selects, 3000 tests the detector
_SCENES_COUNT = 4800  # 20 of each held-out prompt


def scenes_held_out() -> tuple[Tensor, Tensor]:
    """Images uint8 [4800, 3, 32, 32] of the held-out prompts, and their prompts' numbers."""
    return scenes.batch(_SCENES_SEED, torch.arange(_SCENES_COUNT), "held-out")


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """A loaded reference.

    Attributes:
        name: As in the protocol.
        sha256: Hash of the bundled images, of the file, or of the images' content.
        stats: Mean and covariance, for Frechet distances, by the names of `Extractor.summarized`.
        features: Features of single images, for neighbours and kernels; None if no metric needs
            them, and on every rank but the first.
        count: Number of single images; None if no metric needs them.
        columns: Of the extractor.
    """

    name: str
    sha256: str
    stats: dict[str, FeatureStats]
    features: Features | None
    count: int | None
    columns: Mapping[str, slice] = field(default_factory=dict)


ExtractPaths = Callable[[list[Path]], tuple[Features | None, str, int]]  # content hash, count


def reference_sha256(images: Tensor) -> str:
    """Hash of the shape and bytes of uint8 images [N, 3, H, W]."""
    images = images.cpu().contiguous()
    assert images.dtype == torch.uint8
    return sha256_bytes(repr(tuple(images.shape)).encode() + images.numpy().tobytes())


def reference_images(protocol: Protocol) -> tuple[Tensor, Tensor]:
    """A bundled reference: images uint8 [N, 3, H, W] and labels int64 [N].

    Raises: DimoError: The protocol's reference is not bundled, or its hash or count differs.
    """
    expected = protocol.reference
    if expected.name not in BUNDLED_REFERENCES:
        where = f" ({expected.source})" if expected.source else ""
        raise DimoError(
            f"protocol {protocol.name!r} compares with {expected.name}{where}, which does not "
            "come with dimo; give it with --reference FILE"
        )
    images, labels = load(BUNDLED_REFERENCES[expected.name])()
    digest = reference_sha256(images)
    if (digest, len(images)) != (expected.sha256, expected.count):
        raise DimoError(
            f"reference {expected.name!r} has sha256 {digest[:12]}... and {len(images)} images, "
            f"the protocol names {expected.sha256[:12]}... and {expected.count}; install the "
            "packages of constraints.txt, or use the protocol's version that fits"
        )
    return images, labels


def bundled_reference(protocol: Protocol, extractor: Extractor) -> ReferenceSet:
    """The protocol's bundled reference in the features of `extractor`."""
    images, labels = reference_images(protocol)
    features = extract(extractor, [(images, labels)], count=len(images))
    expected = protocol.reference
    loaded = ReferenceSet(
        expected.name, expected.sha256, {}, features, len(images), extractor.columns
    )
    return _with_statistics(loaded, protocol, extractor)


def load_reference(
    protocol: Protocol,
    extractor: Extractor,
    *,
    path: Path | None,
    extract_paths: ExtractPaths,
    partly: bool = False,
) -> ReferenceSet:
    """The protocol's reference in the features of `extractor`.

    `path` is a file or folder; None for a bundled reference. `extract_paths` gives features,
    content hash and count of image files. With `partly` a file of statistics is enough.

    Raises: DimoError: It is missing, of another extractor, or lacks what a metric needs.
    """
    if path is None:
        return bundled_reference(protocol, extractor)
    loaded = _from_path(protocol, extractor, path, extract_paths, partly)
    return _with_statistics(loaded, protocol, extractor)


def _with_statistics(
    reference: ReferenceSet, protocol: Protocol, extractor: Extractor
) -> ReferenceSet:
    """Adds the statistics that a Frechet distance needs."""
    if reference.features is None:
        return reference
    arrays = {k: array for k, array in vars(reference.features).items() if array is not None}
    arrays = extractor.summarized(arrays)
    stats = {
        output: compute_stats(arrays[output], extractor=extractor.identity)
        for output in needed_statistics(protocol)
        if output not in reference.stats
    }
    return dataclasses.replace(reference, stats=reference.stats | stats)


def needed_statistics(protocol: Protocol) -> list[str]:
    """What the protocol's Frechet distances need mean and covariance of, each once."""
    needed = [METRICS[metric.name].statistics for metric in protocol.metrics]
    return list(dict.fromkeys(name for names in needed for name in names))


def make_reference(
    paths: Sequence[Path],
    protocol: Protocol,
    out: Path,
    *,
    recursive: bool,
    runtime: Runtime,
    **options: Any,
) -> FeatureStats | None:
    """Writes an npz of `mu`, `sigma`, `n` and features from real images (see `save_stats`).

    Args:
        paths: Folders or archives: shards of one set, in order.
        protocol: Names extractor, resolution and how many single features are kept.
        runtime: Where the extractor runs, and the ranks that share the work.
        **options: `weights`, the extractor's file (None: the shipped one), `allow_code` and `side`,
            to crop photos of any size and kind to, as `bench.images.codec.centre_crop`.

    Returns the statistics; None on every rank but the first.

    Raises: DimoError: The images cannot be read or are not as the protocol requires.
    """
    images = runtime.ranks.synchronized(lambda: open_images(paths, recursive=recursive))
    return _make_reference(images, protocol, out, runtime=runtime, **options)


def _make_reference(
    images: ImageSet,
    protocol: Protocol,
    out: Path,
    *,
    weights: Path | None,
    allow_code: bool,
    side: int | None = None,
    runtime: Runtime,
) -> FeatureStats | None:
    height, width = protocol.images.resolution
    if side is not None and (side, side) != (height, width):
        raise DimoError(
            f"--centre-crop {side}; allowed under protocol {protocol.name!r}, whose images are "
            f"{height} x {width}: "
            + (f"--centre-crop {height}" if height == width else "no crop; leave it out")
        )
    extractor = load_extractor(
        protocol.extractor.name,
        resize=protocol.extractor.resize,
        sha256=protocol.extractor.sha256,
        weights=weights,
        device=runtime.device,
        allow_code=allow_code,
    )
    reference = statistics_of_images(
        images,
        protocol.images,
        extractor,
        keep=protocol.reference.count,
        runtime=runtime,
        side=side,
    )
    if reference is None:
        return None
    stats, features, content = reference
    crop = {} if side is None else {"crop": f"adm {side}"}
    provenance = {
        "dimo": importlib.metadata.version("dimo"),
        "protocol": {"name": protocol.name, "sha256": protocol_sha256(protocol)},
        "extractor": {"name": extractor.identity, "sha256": extractor.sha256},
        "packages": extractor.packages,
        "images": {"paths": list(map(str, images.paths)), "sha256": content, **crop},
        "device": runtime.device.type,
    }
    save_stats(out, stats, features=features, provenance=canonical_json(provenance))
    return next(iter(stats.values()))


def new_protocol(
    paths: Sequence[Path],
    out: Path,
    *,
    extractor: str,
    num_images: int | None = None,
    side: int | None = None,
    runtime: Runtime,
    **options: Any,
) -> Protocol | None:
    """Writes the protocol of a custom data set, and its reference beside it as an .npz.

    Args:
        paths: Folders or archives: shards of one set, with labels or one folder per class.
        out: The .toml file; the reference gets its name.
        extractor, num_images: See `bench.protocol.draft_protocol`.
        side: See `make_reference`.
        **options: `weights` and `allow_code` of `make_reference`.

    Returns the protocol; None on every rank but the first.

    Raises: DimoError: As `make_reference` and `draft_protocol`.
    """
    images = runtime.ranks.synchronized(lambda: open_images(paths, recursive=True))
    height, width = (side, side) if side else images.load(range(1)).shape[-2:]
    draft = draft_protocol(
        out.stem,
        resolution=(height, width),
        num_classes=len(classes_of(images.names, images.labels)[1]),
        num_real=len(images),
        extractor=extractor,
        num_images=num_images,
    )
    path = out.with_suffix(".npz")
    made = _make_reference(images, draft, path, side=side, runtime=runtime, **options)
    if made is None:
        return None
    digests = {"extractor": _made_with(path), "reference": sha256_file(path)}
    named = {
        part: dataclasses.replace(getattr(draft, part), sha256=digest)
        for part, digest in digests.items()
    }
    write_atomic(out, protocol_toml(dataclasses.replace(draft, **named)))
    return validate_file(out)


def _from_path(
    protocol: Protocol,
    extractor: Extractor,
    path: Path,
    extract_paths: ExtractPaths,
    partly: bool,
) -> ReferenceSet:
    name = protocol.reference.name
    if not path.exists():
        raise DimoError(f"no reference at {path}; give a file or a folder that exists")
    if path.suffix.lower() in _OTHER_FILES:
        raise DimoError(
            f"reference {path} is {_OTHER_FILES[path.suffix.lower()]}; {_ALLOWED}; save mean and "
            "covariance with numpy.savez(FILE, mu=..., sigma=...)"
        )
    keys = npz_keys(path)
    has_images = not keys or not {"arr_0", "images"}.isdisjoint(keys)
    first = stats_key("mu", next(iter(extractor.columns), "features"))
    if not has_images and keys.isdisjoint({first, "features"}):
        raise DimoError(
            f"reference {path} holds {', '.join(sorted(keys))}; {_ALLOWED}; save it under these "
            "names, or make it from images: dimo reference IMAGES -o FILE.npz"
        )
    _check_origin(path, keys, extractor)
    stats: dict[str, FeatureStats] = {}
    kinds = {metric.name: METRICS[metric.name] for metric in protocol.metrics}
    outputs = needed_statistics(protocol)
    own_statistics = protocol.reference.statistics_count
    if first in keys and ("arr_0" not in keys or own_statistics is not None):
        stats = load_stats(
            path,
            extractor=extractor.identity,
            count=own_statistics or protocol.reference.count,
            outputs=[o for o in outputs if not partly or stats_key("mu", o) in keys],
        )
    features: Features | None = None
    only_statistics = bool(stats) and not has_images and "features" not in keys
    needing = [
        metric.name
        for metric in protocol.metrics
        if kinds[metric.name].compares_with == "samples"
        and not (metric.supplementary and only_statistics)
    ]
    missing_stats = ["features" if o in extractor.columns else o for o in outputs if o not in stats]
    if not (needing or missing_stats) or (partly and only_statistics):
        return ReferenceSet(name, sha256_file(path), stats, None, None, extractor.columns)
    if "features" in keys:
        features, content = read_features(path), sha256_file(path)
        count = len(features.features)
    elif not has_images:
        raise DimoError(
            f"reference {path} holds {', '.join(sorted(keys))}, but {needing[0]} needs the "
            "features of single images; make a reference with both: dimo reference IMAGES "
            f"--protocol {protocol.name} -o FILE.npz; or leave out what needs them, off-protocol, "
            "with --nonconforming"
        )
    else:
        features, content, count = extract_paths([path])
    for output in (*missing_stats, *(["features"] if needing else [])):
        if features is not None and getattr(features, output) is None:
            raise DimoError(
                f"reference {path} has no {output}, which protocol {protocol.name!r} needs; make "
                "it with dimo reference"
            )
    digest = sha256_file(path) if path.is_file() else content
    return ReferenceSet(name, digest, stats, features, count, extractor.columns)


def _check_origin(path: Path, keys: Collection[str], extractor: Extractor) -> None:
    """Refuses a file that `dimo reference` made with other weights or code of the extractor."""
    if "provenance" not in keys:
        return
    made = _made_with(path)
    if made not in ("", extractor.sha256):
        raise DimoError(
            f"reference {path} was made with other weights or code of {extractor.name!r} (sha256 "
            f"{made[:12]}..., now {extractor.sha256[:12]}...); make it again: dimo reference IMAGES"
        )


def _made_with(path: Path) -> str:
    """SHA-256 of the extractor that a file of `dimo reference` was made with; "" if not known."""
    return str(_provenance(path, "extractor").get("sha256", ""))


def _provenance(path: Path, part: str) -> dict[str, Any]:
    """What a file of `dimo reference` says of "extractor" or "images"; empty if nothing."""
    with suppress(*READ_ERRORS, KeyError, TypeError), np.load(path, allow_pickle=False) as file:
        return dict(json.loads(str(file["provenance"]))[part])
    return {}


def images_named_by(path: Path, reference: ReferenceSet) -> Mapping[str, Any]:
    """What a reference says of the images that it was made of: `paths`, their content's `sha256`,
    and `crop` if they were cropped; empty where it says nothing, as files of other tools.
    """
    if path.is_dir():
        return {"paths": [str(path)], "sha256": reference.sha256}
    return _provenance(path, "images")


def reference_conformity(protocol: Protocol, reference: ReferenceSet) -> list[str]:
    """Why a reference is not the protocol's: its hash, or how many images it has."""
    expected = protocol.reference
    problems = []
    if expected.sha256 not in (ANY, reference.sha256):
        problems.append(
            f"the reference has sha256 {reference.sha256[:12]}..., the protocol names "
            f"{expected.sha256[:12]}... ({expected.name})"
        )
    if reference.count not in (None, expected.count):
        problems.append(
            f"the reference has {reference.count:,} images, the protocol {expected.count:,}"
        )
    elif few := [stats.count for stats in reference.stats.values() if stats.count < expected.count]:
        problems.append(
            f"the reference's statistics are of {few[0]:,} images; allowed: {expected.count:,} or "
            "more"
        )
    return problems
