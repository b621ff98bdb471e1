"""Intervals for every metric, from one concept: what each sample contributes to the metric.

An interval tells how far the value may move when the same model draws other images. The
reference set and its balls are held fixed, as the protocol fixes them. A metric comes with an
array of contributions, one a sample, such that resampling the samples moves the metric by the
mean of the resampled contributions less the mean of all, to first order. The bootstrap (Efron
1979) of that mean, laid around the metric's value, is the interval; the difference of two rows on
the same samples is treated alike. The value's own bias at this N is not corrected.

Precision, density and class accuracy are means of a contribution of each generated image, recall
and coverage of each reference image (`bench.metrics.manifold_membership`, `class_hits`), so for
these nothing is approximate. KID and CMMD come with their contributions (`bench.metrics.kernel`).
The other metrics' are made here.

Draws come from `numpy.random.RandomState`, whose stream numpy has frozen: a seed gives the same
interval under every numpy version.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.features.stats import Features, FeatureStats, as_numpy, check_features, compute_stats
from bench.metrics.frechet import covariance_root
from bench.metrics.inception_score import log_softmax, probability_sums, split_rows
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]

_BLOCK_ROWS = 2048  # Samples taken at a time; bounds memory, not results' meaning.
_STEP = 1.0  # Of the quadrature nodes in log s: an error of exp(-2 pi^2 / step) = 3e-9.
_RANGE = 1e16  # Nodes reach from 1 / this to this times the largest eigenvalue: 1e-8.


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
    """Percentile interval of the metric whose value is `point`; it holds `point`.

    Args:
        contributions: `[N]`, one a sample.
        point: The metric's value.
        n_bootstrap: Number of resamples.
        seed: Seed of the resamples.
        level: Confidence level, between 0 and 1.
        smallest: The least value the metric can take, where the low end stops.
        labels: `[N]` integers: how many samples each label has is fixed by the protocol, not by
            chance, and only the spread within labels counts. Labels of a single sample are
            treated as one. None: samples are drawn from one distribution.

    Raises:
        DimoError: Not `[N]`, empty or not finite; labels do not fit; or a setting is out of range.
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
    """Interval of the difference of one metric between two rows of a table.

    Sample i of both rows has the same seed and label, or is the same reference image. What
    happens to both at once then drops out.

    Args:
        a: `[N]` contributions to the first row's value.
        b: `[N]` contributions to the second row's value, in the same order.
        difference: First value less second.
        n_bootstrap: Number of resamples.
        seed: Seed of the resamples.
        level: Confidence level, between 0 and 1.
        labels: As in `bootstrap_interval`.

    Raises:
        DimoError: The rows have different numbers of samples, or as in `bootstrap_interval`.
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


def frechet_contributions(
    *, generated: Features, reference: FeatureStats, stats: FeatureStats | None = None
) -> _Floats:
    """Contributions to the Frechet distance: `N - 1` times its loss when image i is left out.

    With `S_r = R R^T`, `Tr (S_g S_r)^(1/2)` is `Tr M^(1/2)` with `M = R^T S_g R`. Leaving out
    image i, at `c_i` from the mean, takes a multiple of `z_i z_i^T`, `z_i = R^T c_i`, from M. By
    `sqrt(x) = 1/(2 pi) int_0^inf s^(-1/2) log(1 + x / s) ds` the trace falls by

        Tr M^(1/2) - Tr (M - a z z^T)^(1/2)
            = 1/(2 pi) int_0^inf -log(1 - a z^T (M + s I)^(-1) z) s^(-1/2) ds,

    which the trapezoidal rule in log s gives to 1e-6 for all images by one product with D x 74
    numbers. As N grows this tends to the influence function `2 (mu_g - mu_r).c + c^T (I - A) c`,
    A the optimal map between the Gaussians, which at N of the order of D is up to 40 % too
    narrow, while a bootstrap that resamples the images is up to three times too wide.

    Measured against the spread of fresh samples, the interval's width is right to about 10 % for
    clearly different distributions, down to N = D / 2. Where the distance is no more than its
    bias of order D / N, the linear term vanishes, and intervals are too wide by up to a factor
    sqrt(2): on the safe side, and nearer than resampled images with sqrt(3). Where N <= D, images
    move the distance only within the span of the others.

    Args:
        generated: `[N, D]` features of the generated images, N >= 3.
        reference: Statistics of the reference images.
        stats: Statistics of `generated`, where they are known; None: they are computed.

    Returns:
        `[N]` float64.

    Raises:
        DimoError: Shapes do not fit, N < 3, or a value is not finite.
    """
    array = check_features(generated, name="generated features", dim=reference.mu.size, min_count=3)
    count = len(array)
    if stats is None:
        stats = compute_stats(array, extractor=reference.extractor)
    root = covariance_root(reference)  # [D, rank]
    values, vectors = np.linalg.eigh(root.T @ stats.sigma @ root)  # M, ascending
    largest = float(values.max(initial=0.0))
    values[values <= largest * values.size * np.finfo(np.float64).eps] = 0.0
    root = root @ vectors
    nodes = np.exp(np.arange(-np.log(_RANGE), np.log(_RANGE), _STEP)) * largest  # [Q]
    poles = (count / (count - 1) ** 2) / np.add.outer(values, nodes) if largest else None
    weights = np.sqrt(nodes) * (_STEP / (2.0 * np.pi))

    shift = stats.mu - reference.mu
    shrink = np.sqrt((count - 1) / (count - 2))  # Fewer images: another divisor.
    spread = float(np.trace(stats.sigma)) * (count - 1)
    constant = (shrink - 1.0) * float(np.sqrt(values).sum())
    contributions = np.empty(count)
    for rows in _blocks(count):
        centered = array[rows] - stats.mu  # [B, D]
        norms = np.einsum("nd,nd->n", centered, centered)
        lost = np.zeros(len(norms))  # Tr M^(1/2) less that without the image, but for divisors
        if poles is not None:
            share = np.square(centered @ root) @ poles  # [B, Q], a z^T (M + s I)^(-1) z < 1
            np.minimum(share, 1.0 - np.finfo(np.float64).epsneg, out=share)
            lost -= np.log1p(-share) @ weights
        contributions[rows] = (
            2.0 * (centered @ shift)
            - norms / (count - 1)
            + (count * norms - spread) / (count - 2)
            - 2.0 * (count - 1) * (shrink * lost - constant)
        )
    return contributions


def inception_score_contributions(logits: Features, *, splits: int, seed: int) -> _Floats:
    """Contributions to the Inception Score (mean over splits).

    Image x of split s, one of S with n_s of the N images, contributes
    `N / (S n_s) IS_s KL(p(c|x) || q_s)`, q_s the split's mean. Measured against fresh samples the
    width is right to about 10 % from 1 image a class and split on, and 30 % too narrow at 0.3.

    Args:
        logits: `[N, C]` class scores, before the softmax.
        splits: Number of splits, 1 to N.
        seed: Seed of the metric's own shuffle.

    Returns:
        `[N]` float64, each image in its own place.

    Raises:
        DimoError: Not `[N, C]`, N < 2, a value is not finite, or `splits` outside 1 to N.
    """
    array = check_features(logits, name="logits", min_count=2)
    contributions = np.empty(len(array))
    for rows in split_rows(len(array), splits, seed):
        marginal = probability_sums(array, rows)[0] / len(rows)  # [C]
        log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))  # p is 0 there as well.
        divergence = np.empty(len(rows))
        for block in _blocks(len(rows)):
            log_p = log_softmax(array[rows[block]])  # [B, C]
            divergence[block] = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
        score = np.exp(divergence.mean())
        contributions[rows] = len(array) / (splits * len(rows)) * score * divergence
    return contributions


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


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, count))
