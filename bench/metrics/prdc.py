"""Precision, recall, density and coverage of k-nearest-neighbour manifolds.

Kynkaanniemi et al. 2019 (arXiv 1904.06991) for precision and recall, Naeem et al. 2020 (arXiv
2002.09797) for density and coverage. The convention is that of the `prdc` package:

- The radius of a sample is its distance to its k-th nearest neighbour in its own set, itself left
  out. A copy of a sample is a neighbour like any other, at distance 0.
- A ball is open: a point exactly on the radius is outside (strict `<`; other tools use `<=`). So
  a sample with k or more copies has radius 0 and an empty ball, and a set of one repeated image
  scores 0, not 1.

Ties decide here, so every comparison is settled on one canonical squared distance, the float64
sum of squared differences of the two rows. Matrix products only sort out the pairs that their
error bound leaves in no doubt. The result depends neither on the chunk size nor on the order of
the rows nor on the BLAS, and a row is at distance exactly 0 from its copies.
"""

__all__ = ["PRDC", "ManifoldMembership", "coverage_ceiling", "manifold_membership", "prdc"]

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.stats import Features, check_features
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.intp]

_GATHER_ELEMENTS = 1 << 21  # Elements of one block of exact differences (16 MiB).
_CROWDED = 8  # A row with more than this times k candidates gets a tighter threshold.


@dataclass(frozen=True)
class PRDC:
    """The four scores, and what coverage would be for two samples of one distribution.

    Precision, recall and coverage are in 0 to 1; density is not bounded by 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    coverage_ceiling: float


@dataclass(frozen=True, eq=False)
class ManifoldMembership:
    """Per-sample contributions, whose means are the scores.

    Attributes:
        precision: `[N]` float64, 1.0 where a generated sample lies in a reference ball, else 0.0.
        recall: `[M]` float64, 1.0 where a reference sample lies in a generated ball, else 0.0.
        density: `[N]` float64, number of reference balls around a generated sample, over k.
        coverage: `[M]` float64, 1.0 where a reference ball holds a generated sample, else 0.0.
    """

    precision: _Floats
    recall: _Floats
    density: _Floats
    coverage: _Floats


def prdc(*, generated: Features, reference: Features, k: int, chunk_size: int = 2048) -> PRDC:
    """Precision, recall, density, coverage, and the expected coverage of a perfect generator.

    Args:
        generated: `[N, D]` features of the generated images.
        reference: `[M, D]` features of the reference images.
        k: Which nearest neighbour sets the radius, 1 or more.
        chunk_size: Rows and columns of a tile of distances; memory grows with its square, not
            with N or M. No effect on the result.

    Raises:
        DimoError: Shapes do not fit, a value is not finite, k or chunk_size is below 1, or a set
            has fewer than k + 1 samples.
    """
    membership = manifold_membership(
        generated=generated, reference=reference, k=k, chunk_size=chunk_size
    )
    return PRDC(
        precision=float(membership.precision.mean()),
        recall=float(membership.recall.mean()),
        density=float(membership.density.mean()),
        coverage=float(membership.coverage.mean()),
        coverage_ceiling=coverage_ceiling(len(membership.precision), len(membership.coverage), k),
    )


def manifold_membership(
    *, generated: Features, reference: Features, k: int, chunk_size: int = 2048
) -> ManifoldMembership:
    """The per-sample contributions that `prdc` averages; arguments and errors are the same."""
    if k < 1 or chunk_size < 1:
        raise DimoError(
            f"k is {k} and chunk_size {chunk_size}; allowed: 1 or more; "
            "use k = 3, chunk_size = 2048"
        )
    ref = check_features(reference, name="reference features")
    gen = check_features(generated, name="generated features", dim=ref.shape[1])
    for name, array in (("generated", gen), ("reference", ref)):
        if len(array) < k + 1:
            raise DimoError(
                f"{len(array)} {name} samples for k = {k}; allowed: at least k + 1 = {k + 1}; "
                "score more images or lower k"
            )
    ref_radii = _squared_radii(ref, k, chunk_size)  # [M]
    gen_radii = _squared_radii(gen, k, chunk_size)  # [N]

    balls_around = np.zeros(len(gen), dtype=np.int64)
    covered = np.zeros(len(ref), dtype=bool)
    recalled = np.zeros(len(ref), dtype=bool)
    center = _center(ref)
    slack = _relative_error(ref.shape[1])
    for rows in _chunks(len(ref), chunk_size):
        a, a_norms = _centered(ref[rows], center)
        for cols in _chunks(len(gen), chunk_size):
            b, b_norms = _centered(gen[cols], center)
            approx = _approximate(a, a_norms, b, b_norms)
            error = slack * (a_norms.max() + b_norms.max())
            in_ref = _strictly_below(approx, ref_radii[rows, None], error, ref[rows], gen[cols])
            in_gen = _strictly_below(approx, gen_radii[None, cols], error, ref[rows], gen[cols])
            balls_around[cols] += in_ref.sum(axis=0)
            covered[rows] |= in_ref.any(axis=1)
            recalled[rows] |= in_gen.any(axis=1)
    return ManifoldMembership(
        precision=(balls_around > 0).astype(np.float64),
        recall=recalled.astype(np.float64),
        density=balls_around / k,
        coverage=covered.astype(np.float64),
    )


def coverage_ceiling(num_generated: int, num_reference: int, k: int) -> float:
    """Expected coverage when both sets come from one continuous distribution.

    A ball is missed when the k nearest of the M - 1 + N other samples are all reference ones:
    probability `prod_{i=1..k} (M - i) / (N + M - i)`.
    """
    i = np.arange(1, k + 1)
    missed = (num_reference - i) / (num_generated + num_reference - i)
    return float(1.0 - missed.prod())


def _squared_radii(features: npt.NDArray[Any], k: int, chunk_size: int) -> _Floats:
    """Canonical squared distance of each row to its k-th nearest other row, `[N]`."""
    nearest = np.full((len(features), k), np.inf)  # The k smallest so far, ascending.
    nearest[_copies(features) > k] = 0.0  # Final already: spares all pairs of a collapsed set.
    center = _center(features)
    slack = _relative_error(features.shape[1])
    chunks = list(_chunks(len(features), chunk_size))
    for position, rows in enumerate(chunks):
        a, a_norms = _centered(features[rows], center)
        for cols in chunks[position:]:  # The matrix is symmetric: each tile serves both its sides.
            b, b_norms = _centered(features[cols], center)
            approx = _approximate(a, a_norms, b, b_norms)
            error = slack * (a_norms.max() + b_norms.max())
            if rows == cols:
                np.fill_diagonal(approx, np.inf)
            _keep_nearest(nearest[rows], approx, error, features[rows], features[cols])
            if rows != cols:
                _keep_nearest(nearest[cols], approx.T, error, features[cols], features[rows])
    return nearest[:, -1]


def _keep_nearest(
    nearest: _Floats,
    approx: _Floats,
    error: float,
    left: npt.NDArray[Any],
    right: npt.NDArray[Any],
) -> None:
    """Merges the distances of one tile into `nearest` `[R, k]`, in place.

    Args:
        nearest: The k smallest canonical squared distances of each row so far, ascending.
        approx: Approximate squared distances `[R, C]`, infinite where a pair is to be skipped.
        error: Bound on their absolute error.
        left: Features of the rows `[R, D]`.
        right: Features of the columns `[C, D]`.
    """
    k = nearest.shape[1]
    threshold = np.where(nearest[:, -1] > 0, nearest[:, -1] + error, -np.inf)
    candidate = approx <= threshold[:, None]
    crowded = np.flatnonzero(candidate.sum(axis=1) > _CROWDED * k)
    if crowded.size:
        tile_kth = np.partition(approx[crowded], k - 1, axis=1)[:, k - 1]
        threshold[crowded] = np.minimum(threshold[crowded], tile_kth + 2 * error)
        candidate[crowded] = approx[crowded] <= threshold[crowded, None]
    candidate &= np.isfinite(approx)
    row, col = np.nonzero(candidate)
    if not row.size:
        return
    distance = _canonical(left, row, right, col)
    order = np.lexsort((distance, row))
    row, distance = row[order], distance[order]
    place = np.arange(row.size) - np.searchsorted(row, row)  # 0, 1, ... within each row
    best = place < k
    found = np.full_like(nearest, np.inf)
    found[row[best], place[best]] = distance[best]
    nearest[:] = np.sort(np.concatenate([nearest, found], axis=1), axis=1)[:, :k]


def _strictly_below(
    approx: _Floats,
    squared_radii: _Floats,
    error: float,
    left: npt.NDArray[Any],
    right: npt.NDArray[Any],
) -> npt.NDArray[np.bool_]:
    """Where the canonical squared distance is `< squared_radii` (broadcast), `[R, C]`."""
    margin = error + 1e-15 * squared_radii
    inside = approx < squared_radii - margin
    possible = approx < squared_radii + margin
    possible &= squared_radii > 0
    row, col = np.nonzero(inside != possible)
    if row.size:
        radii = np.broadcast_to(squared_radii, approx.shape)[row, col]
        inside[row, col] = _canonical(left, row, right, col) < radii
    return inside


def _canonical(left: npt.NDArray[Any], row: _Ints, right: npt.NDArray[Any], col: _Ints) -> _Floats:
    """Squared distances `[P]` of the pairs `left[row]`, `right[col]`, summed in float64.

    Each depends on its two rows alone, and is the same when they change sides.
    """
    distances = np.empty(row.size)
    step = max(1, _GATHER_ELEMENTS // left.shape[1])
    for start in range(0, row.size, step):
        pairs = slice(start, start + step)
        difference = left[row[pairs]].astype(np.float64)
        difference -= right[col[pairs]]
        np.square(difference, out=difference)
        distances[pairs] = difference.sum(axis=1)
    return distances


def _approximate(a: _Floats, a_norms: _Floats, b: _Floats, b_norms: _Floats) -> _Floats:
    """Squared distances `[R, C]` by `|a|^2 + |b|^2 - 2 a.b`."""
    tile = a @ b.T
    tile *= -2.0
    tile += a_norms[:, None]
    tile += b_norms[None, :]
    return tile


def _relative_error(dim: int) -> float:
    """c such that `_approximate` and `_canonical` differ by less than `c (|a|^2 + |b|^2)`.

    With u = eps / 2, a sum of D products in any order errs by at most D u times the sum of their
    sizes. The product form errs by (D + 2) u (|a| + |b|)^2, the centering before it by 2 u of the
    same, the canonical sum by (D + 2) u |a - b|^2, and `(|a| + |b|)^2 <= 2 (|a|^2 + |b|^2)`:
    together 2 (D + 3) eps. Doubled, to cover second-order terms and the comparisons themselves.
    """
    return float(4 * (dim + 3) * np.finfo(np.float64).eps)


def _center(features: npt.NDArray[Any]) -> _Floats:
    """A point amid the features, `[D]`: distances keep, norms and so the error bound shrink."""
    center: _Floats = features.mean(axis=0, dtype=np.float64)
    return center


def _centered(features: npt.NDArray[Any], center: _Floats) -> tuple[_Floats, _Floats]:
    """`features - center` `[R, D]` in float64 and its squared row norms `[R]`."""
    centered = features - center
    return centered, np.einsum("nd,nd->n", centered, centered)


def _copies(features: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """How many rows equal each row, itself included, `[N]`."""
    digests = [  # Adding 0.0 turns -0.0, which is equal to 0.0, into it.
        hashlib.blake2b((row + 0.0).tobytes(), digest_size=16).digest() for row in features
    ]
    counts = Counter(digests)
    return np.fromiter((counts[digest] for digest in digests), np.int64, len(digests))


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
