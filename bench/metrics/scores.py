"""Features and a reference -> every metric of a protocol, with its interval."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from bench import metrics as m
from bench.features import Features
from bench.features.references import ReferenceSet
from bench.features.stats import compute_stats
from bench.metrics import uncertainty as u
from bench.protocol import Metric, Protocol
from bench.protocol.catalog import METRICS
from bench.records.record import MetricValue
from dimo.errors import DimoError
from dimo.util.terminal import Progress

_Floats = npt.NDArray[np.float64]


_PER_REFERENCE = ("recall", "coverage")  # contributions of reference images, not generated ones


@dataclass(frozen=True, eq=False)
class Score:
    """One metric of one set of images.

    Attributes:
        value: The metric.
        contributions: What each sample adds to it, to first order (`bench.metrics.uncertainty`).
        labels: Label of each of these samples, where the protocol fixes how many have each.
        extra: Further numbers for the record.
        smallest: The lowest value the metric can take, where intervals end.
    """

    value: float
    contributions: _Floats
    labels: npt.NDArray[np.int64] | None = None
    extra: dict[str, float] = field(default_factory=dict)
    smallest: float | None = 0.0


def score(
    protocol: Protocol,
    found: Features,
    reference: ReferenceSet,
    *,
    device: torch.device,
    progress: Progress = lambda what, done, total, unit: None,
) -> dict[str, Score]:
    """Every metric of the protocol that features decide.

    Args:
        protocol: Names metrics and their parameters.
        found: Features of the images to score.
        reference: What they are compared with, in the same features.
        device: Where distances between samples are computed.
        progress: Told before each metric.

    Raises:
        DimoError: A metric lacks what it needs (logits, labels, enough images).
    """
    scorer = _Scorer(found, reference, device)
    scores = {}
    ours = [m for m in protocol.metrics if METRICS[m.name].needs not in ("detections", "pairs")]
    for done, metric in enumerate(ours):
        progress("metrics", done, len(ours), "metrics")
        try:
            found_score = scorer.score(metric)
        except DimoError as error:
            raise DimoError(f"{metric.name}: {error}") from error
        scores[metric.name] = replace(
            found_score, labels=_strata(protocol, metric.name, found_score, found.labels)
        )
    progress("metrics", len(ours), len(ours), "metrics")
    return scores


def metric_values(
    scores: dict[str, Score], protocol: Protocol, count: int
) -> dict[str, MetricValue]:
    """The entries of a record: value and bootstrap interval of each metric.

    Args:
        scores: From `score`.
        protocol: Gives the bootstrap's settings.
        count: Number of images scored.
    """
    boot = protocol.uncertainty
    values = {}
    for name, found in scores.items():
        interval = u.bootstrap_interval(
            found.contributions,
            point=found.value,
            n_bootstrap=boot.n_bootstrap,
            seed=boot.seed,
            level=boot.level,
            smallest=found.smallest,
            labels=found.labels,
        )
        values[name] = MetricValue(found.value, interval.low, interval.high, count, found.extra)
    return values


def _strata(
    protocol: Protocol,
    name: str,
    found: Score,
    labels: npt.NDArray[np.int64] | None,
) -> npt.NDArray[np.int64] | None:
    """Labels of the samples that contribute, if those are the generated images, all in order."""
    if protocol.images.labels != "balanced" or labels is None or name in _PER_REFERENCE:
        return None
    return labels if len(labels) == len(found.contributions) else None


class _Scorer:
    """Scores metric after metric on one pair of sets, sharing what several of them need."""

    def __init__(self, found: Features, reference: ReferenceSet, device: torch.device) -> None:
        self.found, self.reference, self.device = found, reference, device
        self._memberships: dict[tuple[int, ...], m.ManifoldMembership] = {}

    def score(self, metric: Metric) -> Score:
        kind = METRICS[metric.name]
        if kind.compares_with == "statistics":
            return self._frechet(kind.needs)
        if metric.name == "inception_score":
            return self._inception_score(**metric.params)
        if metric.name == "kid":
            return self._kid(**metric.params)
        if metric.name == "cmmd":
            return self._cmmd()
        if metric.name == "class_accuracy":
            return self._class_accuracy()
        return self._neighbours(metric.name, **metric.params)

    def _frechet(self, output: str) -> Score:
        features = self._output(output)
        reference = self.reference.stats[output]
        stats = compute_stats(features, extractor=reference.extractor)
        value = m.frechet_distance(generated=stats, reference=reference)
        contributions = u.frechet_contributions(
            generated=features, reference=reference, stats=stats
        )
        return Score(value, contributions)

    def _inception_score(self, splits: int, seed: int) -> Score:
        logits = self._output("logits")
        found = m.inception_score(logits, splits=splits, seed=seed)
        contributions = u.inception_score_contributions(logits, splits=splits, seed=seed)
        extra = {"std": found.std, "one_split": found.one_split}
        return Score(found.mean, contributions, extra=extra, smallest=1.0)

    def _class_accuracy(self) -> Score:
        if self.found.labels is None:
            raise DimoError("the images have no labels; name them with --labels")
        hits = m.class_hits(self._output("logits"), self.found.labels)
        return Score(float(hits.mean()), hits)

    def _neighbours(
        self, name: str, k: int, blocks: int = 1, block_size: int = 0, seed: int = 0
    ) -> Score:
        rows = list(self._blocks(blocks, block_size, seed))
        parts = []
        for position, (generated, reference) in enumerate(rows):
            key = (k, blocks, block_size, seed, position)
            if key not in self._memberships:
                self._memberships[key] = m.manifold_membership(
                    generated=generated, reference=reference, k=k, device=self.device
                )
            parts.append(getattr(self._memberships[key], name))
        values: _Floats = np.concatenate(parts)
        extra = {}
        if name == "coverage":
            extra = {"ceiling": m.coverage_ceiling(len(rows[0][0]), len(rows[0][1]), k)}
        return Score(float(values.mean()), values, extra=extra)

    def _blocks(
        self, blocks: int, block_size: int, seed: int
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Pairs of generated and reference samples; smaller blocks where there are too few."""
        sides = (self._output("features"), self._reference_features)
        if not block_size:
            yield sides
            return
        size = min(block_size, *(len(side) // blocks for side in sides))
        orders = [np.random.RandomState(seed).permutation(len(side)) for side in sides]
        for start in range(0, blocks * size, size):
            rows = [np.sort(order[start : start + size]) for order in orders]
            yield sides[0][rows[0]], sides[1][rows[1]]

    def _kid(self, subsets: int, subset_size: int, seed: int) -> Score:
        found = m.kernel_distance(
            generated=self._output("features"),
            reference=self._reference_features,
            subsets=subsets,
            subset_size=subset_size,
            seed=seed,
        )
        return Score(found.mean, found.contributions, extra={"std": found.std}, smallest=None)

    def _cmmd(self) -> Score:
        found = m.cmmd(generated=self._output("features"), reference=self._reference_features)
        return Score(found.value, found.contributions)

    def _output(self, output: str) -> npt.NDArray[np.float32]:
        array: npt.NDArray[np.float32] | None = getattr(self.found, output)
        if array is None:
            raise DimoError(f"these features have no {output}; score the images themselves")
        return array

    @cached_property
    def _reference_features(self) -> npt.NDArray[np.float32]:
        assert self.reference.features is not None
        return self.reference.features.features
