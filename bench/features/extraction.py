"""Batches of images -> the features of a whole set, in order; and the cache of such features."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bench.features.stats import full_float32
from dimo.errors import DimoError
from dimo.util.files import at_home, replacing, sha256_bytes, sha256_file, user_home, write_atomic
from dimo.util.schema import canonical_json

A = TypeVar("A", Tensor, npt.NDArray[np.float32])
T = TypeVar("T")

FORWARD_BATCH = 32
"""Images in each forward of a network: fixed, as the last digits of features depend on it."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """A loaded extractor.

    Attributes:
        name: Its name in `EXTRACTORS`, or "package.module:attribute".
        resize: How images reach its input size; empty where it takes them as they are.
        network: uint8 images [B, 3, H, W] -> dict with each of `outputs`, float [B, *].
        sha256: Hash of the weights file, of custom code with that of the code; empty without both.
        packages: Name -> version of what computes the features.
        outputs: "features", and "logits" or "spatial" if it has them.
        image_size: The only height and width it takes; None for any.
        columns: Of an extractor of several networks: the columns of "features" that each gives.
    """

    name: str
    resize: str
    network: nn.Module
    sha256: str
    packages: dict[str, str]
    outputs: tuple[str, ...]
    device: torch.device
    image_size: tuple[int, int] | None = None
    columns: Mapping[str, slice] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Name and resize in one text: features of two identities never mix."""
        return f"{self.name}, {self.resize}" if self.resize else self.name

    def summarized(self, outputs: Mapping[str, A]) -> dict[str, A]:
        """Arrays [N, D] with a mean and covariance of their own: "spatial" if there is any, and
        "features" or, of several networks, those of each by its name.
        """
        found = {name: outputs[name] for name in ("features", "spatial") if name in outputs}
        if self.columns:
            whole: Any = found.pop("features")
            found |= {name: whole[:, columns] for name, columns in self.columns.items()}
        return found


class Networks(nn.Module):
    """uint8 images [B, 3, H, W] -> the features of several networks side by side.

    Each network gives features [B, `width`]; `columns` says which are whose.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.columns, start = dict[str, slice](), 0
        for name, network in networks.items():
            width: Any = network.width
            self.columns[name] = slice(start, start + width)
            start += width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = [network(images)["features"].float() for network in self.networks.values()]
        return {"features": torch.cat(found, 1)}


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one set of images: float32 [N, D], logits [N, C], sFID's `spatial` [N, 2023], and
    int64 labels [N]; None for what the extractor or the set does not have.
    """

    features: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None = None
    spatial: npt.NDArray[np.float32] | None = None
    labels: npt.NDArray[np.int64] | None = None


@torch.inference_mode()
def extract(
    extractor: Extractor,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    count: int | None = None,
    first: int = 0,
) -> Features:
    """Features of all images, in order, in full float32.

    Args:
        batches: (uint8 images [B, 3, H, W], labels [B] or None), of any B.
        count: How many images there will be, if known: saves a copy of all features.
        first: Number of the first image in its set, for errors.

    Raises: DimoError: No images, another number than `count`, or as `extract_batches`.
    """
    labels: list[Tensor | None] = []
    columns = {output: _Column(count) for output in extractor.outputs}
    done = 0
    for outputs in extract_batches(extractor, batches, labels, first):
        for output, values in outputs.items():
            columns[output].append(values)
        done += len(outputs["features"])
    if done == 0 or (count is not None and done != count):
        raise DimoError(
            f"got {done} images for extractor {extractor.name!r}; allowed: "
            f"{'at least 1' if count is None else count}; check the set of images"
        )
    known = [batch for batch in labels if batch is not None]
    assert len(known) in (0, len(labels)), "only some batches have labels"
    return Features(
        **{output: column.join() for output, column in columns.items()},
        labels=torch.cat(known).cpu().numpy() if known else None,
    )


def join_features(parts: Sequence[Features]) -> Features:
    """Features of several sets as one set, in order, without labels."""

    def join(output: str) -> npt.NDArray[np.float32] | None:
        arrays = [getattr(part, output) for part in parts]
        if len(arrays) == 1 or arrays[0] is None:
            return arrays[0]  # type: ignore[no-any-return]
        return np.concatenate(arrays)

    features = join("features")
    assert features is not None
    return Features(features, join("logits"), join("spatial"), None)


@torch.inference_mode()
def extract_batches(
    extractor: Extractor,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    labels: list[Tensor | None] | None = None,
    first: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Outputs float32 [b, *] of all images in order, b at most `FORWARD_BATCH`.

    `batches` and `first` as in `extract`; `labels` collects the labels of each batch.

    Raises: DimoError: Images that the extractor does not take, or features that are not finite.
    """
    done = first
    for images in _rebatch(_images(batches, extractor, [] if labels is None else labels)):
        yield _forward(extractor, images, done)
        done += len(images)


def _images(
    batches: Iterable[tuple[Tensor, Tensor | None]],
    extractor: Extractor,
    labels: list[Tensor | None],
) -> Iterator[Tensor]:
    """The images of each batch, checked; its labels are appended to `labels`."""
    size = extractor.image_size
    for images, batch_labels in batches:
        assert images.dtype == torch.uint8
        assert images.shape[1:2] == (3,)
        height, width = images.shape[2:]
        size = size or (height, width)
        if (height, width) != size:
            raise DimoError(
                f"extractor {extractor.name!r} got images of {height} x {width} pixels; allowed "
                f"here: {size[0]} x {size[1]}; give images of that size"
            )
        labels.append(batch_labels)
        yield images


def _rebatch(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same images in batches of `FORWARD_BATCH`; the last may be smaller."""
    waiting: Tensor | None = None
    for images in batches:
        waiting = images if waiting is None else torch.cat([waiting, images])
        while len(waiting) >= FORWARD_BATCH:
            yield waiting[:FORWARD_BATCH]
            waiting = waiting[FORWARD_BATCH:]
    if waiting is not None and len(waiting):
        yield waiting


def _forward(extractor: Extractor, images: Tensor, done: int) -> dict[str, Tensor]:
    """float32 outputs of up to `FORWARD_BATCH` images, after `done` others."""
    count = len(images)
    images = images.to(extractor.device)
    if count < FORWARD_BATCH:
        filler = images.new_zeros(FORWARD_BATCH - count, *images.shape[1:])
        images = torch.cat([images, filler])
    with _full_precision():
        given = extractor.network(images)
    outputs = {}
    for output in extractor.outputs:
        if output not in given:
            raise DimoError(
                f"extractor {extractor.name!r} gave no {output!r}, only {', '.join(given)}; "
                "mend its network or its list of outputs"
            )
        values = given[output][:count].float()
        finite = values.isfinite().flatten(1).all(1)
        if not finite.all():
            raise DimoError(
                f"extractor {extractor.name!r} gave {output} that are not finite, first for image "
                f"{done + int(finite.int().argmin())}; check the weights file"
            )
        outputs[output] = values
    return outputs


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 in products and convolutions, and always the same algorithm."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with full_float32(), flags:
        yield


def embed(items: Iterable[T], network: Callable[[list[T]], Tensor]) -> npt.NDArray[np.float32]:
    """Embeddings [N, D] of images or texts, `FORWARD_BATCH` in each forward of the network."""
    iterator = iter(items)
    parts = []
    while batch := list(islice(iterator, FORWARD_BATCH)):
        parts.append(network(batch).float().cpu().numpy())
    return np.concatenate(parts)


class _Column:
    """Rows of one output: written into place if their number is known, else collected in a list."""

    def __init__(self, count: int | None) -> None:
        self.count, self.done = count, 0
        self.parts: list[npt.NDArray[np.float32]] = []

    def append(self, values: Tensor) -> None:
        rows = values.cpu().numpy()
        if self.count is None:
            self.parts.append(rows)
            return
        if not self.parts:
            self.parts.append(np.empty((self.count, *rows.shape[1:]), dtype=np.float32))
        room = self.parts[0][self.done : self.done + len(rows)]
        room[:] = rows[: len(room)]
        self.done += len(rows)

    def join(self) -> npt.NDArray[np.float32]:
        return self.parts[0] if self.count is not None else np.concatenate(self.parts)


_OUTPUTS = ("features", "logits", "spatial")


def cache_folder(given: str = "") -> Path | None:
    """The folder of cached features: `given`, or None for "none".

    The default is `$DIMO_CACHE`, else `dimo/features` in `$XDG_CACHE_HOME` (`~/.cache`).
    """
    given = given or os.environ.get("DIMO_CACHE", "")
    if given == "none":
        return None
    if given:
        return at_home(given)
    base = os.environ.get("XDG_CACHE_HOME") or user_home() / ".cache"
    return Path(base) / "dimo" / "features"


def feature_key(content_sha256: str, extractor: Extractor, device: str) -> str:
    """Hash of all that determines features.

    `content_sha256` is that of the images, in order; `device` is "cpu" or "cuda", whose last digits
    differ.
    """
    parts: Mapping[str, object] = {
        "images": content_sha256,
        "extractor": extractor.name,
        "resize": extractor.resize,
        "weights": extractor.sha256,
        "packages": extractor.packages,
        "device": device,
    }
    return sha256_bytes(canonical_json(parts).encode())


class FeatureCache:
    """A folder of feature files; None disables it. Problems with it cost time, never a result.

    An entry is `KEY.npz` and `KEY.json`, which holds the hash of the former, so that a truncated
    or altered entry is detected and extracted again. `say` is called with one-line warnings.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say

    def get(self, key: str) -> Features | None:
        """The features of an intact entry, else None. Labels are not cached."""
        if self.folder is None:
            return None
        data, seal = self.folder / f"{key}.npz", self.folder / f"{key}.json"
        if not data.is_file() and not seal.is_file():
            return None
        try:
            if json.loads(seal.read_text())["sha256"] == sha256_file(data):
                with np.load(data, allow_pickle=False) as file:
                    return Features(**{output: file[output] for output in file.files})
            reason = "its content is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"it cannot be read ({type(error).__name__})"
        self.say(f"cache entry {data} is left out, {reason}; extracting again")
        return None

    def put(self, key: str, features: Features) -> None:
        """Stores features atomically; warns if the disk is full or the folder is read-only."""
        if self.folder is None:
            return
        arrays = {k: a for k in _OUTPUTS if (a := getattr(features, k)) is not None}
        path = self.folder / f"{key}.npz"
        try:
            with replacing(path) as temporary:
                with temporary.open("wb") as file:
                    np.savez(file, **arrays)
                digest = sha256_file(temporary)
            write_atomic(path.with_suffix(".json"), json.dumps({"sha256": digest}) + "\n")
        except DimoError as error:
            self.say(f"features are not cached (scores are not affected): {error}; see --cache")
