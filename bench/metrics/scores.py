"""Features and a reference -> every metric of a protocol, with its interval."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.features import Features
from bench.features.references import ReferenceSet
from bench.features.stats import compute_stats
from bench.metrics.base import Samples, Score, bootstrap_interval
from bench.metrics.frechet import frechet_distance
from bench.metrics.per_image import class_hits
from bench.metrics.prdc import score_coverage
from bench.metrics.reconstruction import COMPARISONS, Compare, Reconstruction
from bench.protocol import Metric, Protocol
from bench.protocol.catalog import METRICS, load
from bench.protocol.checks import too_few
from bench.records.record import MetricValue
from dimo.errors import DimoError
from dimo.util.terminal import Progress, quiet


def score(
    protocol: Protocol,
    features: Features,
    reference: ReferenceSet,
    *,
    device: torch.device,
    progress: Progress = quiet,
    gaps: dict[str, str] | None = None,
) -> dict[str, Score]:
    """Every metric of the protocol that is computed from features.

    A supplementary one is left out where it cannot be computed, as for too few images.

    Args:
        gaps: Metrics to leave out, and why; others that cannot be computed are added to it. None:
            all that are not supplementary must be computed.

    Raises: DimoError: A metric lacks what it needs (logits, labels, enough images).
    """
    metrics = [
        metric
        for metric in protocol.metrics
        if METRICS[metric.name].of_features and metric.name not in (gaps or {})
    ]
    base = Samples(features.features, labels=features.labels, device=device)
    balanced = features.labels if protocol.images.labels == "balanced" else None
    scores = {}
    for done, metric in enumerate(metrics):
        progress("metrics", done, len(metrics), "metrics")
        try:
            result = _score(metric, features, reference, base)
        except DimoError as error:
            if metric.supplementary:
                continue
            if gaps is not None:
                gaps[metric.name] = str(error)
                continue
            raise DimoError(f"{metric.name}: {error}") from error
        if metric.supplementary:
            result = replace(result, extra={**result.extra, **metric.params})
        if balanced is not None and not result.of_reference:
            labels = balanced if result.rows is None else balanced[result.rows]
            if len(labels) == len(result.contributions):
                result = replace(result, labels=labels)
        scores[metric.name] = result
    progress("metrics", len(metrics), len(metrics), "metrics")
    return scores


def load_comparisons(names: Iterable[str], weights: Path | None) -> dict[str, Compare]:
    """Those of `COMPARISONS` that are among the names of metrics.

    Raises:
        DimoError: Files of weights are missing or not the published ones.
    """
    found = {name: COMPARISONS[name] for name in names if name in COMPARISONS}
    return {name: load(of)(weights) if isinstance(of, str) else of for name, of in found.items()}


def reconstruction_scores(protocol: Protocol, made: Reconstruction) -> dict[str, Score]:
    """Every metric of the protocol that says what the tokenizer loses."""
    kinds = {metric.name: METRICS[metric.name] for metric in protocol.metrics}
    return {
        name: load(kind.compute)(made)
        for name, kind in kinds.items()
        if kind.needs == "reconstruction"
    }


def class_table(
    protocol: Protocol, features: Features, reference: ReferenceSet, *, device: torch.device
) -> str:
    """The metrics of each label as CSV: `class`, `n` generated and `n_reference` real images, then
    the protocol's Frechet distance of features, coverage and accuracy.

    A label's images are compared with the reference images of that label. Empty: the reference has
    no labels, or for the label too few images: a distance needs more images on both sides than
    features have dimensions, coverage more than k.
    """
    assert features.labels is not None, "the suite refuses images without labels"
    metrics = {metric.name: metric for metric in protocol.metrics}
    shown = [name for name in ("fid", "fd_dinov2", "coverage", "class_accuracy") if name in metrics]
    real = reference.features
    lines = [["class", "n", "n_reference", *shown]]
    for label in np.unique(features.labels):
        rows = features.labels == label
        generated = features.features[rows]
        others = generated[:0]
        if real is not None and real.labels is not None:
            others = real.features[real.labels == label]
        values: dict[str, float] = {}
        few = min(len(generated), len(others))
        samples = Samples(generated, others, device=device)
        if few > generated.shape[1] and not {"fid", "fd_dinov2"}.isdisjoint(shown):
            stats = [compute_stats(side, extractor="") for side in samples.sides()]
            distance = frechet_distance(generated=stats[0], reference=stats[1])
            values |= dict.fromkeys(("fid", "fd_dinov2"), distance)
        if "coverage" in shown and few > metrics["coverage"].params["k"]:
            values["coverage"] = score_coverage(samples, k=metrics["coverage"].params["k"]).value
        if features.logits is not None and "class_accuracy" in shown:
            hits = class_hits(features.logits[rows], features.labels[rows])
            values["class_accuracy"] = float(hits.mean())
        numbers = [f"{values[name]:.6g}" if name in values else "" for name in shown]
        lines.append([str(label), str(len(generated)), str(len(others)), *numbers])
    return "".join(",".join(line) + "\n" for line in lines)


def known_gaps(
    protocol: Protocol,
    reference: ReferenceSet,
    *,
    count: int,
    has_labels: bool,
    outputs: Collection[str],
) -> dict[str, str]:
    """Metrics that cannot be computed for `count` images, and why, before features are extracted.

    `outputs` are those of the extractor.
    """
    gaps = {}
    for metric in protocol.metrics:
        kind = METRICS[metric.name]
        if not kind.of_features:
            continue
        if kind.needs not in outputs:
            gaps[metric.name] = f"the features have no {kind.needs}"
        elif kind.uses_labels and not has_labels:
            gaps[metric.name] = "the images have no labels that count; name them with --labels"
        elif missing := [name for name in kind.statistics if name not in reference.stats]:
            gaps[metric.name] = f"the reference has no statistics of {', '.join(missing)}"
        elif kind.compares_with == "samples" and reference.count is None:
            gaps[metric.name] = "the reference has no features of single images"
        elif few := too_few(metric, count, reference.count or count):
            gaps[metric.name] = few
    return gaps


def _score(metric: Metric, features: Features, reference: ReferenceSet, base: Samples) -> Score:
    kind = METRICS[metric.name]
    generated = getattr(features, kind.needs)
    if generated is None:
        raise DimoError(f"these features have no {kind.needs}; score the images themselves")
    samples = None
    if kind.compares_with == "samples":
        if reference.features is None:
            raise DimoError("the reference has no features of single images")
        samples = reference.features.features
    inputs = replace(base, generated=generated, reference=samples)
    if kind.parts:
        inputs = _parted(inputs, kind.parts, reference)
    elif kind.statistics:
        inputs = replace(inputs, statistics=reference.stats[kind.needs])
    with np.errstate(all="ignore"):  # what overflows is told in words
        result: Score = load(kind.compute)(inputs, **metric.params)
    if not np.isfinite(result.value):
        raise DimoError("its value is not finite; check the features and those of the reference")
    return result


def _parted(samples: Samples, names: tuple[str, ...], reference: ReferenceSet) -> Samples:
    """The samples of some of an extractor's networks: of a single one itself, else as `parts`."""
    width = max(columns.stop for columns in reference.columns.values())
    for array in (samples.generated, samples.reference):
        if array is not None and array.shape[1] != width:
            raise DimoError(
                f"features have dimension {array.shape[1]}; expected {width}, those of "
                f"{', '.join(reference.columns)} side by side; score the images themselves"
            )
    parts = {}
    for name in names:
        columns, others = reference.columns[name], samples.reference
        parts[name] = Samples(
            samples.generated[:, columns],
            None if others is None else others[:, columns],
            reference.stats.get(name),
            samples.labels,
            samples.device,
        )
    return parts[names[0]] if len(names) == 1 else replace(samples, parts=parts)


def metric_values(
    scores: dict[str, Score], protocol: Protocol, count: int
) -> dict[str, MetricValue]:
    """The entries of a record: value and bootstrap interval of each metric, over `count` images."""
    values = {}
    for name, result in scores.items():
        interval = bootstrap_interval(
            result.contributions,
            point=result.value,
            smallest=result.smallest,
            labels=result.labels,
            **vars(protocol.uncertainty),
        )
        values[name] = MetricValue(result.value, interval.low, interval.high, count, result.extra)
    return values
