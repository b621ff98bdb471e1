"""Inception Score (Salimans et al. 2016, arXiv 1606.03498) over shuffled splits."""

__all__ = ["InceptionScore", "inception_score", "log_softmax", "split_bounds"]

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.stats import Features, check_features
from dimo.errors import DimoError


@dataclass(frozen=True)
class InceptionScore:
    """Mean and population standard deviation (ddof 0) of the score over the splits."""

    mean: float
    std: float


def inception_score(logits: Features, *, splits: int, seed: int) -> InceptionScore:
    """`mean_s exp(mean_{x in s} KL(p(c|x) || mean_{x in s} p(c|x)))`.

    Rows are shuffled by `numpy.random.RandomState(seed).permutation(N)` and split s takes rows
    `s * N // splits` to `(s + 1) * N // splits`, which is torch-fidelity's rule (its seed is
    2020). Without the shuffle, images sorted by class lose most of their score, since a split
    then holds few classes. The softmax is taken in float64, and `0 log 0` is 0.

    Args:
        logits: `[N, C]` class scores, before the softmax.
        splits: Number of splits, 1 to N.
        seed: Seed of the shuffle.

    Raises:
        DimoError: Not `[N, C]`, not finite, N < 2, or `splits` outside 1 to N.
    """
    array = check_features(logits, name="logits", min_count=2)
    bounds = split_bounds(len(array), splits)
    order = np.random.RandomState(seed).permutation(len(array))
    scores = [_split_score(array[order[start:stop]]) for start, stop in pairwise(bounds)]
    return InceptionScore(mean=float(np.mean(scores)), std=float(np.std(scores)))


def split_bounds(count: int, splits: int) -> npt.NDArray[np.int64]:
    """The `splits + 1` row bounds that cut `count` rows into near-equal splits.

    Raises:
        DimoError: `splits` is not in 1 to `count`.
    """
    if not 1 <= splits <= count:
        raise DimoError(
            f"splits is {splits} for {count} images; allowed: 1 to {count}; "
            "score more images or use fewer splits"
        )
    return np.arange(splits + 1, dtype=np.int64) * count // splits


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Log-probabilities `[N, C]` float64 of `logits` `[N, C]`."""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _split_score(logits: npt.NDArray[Any]) -> float:
    log_p = log_softmax(logits)  # [n, C]
    p = np.exp(log_p)
    marginal = p.mean(axis=0)  # [C]
    seen = marginal > 0  # A class of probability 0 in every row adds 0 log 0 = 0.
    divergence = (p[:, seen] * (log_p[:, seen] - np.log(marginal[seen]))).sum(axis=1)
    return float(np.exp(divergence.mean()))
