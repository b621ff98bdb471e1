"""Labels of a set of images: stored with it, from a rule over names, or from a manifest."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from bench.images.source import Labels, Manifest, Source, counted, shown
from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_bytes
from dimo.util.schema import unique_keys

_MANIFEST_FORM = 'a .csv with the columns file,label or a .json {"000.png": 3, ...}'


def find_labels(sources: Sequence[Source], rule: str) -> tuple[Labels | None, bool]:
    """The label of every image, None if there are no labels; and whether someone gave them.

    Nobody gives those inside npz or WebDataset files, which samplers write.

    Args:
        sources: The set, in order.
        rule: "" (a manifest with the images, else labels inside npz or WebDataset files),
            "none" (no labels), "filename" (the integer after the last `_` of a name:
            000123_207.png), "folder" (see `class_folders`), "cyclic:K" (the image's position in the
            set modulo K) or the path of a manifest.

    Raises: DimoError: Unknown rule, a name without a label, or a manifest that does not fit.
    """
    names = [name for source in sources for name in source.names]
    if rule == "":
        return _labels_that_come_along(sources)
    if rule == "none":
        return None, False
    if rule == "filename":
        return _from_names(names), True
    if rule == "folder":
        return class_folders(names), True
    if match := re.fullmatch(r"cyclic:([1-9]\d{0,8})", rule):
        return _cyclic(names, int(match[1])), True
    if rule.lower().endswith((".csv", ".json")):
        return _from_manifest(read_manifest(Path(rule)), names), True
    allowed = ("none", "filename", "folder", "cyclic:1000", "FILE.csv", "FILE.json")
    raise unknown_name("labels", rule, allowed)


def class_folders(names: Sequence[str]) -> Labels:
    """ImageFolder's rule: the position of an image's folder among the sorted names of all of them.

    Raises: DimoError: An image is in no folder, or in a nested one.
    """
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    bad = [name for name, parts in zip(names, folders, strict=True) if len(parts) != 1]
    if bad:
        raise DimoError(
            f"{len(bad):,} of {len(names):,} images are not in a folder of their class "
            f"({shown(bad)}); allowed: names like n01440764/n01440764_18.JPEG; or give their "
            "labels with --labels"
        )
    known = {folder: label for label, folder in enumerate(sorted(set(folders)))}
    return np.array([known[folder] for folder in folders], dtype=np.int64)


def classes_of(names: Sequence[str], labels: Labels | None) -> tuple[Labels, tuple[str, ...]]:
    """The class of each image and the name of each class.

    They come from `labels`, else from one folder per class, else all images are of one class.

    Raises: DimoError: A negative label, or images in and beside folders or in nested ones.
    """
    if labels is not None:
        if labels.min() < 0:
            raise DimoError(f"label {labels.min()} is not allowed; give labels from 0")
        return labels, tuple(map(str, range(int(labels.max()) + 1)))
    folders = sorted({str(PurePosixPath(name).parent) for name in names})
    if folders == ["."]:
        return np.zeros(len(names), np.int64), ("images",)
    return class_folders(names), tuple(folders)


def parse_label(value: object, where: str) -> int:
    """An integer, or a string of digits, as an int64 label; `where` says in errors whose it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,19}\s*", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        text = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
        raise DimoError(f"{where} has the label {text}; allowed: an integer; correct it")
    return value


def read_manifest(path: Path) -> Manifest:
    try:
        return Manifest(str(path), path.read_bytes())
    except OSError as error:
        raise DimoError(
            f"cannot read {path}: {error.strerror}; allowed: {_MANIFEST_FORM}"
        ) from error


def first_out_of_order(names: Sequence[str]) -> tuple[str, str] | None:
    """Two neighbours that differ only in numbers, which decrease: "10.png", "2.png"."""
    last: tuple[str, str, list[int]] = ("", "", [])  # name, its text, the numbers in it
    for name in names:
        start = name.rfind("/") + 1
        text = name[:start] + re.sub(r"\d+", "#", name[start:])
        numbers = [int(digits) for digits in re.findall(r"\d+", name[start:])]
        if text == last[1] and numbers < last[2]:
            return last[0], name
        last = name, text, numbers
    return None


def _labels_that_come_along(sources: Sequence[Source]) -> tuple[Labels | None, bool]:
    by_source: dict[int, Labels] = {}  # by number of the source
    manifests: dict[str, tuple[Manifest, list[int]]] = {}  # one may stand beside several shards
    for number, source in enumerate(sources):
        given = source.labels()
        if isinstance(given, Manifest):
            manifests.setdefault(given.origin, (given, []))[1].append(number)
        elif given is not None:
            by_source[number] = given
    for manifest, numbers in manifests.values():
        labels = _from_manifest(manifest, [name for n in numbers for name in sources[n].names])
        ends = np.cumsum([len(sources[n].names) for n in numbers])
        by_source.update(zip(numbers, np.split(labels, ends[:-1]), strict=True))
    if not by_source:
        return None, False
    bare = [str(source.path) for number, source in enumerate(sources) if number not in by_source]
    if bare:
        raise DimoError(
            f"no labels in {shown(bare)}, but in {counted(len(by_source), 'other path')}; allowed: "
            "in all or in none; add them, or give all with --labels"
        )
    labels = np.concatenate([by_source[number] for number in range(len(sources))])
    return labels, bool(manifests)


def _from_names(names: Sequence[str]) -> Labels:
    matches = [re.search(r"_(\d{1,18})$", PurePosixPath(name).stem) for name in names]
    bad = [name for name, match in zip(names, matches, strict=True) if match is None]
    if bad:
        raise DimoError(
            f"{len(bad):,} of {len(names):,} names do not end in a label ({shown(bad)}); allowed "
            "with --labels filename: names like 000123_207.png; rename them or give a manifest"
        )
    return np.array([int(match[1]) for match in matches if match], dtype=np.int64)


def _cyclic(names: Sequence[str], period: int) -> Labels:
    disorder = first_out_of_order(names)
    if disorder:
        raise DimoError(
            f"--labels cyclic:{period} goes by position, but sorted by name "
            f"{disorder[0]!r} comes before {disorder[1]!r}; pad the numbers with zeros"
        )
    return np.arange(len(names), dtype=np.int64) % period


def _from_manifest(manifest: Manifest, names: Sequence[str]) -> Labels:
    entries = {n.removeprefix(manifest.base): y for n, y in _parse_manifest(manifest).items()}
    known = set(names)
    unknown = [name for name in entries if name not in known]
    if unknown:
        raise DimoError(
            f"{manifest.origin} names {counted(len(unknown), 'file')} not among the images "
            f"({shown(unknown)}); allowed: exactly the images; correct it"
        )
    missing = [name for name in names if name not in entries]
    if missing:
        raise DimoError(
            f"{manifest.origin} has no label for {len(missing):,} of {len(names):,} images "
            f"({shown(missing)}); add them"
        )
    return np.array([entries[name] for name in names], dtype=np.int64)


def _parse_manifest(manifest: Manifest) -> dict[str, int]:
    origin = manifest.origin
    try:
        text = manifest.data.decode("utf-8-sig")
        if origin.lower().endswith(".json"):
            pairs = json.loads(text, object_pairs_hook=unique_keys)
            if not isinstance(pairs, dict):
                raise DimoError(f"{origin} holds no table of labels; allowed: {_MANIFEST_FORM}")
            rows = list(pairs.items())
        else:
            rows = _csv_rows(text, origin)
    except DimoError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:
        raise DimoError(f"cannot read {origin}: {error}; allowed: {_MANIFEST_FORM}") from error
    entries = {name: parse_label(label, f"{name!r} in {origin}") for name, label in rows}
    if len(entries) < len(rows):
        listed = [name for name, _ in rows]
        twice = [name for name in entries if listed.count(name) > 1]
        raise DimoError(f"{origin} names {shown(twice)} more than once; keep one row a file")
    return entries


def _csv_rows(text: str, origin: str) -> list[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    header = list(reader.fieldnames or [])
    if not {"file", "label"} <= set(header):
        raise DimoError(
            f"{origin} has the columns {', '.join(header) or 'none'}; allowed: {_MANIFEST_FORM}"
        )
    return [(row["file"], row["label"]) for row in reader]


def labels_sha256(labels: npt.NDArray[np.int64] | None) -> str:
    """Hash of labels in order; empty without labels."""
    return "" if labels is None else sha256_bytes(labels.astype("<i8").tobytes())
