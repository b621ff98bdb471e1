"""Contradictions in a protocol whose values are well typed, and what a quick look may change."""

import re
from collections.abc import Iterator
from dataclasses import replace

from bench.protocol.catalog import ANY, BUNDLED_REFERENCES, METRICS, NONE
from bench.protocol.networks import BUNDLED_PROMPTS, DETECTORS, EXTRACTORS, PREPROCESSINGS, SCORERS
from bench.protocol.schema import Detector, Extractor, Metric, Protocol, Scorer
from dimo.errors import DimoError, unknown_name

_OF_NO_EXTRACTOR = ("detections", "answers", "pairs", "reconstruction")


def contradictions(protocol: Protocol, stem: str) -> Iterator[str]:
    """One line for each contradiction; `stem` is the file's name without `.toml`."""
    images, seeds, reference = protocol.images, protocol.seeds, protocol.reference
    if not re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", protocol.name):
        yield f"'name' must be lower-case words joined by '-' or '.', not {protocol.name!r}"
    if protocol.name != stem:
        yield f"'name' is {protocol.name!r} but the file is named {stem!r}; make them the same"
    for path, value, lowest in (
        ("version", protocol.version, 1),
        ("images.resolution", min(images.resolution), 0 if protocol.prompts else 1),
        ("images.num_images", images.num_images, 2),
        ("images.num_classes", images.num_classes, 1),
        ("seeds.report", seeds.report, 0),
        ("seeds.select", seeds.select, 0),
        ("seeds.n_select", seeds.n_select, 2),
        ("reference.count", reference.count, 0 if reference.name == NONE else 2),
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
    for path, digest in _hashes(protocol):
        if digest != ANY and not re.fullmatch(r"[0-9a-f]{64}", digest):
            yield f"'{path}' must be 64 lower-case hex digits or {ANY!r}, not {digest[:80]!r}"
    if not 0 < protocol.uncertainty.level < 1:
        yield f"'uncertainty.level' must be between 0 and 1, not {protocol.uncertainty.level}"
    if all(metric.supplementary for metric in protocol.metrics):
        yield "'metrics' must name at least one metric that is not supplementary"
    yield from _missing_parts(protocol)
    yield from _extractor_contradictions(protocol.extractor)
    yield from _prompt_contradictions(protocol)
    if protocol.scorer is not None:
        yield from _scorer_contradictions(protocol.scorer, protocol)
    if protocol.detector is not None:
        yield from _detector_contradictions(protocol.detector, protocol)
    yield from _metric_contradictions(protocol)


def check_num_images(protocol: Protocol, count: int) -> None:
    """Refuses a number of images per row that a quick look under a protocol cannot have.

    Raises:
        DimoError: It is not the same for each label or prompt, or too small for a metric.
    """
    images, given = protocol.images, f"--num-images {count} under protocol {protocol.name!r}"
    each, unit = images.num_classes, "prompts" if protocol.prompts else "labels"
    if count < 2 or count % each:
        nearest = max(count // each, -(-2 // each)) * each
        raise DimoError(
            f"{given} must be a multiple of its {each:,} {unit}; e.g. --num-images {nearest}"
        )

    def problem(number: int) -> str | None:
        required = tuple(metric for metric in protocol.metrics if not metric.supplementary)
        sized = replace(images, num_images=number)
        changed = replace(protocol, images=sized, metrics=required)
        return next(_metric_contradictions(changed), None)

    if found := problem(count):
        enough = range(count, images.num_images, each)
        least = next((n for n in enough if not problem(n)), images.num_images)
        raise DimoError(f"{given} is too few: {found}; give --num-images {least} or more")


def too_few(metric: Metric, generated: int, reference: int) -> str:
    """Why a metric cannot be computed from so many images of each side; empty if it can."""
    used, kind = _images_used(metric), METRICS[metric.name]
    if used > min(generated, reference):
        return f"it uses {used:,} images of {generated:,} and of {reference:,} of the reference"
    for key, value in metric.params.items():
        if value > (high := kind.params[key].high(generated, reference)):
            return f"{key} = {value:,}; with so few images at most {high:,}"
    return ""


def _images_used(metric: Metric) -> int:
    """How many images of each side a metric that draws some uses; 0 for all."""
    return metric.params.get("blocks", 1) * metric.params.get("block_size", 0)


def _hashes(protocol: Protocol) -> Iterator[tuple[str, str]]:
    yield "extractor.sha256", protocol.extractor.sha256
    yield "reference.sha256", protocol.reference.sha256
    if protocol.prompts is not None:
        yield "prompts.sha256", protocol.prompts.sha256
    if protocol.detector is not None:
        yield "detector.sha256", protocol.detector.sha256
        if protocol.detector.colors_sha256:
            yield "detector.colors_sha256", protocol.detector.colors_sha256
    if protocol.scorer is not None:
        yield "scorer.sha256", protocol.scorer.sha256


def _missing_parts(protocol: Protocol) -> Iterator[str]:
    """A table that a metric needs and the file lacks, or the reverse."""
    kinds = {metric.name: METRICS[metric.name] for metric in protocol.metrics}
    decided = [name for name, kind in kinds.items() if kind.needs in ("detections", "answers")]
    paired = [name for name, kind in kinds.items() if kind.needs == "pairs"]
    lossy = [name for name, kind in kinds.items() if kind.needs == "reconstruction"]
    measured = [name for name in kinds if name not in (*decided, *paired, *lossy)]
    compared = [name for name, kind in kinds.items() if kind.compares_with]
    for part, present, users in (
        ("extractor", protocol.extractor.name != NONE, measured),
        ("reference", protocol.reference.name != NONE, compared),
        ("prompts", protocol.prompts is not None, decided + paired),
        ("detector", protocol.detector is not None, decided),
        ("scorer", protocol.scorer is not None, paired),
    ):
        if users and not present:
            yield f"missing key {part!r}, which the metric {users[0]!r} needs"
    if len(lossy) == len(kinds):
        yield f"'metrics' must name one that other rows have, too, beside {lossy[0]!r}"
    source = protocol.reference.name if protocol.prompts is None else protocol.prompts.name
    if lossy and (source == NONE or (protocol.prompts and source != BUNDLED_PROMPTS)):
        yield (
            f"the metric {lossy[0]!r} needs real images, which a protocol without prompts has as "
            f"its reference; it has {source!r}; allowed with prompts: {BUNDLED_PROMPTS}"
        )
    if protocol.detector is not None and not decided:
        yield "'detector' must be left out: no metric needs it"
    if protocol.scorer is not None and not paired:
        yield "'scorer' must be left out: no metric needs it"


def _prompt_contradictions(protocol: Protocol) -> Iterator[str]:
    prompts, detector, images = protocol.prompts, protocol.detector, protocol.images
    if (prompts is not None) != (images.labels == "prompts"):
        yield (
            "'images.labels' must be 'prompts' where there is a table [prompts], and only there, "
            f"not {images.labels!r}"
        )
    if prompts is None:
        return
    if (
        sum(prompts.tags.values()) != images.num_classes
        or min(prompts.tags.values(), default=0) < 1
    ):
        yield (
            f"'prompts.tags' has {sum(prompts.tags.values())} prompts, 'images.num_classes' is "
            f"{images.num_classes}; they must agree, and each tag have one prompt or more"
        )
    if prompts.images_per_prompt * images.num_classes != images.num_images:
        yield (
            f"'images.num_images' must be {prompts.images_per_prompt} images for each of "
            f"{images.num_classes} prompts, not {images.num_images}"
        )
    if detector is not None:
        for tag, share in detector.accuracy.items():
            if tag not in prompts.tags or not 0 <= share <= 1:
                yield (
                    f"'detector.accuracy.{tag}' is {share}; allowed: from 0 to 1, of the tags "
                    f"{', '.join(prompts.tags)}"
                )
    for index, metric in enumerate(protocol.metrics):
        tag = METRICS[metric.name].tag
        if tag and tag not in prompts.tags:
            yield f"'metrics[{index}].name' is {metric.name!r}, and no prompt has the tag {tag!r}"


def _detector_contradictions(detector: Detector, protocol: Protocol) -> Iterator[str]:
    """The detector's name, and the secondary metrics' parts, which must come with dimo."""
    if detector.name not in DETECTORS:
        yield str(unknown_name("'detector.name'", detector.name, DETECTORS))
        return
    decides = DETECTORS[detector.name].metrics
    for index, metric in enumerate(protocol.metrics):
        if METRICS[metric.name].needs in ("detections", "answers") and metric.name not in decides:
            yield (
                f"'metrics[{index}].name' is {metric.name!r}; the detector {detector.name!r} "
                f"decides {', '.join(decides)}"
            )
    extractor, reference = protocol.extractor.name, protocol.reference.name
    shipped = {
        "extractor": [name for name, kind in EXTRACTORS.items() if not kind.weights],
        "reference": list(BUNDLED_REFERENCES),
        "scorer": [name for name, kind in SCORERS.items() if kind.shipped],
    }
    named = {"extractor": extractor, "reference": reference}
    if protocol.scorer is not None:
        named["scorer"] = protocol.scorer.name
    for part, name in named.items():
        if name != NONE and DETECTORS[detector.name].reads_results:
            yield f"{part!r} must be left out: dimo sees no images with {detector.name!r}"
        elif name not in (NONE, *shipped[part]):
            allowed = ", ".join(shipped[part])
            yield f"'{part}.name' is {name!r}; allowed beside a detector: {allowed}"
    if (extractor == NONE) != (reference == NONE):
        yield "'extractor' and 'reference' must come together beside a detector"


def _scorer_contradictions(scorer: Scorer, protocol: Protocol) -> Iterator[str]:
    if scorer.name not in SCORERS:
        yield str(unknown_name("'scorer.name'", scorer.name, SCORERS))
        return
    kind = SCORERS[scorer.name]
    for index, metric in enumerate(protocol.metrics):
        if METRICS[metric.name].needs == "pairs" and metric.name not in kind.metrics:
            yield (
                f"'metrics[{index}].name' is {metric.name!r}; the scorer {scorer.name!r} gives "
                f"{', '.join(kind.metrics)}"
            )
    if kind.model and scorer.model != kind.model:
        yield f"'scorer.model' must be {kind.model!r} for {scorer.name!r}, not {scorer.model!r}"
    if not kind.is_fixed and not scorer.model:
        yield f"missing key 'scorer.model', which {scorer.name!r} needs"
    if kind.is_fixed and (scorer.model or scorer.prefix):
        key = "model" if scorer.model else "prefix"
        yield f"'scorer.{key}' must be left out: {scorer.name!r} has none"
    for key, value, allowed in (
        ("preprocessing", scorer.preprocessing, () if kind.is_fixed else PREPROCESSINGS),
        ("version", scorer.version, tuple(kind.versions)),
        ("scale", scorer.scale, kind.scales),
    ):
        if allowed and value not in allowed:
            yield str(unknown_name(f"'scorer.{key}'", value, allowed))
        if value and not allowed:
            yield f"'scorer.{key}' must be left out: {scorer.name!r} has none"
    alone = all(METRICS[metric.name].needs == "pairs" for metric in protocol.metrics)
    if alone != (kind.suite != "captions"):
        yield (
            f"'metrics' must have {'not only' if alone else 'only'} those of the scorer "
            f"{scorer.name!r}: {', '.join(kind.metrics)}"
        )
    if kind.suite == "preferences" and any(protocol.images.resolution):
        yield f"'images.resolution' must be [0, 0] for {scorer.name!r}, which takes any size"
    if kind.tags:
        yield from _benchmark_contradictions(scorer, kind.tags, protocol)


def _benchmark_contradictions(
    scorer: Scorer, tags: tuple[str, ...], protocol: Protocol
) -> Iterator[str]:
    """A scorer with its own benchmark: fixed tags, one image per prompt, no prefix."""
    prompts = protocol.prompts
    if scorer.prefix:
        yield f"'scorer.prefix' must be left out: {scorer.name!r} has none"
    if prompts is None:
        return
    counts = set(prompts.tags.values())
    if tuple(prompts.tags) != tags or len(counts) != 1 or min(counts) % 10:
        yield (
            f"'prompts.tags' must be {', '.join(tags)} for {scorer.name!r}, each with the same "
            "multiple of 10 prompts"
        )
    if prompts.images_per_prompt != 1:
        yield f"'prompts.images_per_prompt' must be 1 for {scorer.name!r}"


def _metric_contradictions(protocol: Protocol) -> Iterator[str]:
    counts = protocol.images.num_images, protocol.reference.count
    row = EXTRACTORS.get(protocol.extractor.name)
    outputs, parts = (row.outputs, row.parts) if row else (None, {})
    seen: set[str] = set()
    for index, metric in enumerate(protocol.metrics):
        path, kind = f"metrics[{index}]", METRICS[metric.name]
        if metric.name in seen:
            yield f"'{path}.name' repeats {metric.name!r}"
        seen.add(metric.name)
        if metric.higher_is_better != kind.higher_is_better:
            right = str(kind.higher_is_better).lower()
            yield f"'{path}.higher_is_better' must be {right} for {metric.name!r}"
        if min(protocol.images.resolution) < kind.least_side:
            sizes = " x ".join(map(str, protocol.images.resolution))
            yield (
                f"'{path}.name' is {metric.name!r}, which needs images of {kind.least_side} x "
                f"{kind.least_side} pixels or more, not {sizes}"
            )
        if outputs is not None and kind.needs not in (*outputs, *_OF_NO_EXTRACTOR):
            yield (
                f"'{path}.name' is {metric.name!r}, which needs {kind.needs}; the extractor "
                f"{protocol.extractor.name!r} gives {', '.join(outputs)}"
            )
        if not parts.keys() >= set(kind.parts):
            having = [
                name for name, row in EXTRACTORS.items() if row.parts.keys() >= set(kind.parts)
            ]
            yield (
                f"'{path}.name' is {metric.name!r}, which compares features of several networks; "
                f"'extractor.name' must be {' or '.join(having)}, not {protocol.extractor.name!r}"
            )
        if parts and not kind.parts and kind.needs == "features":
            allowed = ", ".join(name for name, row in METRICS.items() if row.parts)
            yield (
                f"'{path}.name' is {metric.name!r}, for features of one network; the extractor "
                f"{protocol.extractor.name!r} has several; allowed: {allowed}"
            )
        if (used := _images_used(metric)) > min(counts):
            yield (
                f"'{path}' uses {used} images of each side; there are {counts[0]} generated "
                f"and {counts[1]} reference ones"
            )
        for key, value in metric.params.items():
            low, high = kind.params[key].low, kind.params[key].high(*counts)
            if value < low or (value > high and not metric.supplementary):
                yield f"'{path}.{key}' must be from {low} to {high}, not {value}"
    neighbours = [metric.params for metric in protocol.metrics if "k" in metric.params]
    if any(params != neighbours[0] for params in neighbours):
        yield "'k', 'blocks', 'block_size' and 'seed' must be the same for every metric with a 'k'"


def _extractor_contradictions(extractor: Extractor) -> Iterator[str]:
    if extractor.name == NONE:
        return
    if not _is_known(extractor):
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", extractor.name):
            allowed = [*EXTRACTORS, "package.module:attribute"]
            yield str(unknown_name("'extractor.name'", extractor.name, allowed))
        elif extractor.resize:
            yield "'extractor.resize' must be left out: custom code resizes by itself"
        return
    resizes = EXTRACTORS[extractor.name].resizes
    if resizes and extractor.resize not in resizes:
        yield str(unknown_name("'extractor.resize'", extractor.resize, resizes))
    if not resizes and extractor.resize:
        yield f"'extractor.resize' must be left out: {extractor.name!r} has no choice"


def _is_known(extractor: Extractor) -> bool:
    return extractor.name in EXTRACTORS
