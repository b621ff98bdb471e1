"""Frechet distance between two Gaussians; on Inception features this is FID.

Dowson and Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), Eq. 6.
"""

__all__ = ["covariance_root", "frechet_distance"]

import numpy as np
import numpy.typing as npt

from bench.stats import FeatureStats
from dimo.errors import DimoError


def frechet_distance(*, generated: FeatureStats, reference: FeatureStats) -> float:
    """`|mu_g - mu_r|^2 + Tr(S_g) + Tr(S_r) - 2 Tr (S_g S_r)^(1/2)`, in float64.

    With `S = R R^T` for each side, the last trace is the sum of the singular values of
    `R_g^T R_r`. These are found to absolute precision, while a square root of `S_g S_r`
    (scipy's `sqrtm`, or eigenvalues of the product) turns rounding of size 1e-16 in the zero
    eigenvalues of a covariance of few samples (N <= D) into 1e-8 each. Equal statistics may give
    a value of order -1e-13: no clipping hides the rounding.

    Args:
        generated: Statistics of the generated images.
        reference: Statistics of the reference images, same extractor and dimension.

    Raises:
        DimoError: The two sides differ in extractor or dimension, or a sigma is no covariance.
    """
    if generated.extractor != reference.extractor:
        raise DimoError(
            f"generated statistics are of extractor {generated.extractor!r}, reference ones of "
            f"{reference.extractor!r}; use one extractor for both"
        )
    if generated.mu.shape != reference.mu.shape:
        raise DimoError(
            f"generated statistics have dimension {generated.mu.size}, reference ones "
            f"{reference.mu.size}; use one extractor for both"
        )
    product = covariance_root(generated).T @ covariance_root(reference)  # [rank_g, rank_r]
    trace_root = float(np.linalg.svd(product, compute_uv=False).sum())
    shift = generated.mu - reference.mu
    traces = float(np.trace(generated.sigma)) + float(np.trace(reference.sigma))
    return float(shift @ shift) + traces - 2.0 * trace_root


def covariance_root(stats: FeatureStats) -> npt.NDArray[np.float64]:
    """A matrix `R` `[D, rank]` with `R R^T = stats.sigma`.

    A covariance of N samples has rank N - 1 at most. What the eigensolver returns below its own
    precision is rounding and is left out, which also removes all beyond that rank.

    Raises:
        DimoError: sigma has an eigenvalue too negative to be rounding.
    """
    values, vectors = np.linalg.eigh(stats.sigma)  # ascending
    largest = max(float(values[-1]), 0.0)
    if float(values[0]) < -1e-3 * largest:
        raise DimoError(
            f"sigma of extractor {stats.extractor!r} has the eigenvalue {float(values[0]):.3g} "
            f"(largest {largest:.3g}); a covariance has none below 0; recompute the statistics"
        )
    keep = values > largest * values.size * np.finfo(np.float64).eps
    root: npt.NDArray[np.float64] = vectors[:, keep] * np.sqrt(values[keep])
    return root
