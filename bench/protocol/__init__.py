"""A protocol: everything a benchmark fixes, read from one TOML file and named by its hash.

What the protocol fixes, the model may not choose. Two results are comparable when, and only when,
their protocols have the same `protocol_sha256`. Each key is explained in `protocols/README.md`.
"""

__all__ = [
    "Detector",
    "Extractor",
    "Images",
    "Metric",
    "Prompts",
    "Protocol",
    "Reference",
    "Scorer",
    "Seeds",
    "Uncertainty",
    "list_protocols",
    "load_protocol",
    "protocol_sha256",
    "protocol_text",
    "validate_file",
]

import os
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from bench.protocol.catalog import ANY, METRICS, NONE, data_dir
from bench.protocol.checks import contradictions
from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_bytes
from dimo.util.schema import Origin, canonical_json, decode, encode

_FORMAT = 1
_NEXT_STEP = "the keys are explained in protocols/README.md"


@dataclass(frozen=True)
class Images:
    """The images to score.

    Attributes:
        resolution: Height and width in pixels; zeros, with prompts only: any.
        channels: 1 or 3.
        num_images: How many images a row of the table stands on.
        labels: `"balanced"`: image i has the label `i % num_classes`. `"prompts"`: the labels are
            the numbers of the prompts, and as many images have each.
        num_classes: Number of class labels or prompts.
        uint8: How a value in [0, 255] becomes a byte: to the nearest, or cut off.
    """

    resolution: tuple[int, int]
    channels: int
    num_images: int
    labels: Literal["balanced", "prompts"]
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
class Prompts:
    """The prompts that images are made from.

    Attributes:
        name: An embedded list, or the name of the official file.
        sha256: Of the list in the official form: a line of JSON a prompt
        (`bench.suites.geneval.prompts`),
            or, for a scorer, a JSON text a line (`bench.suites.captions`); or `"any"`.
        images_per_prompt: How many images show each.
        tags: How many prompts there are of each tag.
    """

    name: str
    sha256: str
    images_per_prompt: int
    tags: dict[str, int]


@dataclass(frozen=True)
class Detector:
    """What says which objects are on an image, and in which colours.

    Attributes:
        name: Of `DETECTORS`.
        sha256: Of its weights file, or `"any"`.
        colors: What tells colours apart, in words.
        colors_sha256: Of its weights file, or `"any"`; empty where it has none.
        accuracy: Share of right verdicts on images whose contents are known, by tag; empty: not
            known.
    """

    name: str
    sha256: str
    colors: str
    colors_sha256: str = ""
    accuracy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """What says how well an image fits its prompt.

    Attributes:
        name: Of `SCORERS`.
        sha256: Of its weights file, or `"any"`.
        model: Its network, as open_clip names it; empty where it comes with dimo.
        preprocessing: How images reach its input size, of `PREPROCESSINGS`; empty where it takes
            them as they are.
        version: Of its weights, where there are several; empty where there are not.
        prefix: Comes before each prompt as it is.
        scale: Of the scores, where there is a choice.
    """

    name: str
    sha256: str
    model: str = ""
    preprocessing: str = ""
    version: str = ""
    prefix: str = ""
    scale: str = ""


_NO_EXTRACTOR = Extractor(NONE, ANY)
_NO_REFERENCE = Reference(NONE, ANY, 0)


@dataclass(frozen=True)
class Uncertainty:
    """The bootstrap: number of resamples, seed, and level of the interval (0.95 for 95 %)."""

    n_bootstrap: int
    seed: int
    level: float


@dataclass(frozen=True)
class Protocol:
    """One benchmark. `metrics` are in the order in which tables show them.

    Metrics that a detector decides need `prompts` and `detector`, those of image and prompt
    `prompts` and `scorer`, the others `extractor` and, most of them, `reference`; what no metric
    needs is left out of the file. Beside a detector the other networks come with dimo.
    """

    format: int
    name: str
    version: int
    title: str
    paper: str
    images: Images
    seeds: Seeds
    metrics: tuple[Metric, ...]
    uncertainty: Uncertainty
    extractor: Extractor = _NO_EXTRACTOR
    reference: Reference = _NO_REFERENCE
    prompts: Prompts | None = None
    detector: Detector | None = None
    scorer: Scorer | None = None


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
    for name in ("extractor", "reference", "prompts", "detector", "scorer"):
        part, table = getattr(protocol, name), content.pop(name)
        if part not in (None, _NO_EXTRACTOR, _NO_REFERENCE):
            content[name] = {k: v for k, v in table.items() if v != _default(part, k)}
    content["metrics"] = [
        {"name": metric.name, "higher_is_better": metric.higher_is_better, **metric.params}
        for metric in protocol.metrics
    ]
    return sha256_bytes(canonical_json(content).encode())


def _default(part: Any, key: str) -> Any:
    """What a key of a table is where the file leaves it out; MISSING if it may not."""
    found = next(f for f in fields(part) if f.name == key)
    return found.default if found.default_factory is MISSING else found.default_factory()


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
    problem = next(contradictions(protocol, Path(path).stem), None)
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
    fields = ("name", "higher_is_better")
    optional = [key for key, param in kind.params.items() if param.optional]
    params = [
        key
        for key in kind.params
        if key not in optional or any(other in table for other in optional)
    ]
    for key in table:
        if key not in (*fields, *params):
            raise origin.unknown_key(path, key, [*fields, *kind.params])
    for key in params:
        if key not in table:
            raise origin.error(f"missing key '{path}.{key}' of the metric {table['name']!r}")
        if isinstance(table[key], bool) or not isinstance(table[key], int):
            raise origin.error(f"'{path}.{key}' must be an integer, not {table[key]!r}")
    gathered = {key: table[key] for key in fields if key in table}
    return gathered | {"params": {key: table[key] for key in params}}
