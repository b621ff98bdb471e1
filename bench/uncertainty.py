"""Bootstrap intervals (Efron 1979) for every metric: images are resampled, never generated anew.

An interval tells how far the value may move when the same model draws other images. The
reference set and its balls are held fixed, as the protocol fixes them. Recall and coverage are
averages over reference images, so their interval resamples those.

Draws come from `numpy.random.RandomState`, whose stream numpy has frozen: a seed gives the same
interval under every numpy version.
"""

__all__ = [
    "Interval",
    "bootstrap_frechet",
    "bootstrap_inception_score",
    "bootstrap_mean",
]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.metrics.frechet import covariance_root
from bench.metrics.inception_score import log_softmax, split_bounds
from bench.stats import Features, FeatureStats, as_numpy, check_features
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval, `low <= high`."""

    low: float
    high: float


def bootstrap_mean(
    values: Features, *, n_bootstrap: int, seed: int, level: float = 0.95
) -> Interval:
    """Percentile interval of a mean of per-sample contributions.

    For precision, recall, density and coverage (`bench.metrics.manifold_membership`) and class
    accuracy (`bench.metrics.class_hits`).

    Args:
        values: `[N]` contributions whose mean is the metric.
        n_bootstrap: Number of resamples.
        seed: Seed of the resamples.
        level: Confidence level, between 0 and 1.

    Raises:
        DimoError: `values` is not `[N]`, is empty or not finite, or a setting is out of range.
    """
    array = as_numpy(values)
    if array.ndim != 1:
        raise DimoError(f"values have shape {list(array.shape)}; allowed: [N]; pass one a sample")
    array = check_features(array[:, None], name="values")[:, 0].astype(np.float64)
    _check_settings(n_bootstrap, level)
    means = np.array([array[drawn].mean() for drawn in _resamples(len(array), n_bootstrap, seed)])
    low, high = np.quantile(means, _tails(level))
    return Interval(float(low), float(high))


def bootstrap_frechet(
    *,
    generated: Features,
    reference: FeatureStats,
    point: float,
    n_bootstrap: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Interval of the Frechet distance around its value `point`.

    A resample repeats images and so estimates a covariance worse: its distance is biased upward,
    on top of the bias that `point` has at this N. So only the spread of the resamples is used:
    their quantiles are moved so that their median falls on `point`. The low end stops at 0.

    With `S_r = R R^T`, `Tr (S_g S_r)^(1/2)` is `Tr (R^T S_g R)^(1/2)`, and `R^T S_g R` is the
    covariance of the features times R: one product with R serves all resamples. Each then costs
    O(N D^2 + D^3).

    Args:
        generated: `[N, D]` features of the generated images.
        reference: Statistics of the reference images.
        point: The distance of the full sample, from `frechet_distance`.
        n_bootstrap: Number of resamples.
        seed: Seed of the resamples.
        level: Confidence level, between 0 and 1.

    Raises:
        DimoError: Shapes do not fit, N < 2, a value is not finite, or a setting is out of range.
    """
    array = check_features(generated, name="generated features", dim=reference.mu.size, min_count=2)
    _check_settings(n_bootstrap, level, point)
    centered = array - reference.mu  # [N, D] float64
    rotated = centered @ covariance_root(reference)  # [N, rank]
    norms = np.einsum("nd,nd->n", centered, centered)  # [N]
    reference_trace = float(np.trace(reference.sigma))
    distances = np.array(
        [
            _frechet_of_resample(drawn, centered, rotated, norms) + reference_trace
            for drawn in _resamples(len(array), n_bootstrap, seed)
        ]
    )
    return _around(point, distances, level, smallest=0.0)


def bootstrap_inception_score(
    logits: Features,
    *,
    splits: int,
    seed: int,
    point: float,
    n_bootstrap: int,
    level: float = 0.95,
) -> Interval:
    """Interval of the Inception Score (mean over splits) around its value `point`.

    Rows are drawn in random order and cut into splits, which stands in for the shuffle. A
    resample is biased, so its quantiles are moved as in `bootstrap_frechet`; the low end stops at
    1, the score of images without a class.

    Args:
        logits: `[N, C]` class scores, before the softmax.
        splits: Number of splits, 1 to N.
        seed: Seed of the resamples.
        point: The score of the full sample, from `inception_score`.
        n_bootstrap: Number of resamples.
        level: Confidence level, between 0 and 1.

    Raises:
        DimoError: Not `[N, C]`, N < 2, a value is not finite, or a setting is out of range.
    """
    array = check_features(logits, name="logits", min_count=2)
    _check_settings(n_bootstrap, level, point)
    bounds = split_bounds(len(array), splits)
    log_p = log_softmax(array)
    p = np.exp(log_p)  # [N, C]
    log_p *= p
    negative_entropy = log_p.sum(axis=1)  # [N]
    scores = np.array(
        [
            _score_of_resample(drawn, bounds, p, negative_entropy)
            for drawn in _resamples(len(array), n_bootstrap, seed)
        ]
    )
    return _around(point, scores, level, smallest=1.0)


def _frechet_of_resample(
    drawn: npt.NDArray[np.int64], centered: _Floats, rotated: _Floats, norms: _Floats
) -> float:
    """Distance to the reference less the trace of its sigma.

    Args:
        drawn: Rows of the resample, `[N]`.
        centered: Features minus the reference mean, `[N, D]`.
        rotated: `centered` times the root of the reference covariance, `[N, rank]`.
        norms: Squared row norms of `centered`, `[N]`.
    """
    count = drawn.size
    times = np.bincount(drawn, minlength=count).astype(np.float64)
    shift = times @ centered / count  # [D]
    rows = np.flatnonzero(times)  # About 63 % of all rows, each once.
    weights = times[rows]
    chosen = rotated[rows]  # [n, rank]
    chosen -= weights @ chosen / count
    chosen *= np.sqrt(weights)[:, None]
    values = np.linalg.eigvalsh(chosen.T @ chosen / (count - 1))
    trace_root = np.sqrt(np.maximum(values, 0.0)).sum()
    shift_norm = float(shift @ shift)
    trace = (float(times @ norms) - count * shift_norm) / (count - 1)
    return shift_norm + trace - 2.0 * float(trace_root)


def _score_of_resample(
    drawn: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    p: _Floats,
    negative_entropy: _Floats,
) -> float:
    """Mean Inception Score of the splits `drawn[bounds[s]:bounds[s + 1]]`.

    The mean divergence of a split is its mean `sum_c p log p` minus `sum_c q log q` of its
    marginal q, and a product with the matrix of counts gives every marginal at once.
    """
    count, splits = drawn.size, bounds.size - 1
    sizes = np.diff(bounds)  # [S]
    cell = np.repeat(np.arange(splits), sizes) * count + drawn
    weights = np.bincount(cell, minlength=splits * count).reshape(splits, count) / sizes[:, None]
    marginal = weights @ p  # [S, C]
    log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))  # 0 log 0 = 0
    divergence = weights @ negative_entropy - (marginal * log_marginal).sum(axis=1)
    return float(np.exp(divergence).mean())


def _resamples(count: int, n_bootstrap: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    rng = np.random.RandomState(seed)
    for _ in range(n_bootstrap):
        yield rng.randint(count, size=count, dtype=np.int64)


def _around(point: float, replicates: _Floats, level: float, *, smallest: float) -> Interval:
    """The quantiles of `replicates`, moved so that their median falls on `point`."""
    low, high = np.quantile(replicates, _tails(level)) - np.median(replicates) + point
    return Interval(max(float(low), min(smallest, point)), float(high))


def _tails(level: float) -> tuple[float, float]:
    return (1.0 - level) / 2.0, (1.0 + level) / 2.0


def _check_settings(n_bootstrap: int, level: float, point: Any = 0.0) -> None:
    if n_bootstrap < 1 or not 0.0 < level < 1.0:
        raise DimoError(
            f"n_bootstrap is {n_bootstrap} and level {level}; allowed: 1 or more, and between 0 "
            "and 1; use n_bootstrap = 200, level = 0.95"
        )
    if not np.isfinite(point):
        raise DimoError(f"point is {point}; allowed: a finite number; compute the metric first")
