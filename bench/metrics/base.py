"""What metrics take and return, and the bootstrap interval of any metric.

A row of `bench.protocol.catalog.METRICS` names a function `(samples: Samples, **params) -> Score`,
where `params` are the metric's integers in the protocol.

An interval says how far the value may move when the same model draws other images. The
reference set and its balls are held fixed, as the protocol fixes them. A metric comes with an
array of contributions, one per sample, such that resampling the samples moves the metric by the
mean of the resampled contributions less the mean of all, to first order. The bootstrap (Efron
1979) of that mean, laid around the metric's value, is the interval; the difference of two rows on
the same samples is treated the same way. The value's own bias at this N is not corrected. Nothing
is approximate for precision, density, class accuracy (means over the generated images), recall and
coverage (over the reference images).

Draws come from `numpy.random.RandomState`, whose stream numpy has frozen: a seed gives the same
interval under every numpy version.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.features.stats import Features, FeatureStats, as_numpy, check_features
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Samples:
    """One set of generated images and its reference, as arrays.

    Attributes:
        generated: `[N, D]` float32, the extractor output that the metric's row names in `needs`.
        reference: `[M, D]` float32; None unless the row compares with samples.
        statistics: Of the reference; None unless the row compares with them.
        labels: `[N]` requested classes; None if unknown.
        device: Where distances between samples are computed.
        shared: Intermediate results that several metrics use, by a key of the metric's choice.
        parts: The samples of each network, where the row names several in `parts`.
    """

    generated: npt.NDArray[np.float32]
    reference: npt.NDArray[np.float32] | None = None
    statistics: FeatureStats | None = None
    labels: npt.NDArray[np.int64] | None = None
    device: torch.device = _CPU
    shared: dict[Any, Any] = field(default_factory=dict)
    parts: "Mapping[str, Samples]" = field(default_factory=dict)

    def sides(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Generated and reference samples."""
        if self.reference is None:
            raise DimoError("no reference samples; set compares_with='samples' in its METRICS row")
        return self.generated, self.reference


@dataclass(frozen=True, eq=False)
class Score:
    """One metric of one set of images.

    Attributes:
        contributions: `[K]`, what each sample adds to the value, to first order.
        labels: `[K]`, where the protocol fixes how many samples each label has.
        extra: Further numbers for the record.
        smallest: Lowest possible value, where intervals end; None if unbounded.
        of_reference: Whether the contributions are those of the reference images.
        rows: `[K]`, the generated images that they are of, where the metric takes only some.
    """

    value: float
    contributions: _Floats
    labels: npt.NDArray[np.int64] | None = None
    extra: dict[str, float] = field(default_factory=dict)
    smallest: float | None = 0.0
    of_reference: bool = False
    rows: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Interval:
    """A confidence interval, `low <= high`."""

    low: float
    high: float


def bootstrap_interval(
    contributions: Features,
    *,
    point: float,
    n_bootstrap: int,
    seed: int,
    level: float = 0.95,
    smallest: float | None = None,
    labels: Features | None = None,
) -> Interval:
    """Percentile interval of the metric whose value is `point`; it contains `point`.

    Args:
        contributions: `[N]`, one per sample.
        smallest: The least value the metric can take, where the low end stops.
        labels: `[N]` integers: the protocol fixes how many samples each label has, so only the
            spread within labels counts; labels of a single sample are treated as one. None:
            samples are drawn from one distribution.

    Raises: DimoError: Not `[N]`, empty or not finite, labels do not fit, or a setting out of range.
    """
    if n_bootstrap < 1 or not 0.0 < level < 1.0:
        raise DimoError(
            f"n_bootstrap is {n_bootstrap} and level {level}; allowed: 1 or more, and between 0 "
            "and 1; use n_bootstrap = 200, level = 0.95"
        )
    if not np.isfinite(point):
        raise DimoError(f"point is {point}; allowed: a finite number; compute the metric first")
    array = _check_contributions(contributions)
    deviations = array - array.mean() if labels is None else _within_labels(array, labels)
    rng, count = np.random.RandomState(seed), len(array)
    means = [deviations[rng.randint(count, size=count)].mean() for _ in range(n_bootstrap)]
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    floor = -np.inf if smallest is None else min(smallest, point)
    return Interval(max(point + min(float(low), 0.0), floor), point + max(float(high), 0.0))


def paired_interval(
    a: Features,
    b: Features,
    *,
    difference: float,
    n_bootstrap: int,
    seed: int,
    level: float = 0.95,
    labels: Features | None = None,
) -> Interval:
    """Interval of the difference (a less b) of one metric between two rows of a table.

    Sample i of both rows (`[N]` contributions each) has the same seed and label, or is the same
    reference image, so what happens to both at once drops out. The other arguments and errors are
    those of `bootstrap_interval`.
    """
    first, second = _check_contributions(a), _check_contributions(b)
    if len(first) != len(second):
        raise DimoError(
            f"the rows have {len(first)} and {len(second)} samples; allowed: equal numbers, "
            "paired one by one; compare rows of one protocol"
        )
    return bootstrap_interval(
        first - second,
        point=difference,
        n_bootstrap=n_bootstrap,
        seed=seed,
        level=level,
        labels=labels,
    )


def _check_contributions(values: Features) -> _Floats:
    array = as_numpy(values)
    if array.ndim != 1:
        raise DimoError(
            f"contributions have shape {list(array.shape)}; allowed: [N]; pass one a sample"
        )
    return check_features(array[:, None], name="contributions")[:, 0].astype(np.float64)


def _within_labels(array: _Floats, labels: Features) -> _Floats:
    """Deviations from the mean of the label, scaled to the unbiased variance in each label."""
    given = as_numpy(labels)
    if given.shape != array.shape or given.dtype.kind not in "iu":
        raise DimoError(
            f"labels have shape {list(given.shape)} and dtype {given.dtype} for {len(array)} "
            f"samples; allowed: [{len(array)}] integers; give one label a sample"
        )
    _, group, sizes = np.unique(given, return_inverse=True, return_counts=True)
    group[sizes[group] == 1] = len(sizes)  # Labels of one sample become one group.
    sizes = np.bincount(group)
    means = np.bincount(group, weights=array) / np.maximum(sizes, 1)
    deviations: _Floats = (array - means[group]) * np.sqrt(sizes / np.maximum(sizes - 1, 1))[group]
    return deviations
