"""Transport distances: of fitted Gaussians (Frechet distance), and along directions (MIND).

On Inception features the Frechet distance is FID. Dowson and Landau 1982; Heusel et al. 2017
(arXiv 1706.08500), Eq. 6.

MIND, the Monge Inception Distance: optimal transport along random directions.

Berthet et al. 2026 (arXiv 2605.06797) project both sets of D features on random unit vectors u. On
a line, optimal transport pairs sorted values, so

    MIND = 3 D mean_u mean_i (x_(i) - y_(i))^2,

x_(i) the sorted `u.x` of n generated images, y_(i) the sorted `u.y` of n reference images. A shift
of all images by t costs about `3 |t|^2`. No moments are fitted, so equal means and covariances do
not make it 0.

Both sides need equally many rows. Of the larger side, n rows are drawn without replacement, n the
number of the smaller: the first n of `torch.randperm` of all its rows, from a CPU generator with
the seed. The same generator then gives the directions, `torch.randn` of `[projections, D]` in
float32, each scaled to length 1. Sides of equal size are taken whole. These are the draws of
torch-fidelity 0.5, whose values therefore agree to float32.

The contribution of a generated image is the mean over u of `3 D phi(u.x)`, phi the Kantorovich
potential: `phi' = 2 (x - T(x))` with T the transport map. It is the derivative of the squared
distance by the weight of that image (the pairing is optimal, so its own change has no effect to
first order), up to a range of slopes between neighbours, whose middle is the trapezoidal rule.
Compared with fresh samples, also within labels, an interval has the right width to about 10 % for
clearly different distributions; between nearly equal ones it is up to 1.3 times too wide.

FDr6 (FD-loss, 2026, arXiv 2604.28190) is a mean over six networks of the Frechet distance divided
by that of ImageNet's validation images from its training images, so that 1 is as good as real ones.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import lapack

from bench.features.stats import Features, FeatureStats, check_features, compute_stats, row_blocks
from bench.metrics.base import Samples, Score
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]
_EPS = float(np.finfo(np.float64).eps)
_BLOCK_ROWS = 2048  # Samples taken at a time; bounds memory, not results' meaning.
_STEP = 1.0  # Spacing of the quadrature nodes in log s: an error of exp(-2 pi^2 / step) = 3e-9.
_VALIDATION = {  # Frechet distance of ImageNet's validation set, as FD-loss's code rounds them
    "inception": 1.68,
    "convnext": 56.87,
    "dinov2": 14.19,
    "mae": 0.04,
    "siglip2": 0.60,
    "clip": 5.60,
}
_RANGE = 1e16  # Nodes reach from 1 / this to this times the largest eigenvalue: 1e-8.


def frechet_distance(*, generated: FeatureStats, reference: FeatureStats) -> float:
    """`|mu_g - mu_r|^2 + Tr(S_g) + Tr(S_r) - 2 Tr (S_g S_r)^(1/2)`, in float64.

    With `S = R R^T` for each side, the last trace is the sum of the singular values of
    `R_g^T R_r`. A square root of `S_g S_r` (scipy's `sqrtm`, or eigenvalues of the product) turns
    rounding of size 1e-16 in the zero eigenvalues of a covariance of few samples (N <= D) into
    1e-8 each; roots without these directions do not. Equal statistics may give a value of order
    -1e-13: no clipping hides the rounding.

    Raises: DimoError: The sides differ in extractor or dimension, or a sigma is no covariance.
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
    trace_root = _nuclear_norm(covariance_root(generated), covariance_root(reference))
    shift = generated.mu - reference.mu
    traces = float(np.trace(generated.sigma)) + float(np.trace(reference.sigma))
    return float(shift @ shift) + traces - 2.0 * trace_root


def score(samples: Samples) -> Score:
    reference = samples.statistics
    assert reference is not None
    stats = compute_stats(samples.generated, extractor=reference.extractor)
    contributions = frechet_contributions(
        generated=samples.generated, reference=reference, stats=stats
    )
    return Score(frechet_distance(generated=stats, reference=reference), contributions)


def score_fdr6(samples: Samples) -> Score:
    """Contributions are linear in those of the six distances; `extra` has the six ratios."""
    assert samples.parts.keys() == _VALIDATION.keys()
    ratios, contributions = dict[str, float](), np.zeros(len(samples.generated))
    for name, distance in _VALIDATION.items():
        found = score(samples.parts[name])
        ratios[name] = found.value / distance
        contributions += found.contributions / (distance * len(_VALIDATION))
    return Score(float(np.mean(list(ratios.values()))), contributions, extra=ratios)


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

    Compared with the spread of fresh samples, the interval's width is right to about 10 % for
    clearly different distributions, down to N = D / 2. Where the distance is no more than its
    bias of order D / N, the linear term vanishes and intervals are up to sqrt(2) too wide (with
    resampled images sqrt(3)).

    Args:
        generated: `[N, D]` features of the generated images, N >= 3.
        stats: Statistics of `generated`; None: they are computed.

    Raises: DimoError: Shapes do not fit, N < 3, or a value is not finite.
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
    for rows in row_blocks(count, _BLOCK_ROWS):
        centered = array[rows] - stats.mu  # [B, D]
        norms = np.einsum("nd,nd->n", centered, centered)
        lost = np.zeros(len(norms))  # Tr M^(1/2) less that without the image, but for divisors
        if poles is not None:
            ratio = np.square(centered @ root) @ poles  # [B, Q], a z^T (M + s I)^(-1) z < 1
            np.minimum(ratio, 1.0 - np.finfo(np.float64).epsneg, out=ratio)
            lost -= np.log1p(-ratio) @ weights
        contributions[rows] = (
            2.0 * (centered @ shift)
            - norms / (count - 1)
            + (count * norms - spread) / (count - 2)
            - 2.0 * (count - 1) * (shrink * lost - constant)
        )
    return contributions


def covariance_root(stats: FeatureStats) -> _Floats:
    """`R` `[D, rank]` with `R R^T = stats.sigma`, its columns sorted from large to small.

    A covariance of N samples has rank N - 1 at most. A Cholesky factorization with pivoting
    (LAPACK `pstrf`) stops where only rounding is left. A matrix that it does not reproduce, such as
    one rounded to float32 with eigenvalues below 0, goes to the eigensolver.

    Raises: DimoError: sigma has an eigenvalue too negative to be rounding.
    """
    sigma = stats.sigma
    factor, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    root: _Floats = np.zeros((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    probes = np.random.RandomState(0).standard_normal((len(sigma), 8))
    missed = float(np.abs(sigma @ probes - root @ (root.T @ probes)).max())
    if missed <= 1e-11 * len(sigma) ** 0.5 * float(sigma.diagonal().max()):
        return root
    values, vectors = np.linalg.eigh(sigma)
    values, vectors = values[::-1], vectors[:, ::-1]  # descending
    largest = max(float(values[0]), 0.0)
    if float(values[-1]) < -1e-3 * largest:
        raise DimoError(
            f"sigma of extractor {stats.extractor!r} has the eigenvalue {float(values[-1]):.3g} "
            f"(largest {largest:.3g}); a covariance has none below 0; recompute the statistics"
        )
    keep = values > largest * values.size * _EPS
    root = vectors[:, keep]
    root *= np.sqrt(values[keep])
    return root


def _nuclear_norm(left: _Floats, right: _Floats) -> float:
    """Sum of the singular values of `left.T @ right`, two results of `covariance_root`.

    They are the roots of the eigenvalues of the smaller product with itself, which is several
    times faster. Squares lose the digits of the small ones in general, but not here: the columns
    of a root fall from large to small, so the eigensolver works to the precision of each. Where
    one is no larger than the rounding of the largest, the singular values are computed directly.
    """
    if _spread(left) < _spread(right):
        left, right = right, left
    product = left.T @ right if left.shape[1] <= right.shape[1] else right.T @ left
    if not product.size:
        return 0.0
    squares = np.linalg.eigvalsh(product @ product.T)  # ascending
    if squares[0] > squares.size * _EPS * squares[-1]:
        return float(np.sqrt(squares).sum())
    return float(np.linalg.svd(product, compute_uv=False).sum())


def _spread(root: _Floats) -> float:
    """How far the lengths of the columns fall, as the ratio of the first to the last."""
    ends = np.linalg.norm(root[:, [0, -1]], axis=0) if root.size else np.ones(2)
    return float(ends[0] / ends[1])


def mind(
    *,
    generated: Features,
    reference: Features,
    projections: int = 1000,
    seed: int = 2020,
    chunk_size: int = 2**21,
) -> Score:
    """MIND of `[N, D]` and `[M, D]` features, in float64; contributions of `rows`, with mean 0.

    Args:
        chunk_size: Projected values of one side held at a time. No effect on the result.

    Raises: DimoError: Shapes do not fit, a value is not finite, or a setting is out of range.
    """
    ref = check_features(reference, name="reference features")
    gen = check_features(generated, name="generated features", dim=ref.shape[1])
    if projections < 1 or not 0 <= seed < 2**32 or chunk_size < 1:
        raise DimoError(
            f"projections is {projections}, seed {seed} and chunk_size {chunk_size}; allowed: 1 or "
            "more, 0 to 2^32 - 1, and 1 or more; use projections = 1000, seed = 2020"
        )
    count, dim = min(len(gen), len(ref)), ref.shape[1]
    rng = torch.Generator().manual_seed(seed)
    rows, others = (_drawn(size, count, rng) for size in (len(gen), len(ref)))
    directions = torch.randn(projections, dim, generator=rng).double().numpy()
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)  # [P, D]
    total, contributions = 0.0, np.zeros(count)
    for part in row_blocks(projections, max(1, chunk_size // count)):
        x, y = _projected(gen, rows, units[part]), _projected(ref, others, units[part])  # [p, n]
        order = x.argsort(axis=1)
        x = np.take_along_axis(x, order, axis=1)
        y.sort(axis=1)
        gaps = x - y
        total += float(np.square(gaps).sum())
        y[:, 0] = 0.0  # y becomes phi
        np.cumsum(np.diff(x, axis=1) * (gaps[:, 1:] + gaps[:, :-1]), axis=1, out=y[:, 1:])
        np.put_along_axis(x, order, y, axis=1)  # in the order of the rows
        contributions += x.sum(axis=0)
    scale = 3.0 * dim / projections
    contributions = scale * (contributions - contributions.mean())
    return Score(scale * total / count, contributions, rows=rows)


def score_mind(samples: Samples, **settings: int) -> Score:
    generated, reference = samples.sides()
    return mind(generated=generated, reference=reference, **settings)


def _drawn(size: int, count: int, rng: torch.Generator) -> npt.NDArray[np.int64]:
    rows = torch.randperm(size, generator=rng)[:count] if size > count else torch.arange(size)
    return rows.numpy()


def _projected(array: npt.NDArray[Any], rows: npt.NDArray[np.int64], units: _Floats) -> _Floats:
    """`[p, n]` inner products of p units with n rows, without a copy of all these rows."""
    values = np.empty((len(units), len(rows)))
    for block in row_blocks(len(rows), _BLOCK_ROWS):
        values[:, block] = units @ array[rows[block]].astype(np.float64).T
    return values
