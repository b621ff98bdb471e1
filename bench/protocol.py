"""A protocol: everything a benchmark fixes, read from one TOML file and named by its hash.

What the protocol fixes, the model may not choose. Two results are comparable when, and only when,
their protocols have the same `protocol_sha256`. Each key is explained in `protocols/README.md`.
"""

__all__ = [
    "Extractor",
    "Images",
    "Metric",
    "Protocol",
    "Reference",
    "Seeds",
    "Uncertainty",
    "list_protocols",
    "load_protocol",
    "protocol_sha256",
    "protocol_text",
    "validate_file",
]

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.catalog import ANY, EXTRACTORS, METRICS
from bench.paths import data_dir
from dimo.errors import DimoError, unknown_name
from dimo.files import sha256_bytes
from dimo.strict import Origin, canonical_json, decode, encode

_FORMAT = 1
_NEXT_STEP = "the keys are explained in protocols/README.md"


@dataclass(frozen=True)
class Images:
    """The images to score.

    Attributes:
        resolution: Height and width in pixels.
        channels: 1 or 3.
        num_images: How many images a row of the table stands on.
        labels: `"balanced"`: image i has the label `i % num_classes`.
        num_classes: Number of class labels.
        uint8: How a value in [0, 255] becomes a byte: to the nearest, or cut off.
    """

    resolution: tuple[int, int]
    channels: int
    num_images: int
    labels: Literal["balanced"]
    num_classes: int
    uint8: Literal["round", "floor"]


@dataclass(frozen=True)
class Seeds:
    """Seeds of the images: `report` for the numbers shown, `select` for choosing settings.

    Attributes:
        report: Seed of the `num_images` images that are reported.
        select: Seed of the images on which sampler settings are chosen; never the same.
        n_select: How many images a choice of settings is made on.
    """

    report: int
    select: int
    n_select: int


@dataclass(frozen=True)
class Extractor:
    """The network that turns images into features.

    Attributes:
        name: Of `EXTRACTORS`, or `"package.module:attribute"` for code of one's own.
        sha256: Of its weights file, or `"any"`.
        resize: How images reach its input size; empty where it takes them as they are.
    """

    name: str
    sha256: str
    resize: str = ""


@dataclass(frozen=True)
class Reference:
    """What is compared with.

    Attributes:
        name: An embedded set, or the name of the file that `--reference` gives.
        sha256: Of an embedded set's images or of that file, or `"any"`.
        count: How many reference images neighbours and kernels are compared with.
        statistics_count: The file's own mean and covariance, of that many images, are the
            reference of Frechet distances; None: they are computed from all images given.
        source: Where the file comes from, in words or as a URL.
    """

    name: str
    sha256: str
    count: int
    statistics_count: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Metric:
    """One metric, its direction and its parameters, as `METRICS` lists them."""

    name: str
    higher_is_better: bool
    params: dict[str, int]


@dataclass(frozen=True)
class Uncertainty:
    """The bootstrap: number of resamples, seed, and level of the interval (0.95 for 95 %)."""

    n_bootstrap: int
    seed: int
    level: float


@dataclass(frozen=True)
class Protocol:
    """One benchmark. `metrics` are in the order in which tables show them."""

    format: int
    name: str
    version: int
    title: str
    paper: str
    images: Images
    seeds: Seeds
    extractor: Extractor
    reference: Reference
    metrics: tuple[Metric, ...]
    uncertainty: Uncertainty


def load_protocol(name_or_path: str | os.PathLike[str]) -> Protocol:
    """Reads a shipped protocol by name, or any `.toml` file by its path.

    Raises:
        DimoError: The name is unknown, or the file is not a valid protocol.
    """
    return validate_file(_find(name_or_path))


def list_protocols() -> list[Protocol]:
    """Every shipped protocol, sorted by name."""
    return [validate_file(path) for _, path in sorted(_shipped().items())]


def protocol_sha256(protocol: Protocol) -> str:
    """Hex SHA-256 of what the protocol says.

    Comments, layout and the order of keys do not matter; any value does, and so does the order of
    the metrics. A key that a later version adds must be left out of the hashed text where a file
    does not give it, or old results would lose their protocol.
    """
    content = encode(protocol)
    for name, default in (("extractor", Extractor("", "")), ("reference", Reference("", "", 0))):
        content[name] = {
            key: value
            for key, value in content[name].items()
            if key in ("name", "sha256", "count") or value != getattr(default, key)
        }
    content["metrics"] = [
        {"name": metric.name, "higher_is_better": metric.higher_is_better, **metric.params}
        for metric in protocol.metrics
    ]
    return sha256_bytes(canonical_json(content).encode())


def protocol_text(name_or_path: str | os.PathLike[str]) -> str:
    """The protocol's file as it is, comments included, after checking that it is valid.

    Raises:
        DimoError: As `load_protocol`.
    """
    path = _find(name_or_path)
    validate_file(path)
    return path.read_text(encoding="utf-8")


def validate_file(path: str | os.PathLike[str]) -> Protocol:
    """Reads one file strictly.

    Raises:
        DimoError: The file cannot be read or is no TOML, a key is unknown, missing or of another
            type, or values contradict one another. The message names the file and the key.
    """
    origin = Origin(str(path), _NEXT_STEP)
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DimoError(
            f"cannot read {path}: {error.strerror}; list the protocols with: dimo protocols list"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise origin.error(f"not valid TOML: {error}") from error
    _check_format(data, origin)
    if isinstance(data.get("metrics"), list):
        data["metrics"] = [
            _gather_params(table, f"metrics[{index}]", origin)
            for index, table in enumerate(data["metrics"])
        ]
    protocol = decode(Protocol, data, origin)
    problem = next(_contradictions(protocol, Path(path).stem), None)
    if problem is not None:
        raise origin.error(problem)
    return protocol


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in data_dir("protocols").glob("*.toml")}


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    text = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or text.endswith(".toml") or os.sep in text:
        return Path(text)
    shipped = _shipped()
    if text not in shipped:
        raise unknown_name(
            "protocol",
            text,
            shipped,
            "or give the path of a .toml file; list them with: dimo protocols list",
        )
    return shipped[text]


def _check_format(data: dict[str, Any], origin: Origin) -> None:
    found = data.get("format")
    if "format" in data and (isinstance(found, bool) or found != _FORMAT):
        raise origin.error(f"'format' must be {_FORMAT}, the one this dimo reads, not {found!r}")


def _gather_params(table: Any, path: str, origin: Origin) -> Any:
    """A `[[metrics]]` table -> the fields of `Metric`; anything ill-typed is left to `decode`."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        return table
    if table["name"] not in METRICS:
        problem = unknown_name(f"'{path}.name'", table["name"], METRICS)
        raise origin.error(str(problem))
    kind = METRICS[table["name"]]
    params = kind.params
    if any(key in table for key in kind.optional):
        params += kind.optional
    fields = ("name", "higher_is_better")
    for key in table:
        if key not in fields + params:
            raise origin.unknown_key(path, key, list(fields + kind.params + kind.optional))
    for key in params:
        if key not in table:
            raise origin.error(f"missing key '{path}.{key}' of the metric {table['name']!r}")
        if isinstance(table[key], bool) or not isinstance(table[key], int):
            raise origin.error(f"'{path}.{key}' must be an integer, not {table[key]!r}")
    gathered = {key: table[key] for key in fields if key in table}
    return gathered | {"params": {key: table[key] for key in params}}


def _contradictions(protocol: Protocol, stem: str) -> Iterator[str]:
    """What is wrong with well-typed values, one line each."""
    images, seeds, reference = protocol.images, protocol.seeds, protocol.reference
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", protocol.name):
        yield f"'name' must be lower-case words joined by '-', not {protocol.name!r}"
    if protocol.name != stem:
        yield f"'name' is {protocol.name!r} but the file is named {stem!r}; make them the same"
    for path, value, lowest in (
        ("version", protocol.version, 1),
        ("images.resolution", min(images.resolution), 1),
        ("images.num_images", images.num_images, 2),
        ("images.num_classes", images.num_classes, 1),
        ("seeds.report", seeds.report, 0),
        ("seeds.select", seeds.select, 0),
        ("seeds.n_select", seeds.n_select, 2),
        ("reference.count", reference.count, 2),
        ("reference.statistics_count", reference.statistics_count or 2, 2),
        ("uncertainty.n_bootstrap", protocol.uncertainty.n_bootstrap, 2),
        ("uncertainty.seed", protocol.uncertainty.seed, 0),
    ):
        if value < lowest:
            yield f"'{path}' must be at least {lowest}, not {value}"
    if images.channels not in (1, 3):
        yield f"'images.channels' must be 1 or 3, not {images.channels}"
    for path, count in (
        ("images.num_images", images.num_images),
        ("seeds.n_select", seeds.n_select),
    ):
        if count % images.num_classes:
            yield (
                f"'{path}' is {count}, not a multiple of 'images.num_classes' "
                f"({images.num_classes}), which balanced labels need"
            )
    if seeds.report == seeds.select:
        yield (
            f"'seeds.select' must differ from 'seeds.report' ({seeds.report}): settings are not "
            "chosen on the images that are reported"
        )
    for path, digest in (
        ("extractor.sha256", protocol.extractor.sha256),
        ("reference.sha256", reference.sha256),
    ):
        if digest != ANY and not re.fullmatch(r"[0-9a-f]{64}", digest):
            yield f"'{path}' must be 64 lower-case hex digits or {ANY!r}, not {digest[:80]!r}"
    if not 0 < protocol.uncertainty.level < 1:
        yield f"'uncertainty.level' must be between 0 and 1, not {protocol.uncertainty.level}"
    if not protocol.metrics:
        yield "'metrics' must name at least one metric"
    yield from _extractor_contradictions(protocol.extractor)
    yield from _metric_contradictions(protocol)


def _metric_contradictions(protocol: Protocol) -> Iterator[str]:
    num_images = protocol.images.num_images
    ranges = {  # of each parameter, both ends included
        "k": (1, min(num_images, protocol.reference.count) - 1),
        "splits": (1, num_images),
        "subsets": (1, 10_000),
        "subset_size": (2, min(num_images, protocol.reference.count)),
        "blocks": (1, num_images),
        "block_size": (2, min(num_images, protocol.reference.count)),
        "seed": (0, 2**32 - 1),
    }
    outputs = EXTRACTORS[protocol.extractor.name].outputs if _is_known(protocol.extractor) else None
    seen: set[str] = set()
    for index, metric in enumerate(protocol.metrics):
        path, kind = f"metrics[{index}]", METRICS[metric.name]
        if metric.name in seen:
            yield f"'{path}.name' repeats {metric.name!r}"
        seen.add(metric.name)
        if metric.higher_is_better != kind.higher_is_better:
            right = str(kind.higher_is_better).lower()
            yield f"'{path}.higher_is_better' must be {right} for {metric.name!r}"
        if outputs is not None and kind.needs not in outputs:
            yield (
                f"'{path}.name' is {metric.name!r}, which needs {kind.needs}; the extractor "
                f"{protocol.extractor.name!r} gives {', '.join(outputs)}"
            )
        used = metric.params.get("blocks", 1) * metric.params.get("block_size", 0)
        if used > min(num_images, protocol.reference.count):
            yield (
                f"'{path}' uses {used} images of each side; there are {num_images} generated "
                f"and {protocol.reference.count} reference ones"
            )
        for key, value in metric.params.items():
            low, high = ranges[key]
            if not low <= value <= high:
                yield f"'{path}.{key}' must be from {low} to {high}, not {value}"
    neighbours = [metric.params for metric in protocol.metrics if "k" in metric.params]
    if any(params != neighbours[0] for params in neighbours):
        yield "'k', 'blocks', 'block_size' and 'seed' must be the same for every metric with a 'k'"


def _extractor_contradictions(extractor: Extractor) -> Iterator[str]:
    if not _is_known(extractor):
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", extractor.name):
            allowed = [*EXTRACTORS, "package.module:attribute"]
            yield str(unknown_name("'extractor.name'", extractor.name, allowed))
        elif extractor.resize:
            yield "'extractor.resize' must be left out: code of one's own resizes by itself"
        return
    resizes = EXTRACTORS[extractor.name].resizes
    if resizes and extractor.resize not in resizes:
        yield str(unknown_name("'extractor.resize'", extractor.resize, resizes))
    if not resizes and extractor.resize:
        yield f"'extractor.resize' must be left out: {extractor.name!r} takes images as they are"


def _is_known(extractor: Extractor) -> bool:
    return extractor.name in EXTRACTORS
