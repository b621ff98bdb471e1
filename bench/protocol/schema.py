"""The parts of a protocol, and the hash that names it."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from bench.protocol.catalog import ANY, NONE
from dimo.util.files import sha256_bytes
from dimo.util.schema import canonical_json, encode


@dataclass(frozen=True)
class Images:
    """The images to score.

    Attributes:
        resolution: Height and width in pixels; zeros, with prompts only: any.
        channels: 1 or 3.
        labels: `"balanced"`: image i has the label `i % num_classes`. `"prompts"`: the labels are
            the numbers of the prompts, with equally many images each.
        uint8: How a value in [0, 255] becomes a byte.
    """

    resolution: tuple[int, int]
    channels: int
    num_images: int
    labels: Literal["balanced", "prompts"]
    num_classes: int
    uint8: Literal["round", "floor"]


@dataclass(frozen=True)
class Seeds:
    """Seeds of the reported images and, a different one, of the `n_select` images for tuning."""

    report: int
    select: int
    n_select: int


@dataclass(frozen=True)
class Extractor:
    """The network that turns images into features.

    Attributes:
        name: Of `EXTRACTORS`, or `"package.module:attribute"` for custom code.
        sha256: Hash of its weights file, or `"any"`.
        resize: How images reach its input size; empty where it takes them as they are.
    """

    name: str
    sha256: str
    resize: str = ""


@dataclass(frozen=True)
class Reference:
    """The reference images or their statistics.

    Attributes:
        name: A bundled set, or the name of the file that `--reference` gives.
        sha256: Hash of a bundled set's images or of that file, or `"any"`.
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
    """One metric, its direction and its parameters, as `METRICS` lists them.

    A supplementary one was added to a benchmark that has results already. It changes no other
    number, so it is not hashed; its parameters are recorded beside its value.
    """

    name: str
    higher_is_better: bool
    params: dict[str, int]
    supplementary: bool = False


@dataclass(frozen=True)
class Prompts:
    """The prompts that images are made from.

    Attributes:
        name: A bundled list, or the name of the official file.
        sha256: Hash of the list in the official form: one line of JSON per prompt
            (`bench.suites.geneval.prompts`) or, for a scorer, one JSON text per line
            (`bench.suites.captions`); of a model's questions, of the file; or `"any"`.
    """

    name: str
    sha256: str
    images_per_prompt: int
    tags: dict[str, int]


@dataclass(frozen=True)
class Detector:
    """The detector of objects and their colours, or the model that answers questions.

    Attributes:
        name: Of `DETECTORS`.
        sha256: Hash of its weights file, or `"any"`.
        colors: What classifies colours, in words; empty where nothing does.
        colors_sha256: Hash of that classifier's weights, or `"any"`; empty without weights.
        accuracy: Fraction of correct decisions on images of known content by tag, if known.
    """

    name: str
    sha256: str
    colors: str = ""
    colors_sha256: str = ""
    accuracy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """The network that scores how well an image fits its prompt.

    Attributes:
        name: Of `SCORERS`.
        sha256: Hash of its weights file, or `"any"`.
        model: Its network, as open_clip names it; empty where the scorer has one network.
        preprocessing: Of `PREPROCESSINGS`; empty where the network fixes it.
        version: Version of its weights; empty if there is only one.
        scale: Scale of the scores; empty if there is no choice.
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
    needs is left out of the file. With a detector, the other networks must be bundled.
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
    folder: Path | None = field(default=None, init=False, compare=False)  # of its file

    @property
    def reference_file(self) -> Path | None:
        """The reference beside the protocol's file, where `dimo protocols new` puts it."""
        path = None if self.folder is None else self.folder / self.reference.name
        return path if path is not None and path.is_file() else None


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
        if not metric.supplementary
    ]
    return sha256_bytes(canonical_json(content).encode())


def _default(part: Any, key: str) -> Any:
    """Default of a key of a table; MISSING if it is required."""
    declared = next(f for f in fields(part) if f.name == key)
    return declared.default if declared.default_factory is MISSING else declared.default_factory()
