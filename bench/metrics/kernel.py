"""Maximum mean discrepancies: KID and CMMD, with per-sample contributions.

`MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, x generated and y reference (Gretton et
al. 2012). KID (Binkowski et al. 2018, arXiv 1801.01401) takes `k = (gamma x.y + coef0)^degree`
on Inception features and averages the unbiased estimate over random subsets. CMMD (Jayasumana et
al. 2024, arXiv 2401.09603) takes `k = exp(-|x - y|^2 / (2 sigma^2))` on normalised CLIP embeddings
and the biased estimate over all pairs.

Compared with fresh samples, an interval from these contributions has the right width to about 10 %
for clearly different distributions; for nearly equal ones it is too wide, by up to 20 % for KID and
up to a factor sqrt(2) for CMMD. KID's subsets mix labels at random, so `labels` of
`bootstrap_interval` hardly reduces its width, which is then up to three times too wide.

All sums are float64, and no function holds more of a kernel matrix than one tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.features.stats import Features, check_features, row_blocks
from bench.metrics.base import Samples, Score
from dimo.errors import DimoError

_Array = npt.NDArray[Any]
_Floats = npt.NDArray[np.float64]


def kernel_distance(
    *,
    generated: Features,
    reference: Features,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    degree: int = 3,
    coef0: float = 1.0,
    gamma: float | None = None,
) -> Score:
    """KID of `[N, D]` and `[M, D]` features: unbiased MMD^2, its mean and `std` over subsets.

    The subsets are torch-fidelity's for `input1` generated and `input2` reference: for each, a
    `RandomState(seed).choice` without replacement of generated rows, then one of reference rows.

    In a subset, sample i has the witness `w_i`, twice the mean of `k(x_i, x_j)` over the other x
    less twice that of `k(x_i, y_j)`. Its contribution is `N / (subsets * subset_size)` times the
    sum of `w_i - mean w` over the subsets that hold it, 0 if none does; together they sum to 0.
    Their spread includes that of the subsets. A witness over all N M pairs would lack it and be
    several times too narrow where the subsets hold few of the pairs.

    Args:
        subset_size: Rows of each side in a subset, 2 to min(N, M).
        gamma: Scale of the inner product; None is 1 / D.

    Raises: DimoError: Shapes do not fit, a value is not finite, or a setting is out of range.
    """
    gen, ref = _check_sides(generated, reference)
    distances, contributions = [], np.zeros(len(gen))
    for chosen, others in _draw_subsets(len(gen), len(ref), subsets, subset_size, seed):
        x, y = gen[chosen].astype(np.float64), ref[others].astype(np.float64)  # [m, D]
        within = _mean_of_others(_polynomial(x, x, degree, coef0, gamma))  # [m]
        across = _polynomial(x, y, degree, coef0, gamma)  # [m, m]
        distance = within.mean() + _mean_of_others(_polynomial(y, y, degree, coef0, gamma)).mean()
        distances.append(distance - 2.0 * across.mean())
        witness = within - across.mean(axis=1)
        contributions[chosen] += 2.0 * (witness - witness.mean())
    contributions *= len(gen) / (subsets * subset_size)
    extra = {"std": float(np.std(distances))}
    return Score(float(np.mean(distances)), contributions, extra=extra, smallest=None)


def cmmd(
    *,
    generated: Features,
    reference: Features,
    sigma: float = 10.0,
    scale: float = 1000.0,
    chunk_size: int = 2048,
) -> Score:
    """CMMD: `scale` times the biased MMD^2 under a Gaussian kernel, rows scaled to length 1.

    Contributions are the witness `2 scale (mean_j k(x_i, x_j) - mean_j k(x_i, y_j))`.

    Args:
        chunk_size: Rows and columns of a tile of the kernel matrix. No effect on the result.

    Raises: DimoError: As `kernel_distance`, or a row is zero.
    """
    gen, ref = _unit_rows(generated, reference, sigma, chunk_size)
    same, other = (_gaussian_sums(gen, right, sigma, chunk_size) for right in (gen, ref))  # [N]
    within = same.sum() / len(gen) ** 2
    within += _gaussian_sums(ref, ref, sigma, chunk_size).sum() / len(ref) ** 2
    across = other.sum() / (len(gen) * len(ref))
    witness = 2.0 * scale * (same / len(gen) - other / len(ref))
    return Score(float(scale * (within - 2.0 * across)), witness)


def score_kid(samples: Samples, **settings: int) -> Score:
    generated, reference = samples.sides()
    return kernel_distance(generated=generated, reference=reference, **settings)


def score_cmmd(samples: Samples) -> Score:
    generated, reference = samples.sides()
    return cmmd(generated=generated, reference=reference)


def _check_sides(generated: Features, reference: Features) -> tuple[_Array, _Array]:
    ref = check_features(reference, name="reference features")
    return check_features(generated, name="generated features", dim=ref.shape[1]), ref


def _draw_subsets(
    num_generated: int, num_reference: int, subsets: int, subset_size: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows of the generated and of the reference side, subset by subset."""
    if subsets < 1 or subset_size < 2:
        raise DimoError(
            f"subsets is {subsets} and subset_size {subset_size}; allowed: 1 or more, and 2 or "
            "more; use subsets = 100, subset_size = 1000"
        )
    for name, count in (("generated", num_generated), ("reference", num_reference)):
        if count < subset_size:
            raise DimoError(
                f"{count} {name} samples for subset_size = {subset_size}; allowed: at least "
                f"{subset_size}; score more images, or lower subset_size in the protocol"
            )
    rng = np.random.RandomState(seed)
    for _ in range(subsets):
        chosen = rng.choice(num_generated, subset_size, replace=False)
        yield chosen, rng.choice(num_reference, subset_size, replace=False)


def _polynomial(
    left: _Floats, right: _Floats, degree: int, coef0: float, gamma: float | None
) -> _Floats:
    """`(gamma x.y + coef0)^degree` of all pairs; by products, 20 times faster than a power."""
    if degree < 1:
        raise DimoError(f"degree is {degree}; allowed: 1 or more; KID has degree = 3")
    base: _Floats = left @ right.T
    base *= 1.0 / left.shape[1] if gamma is None else gamma
    base += coef0
    kernel = base.copy()
    for _ in range(degree - 1):
        kernel *= base
    return kernel


def _mean_of_others(kernel: _Floats) -> _Floats:
    """Row means `[m]` of a square kernel matrix without its diagonal."""
    means: _Floats = (kernel.sum(axis=1) - kernel.diagonal()) / (len(kernel) - 1)
    return means


@dataclass(frozen=True, eq=False)
class _UnitRows:
    """Rows to be scaled to length 1 when they are read, so that no copy of all is held."""

    array: _Array  # [N, D]
    norms: _Floats  # [N]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice) -> _Floats:
        return self.array[rows] / self.norms[rows, None]


def _unit_rows(
    generated: Features, reference: Features, sigma: float, chunk_size: int
) -> tuple[_UnitRows, _UnitRows]:
    if sigma <= 0 or chunk_size < 1:
        raise DimoError(
            f"sigma is {sigma} and chunk_size {chunk_size}; allowed: above 0, and 1 or more; "
            "use sigma = 10, chunk_size = 2048"
        )
    gen, ref = _check_sides(generated, reference)
    sides = []
    for name, array in (("generated", gen), ("reference", ref)):
        norms = np.empty(len(array))
        for rows in row_blocks(len(array), chunk_size):
            norms[rows] = np.linalg.norm(array[rows].astype(np.float64), axis=1)
        zero = np.flatnonzero(norms == 0)
        if zero.size:
            raise DimoError(
                f"{name} features hold {zero.size} zero rows, the first is row {zero[0]}; allowed: "
                "rows with a direction; check those images and the extractor"
            )
        sides.append(_UnitRows(array, norms))
    return sides[0], sides[1]


def _gaussian_sums(left: _UnitRows, right: _UnitRows, sigma: float, chunk_size: int) -> _Floats:
    """`sum_j (k(x_i, y_j) - 1)` for each row i of `left`, `[N]`.

    At length 1 and sigma = 10 every k is above 0.98. The 1 drops out of any MMD, and without it
    the sums, which are float64, keep two more digits.
    """
    sums = np.zeros(len(left))
    same = left is right
    for rows in row_blocks(len(left), chunk_size):
        x = left[rows]
        for cols in row_blocks(len(right), chunk_size):
            if same and cols.start < rows.start:
                continue  # The matrix is symmetric: each tile serves both its sides.
            tile = x @ right[cols].T
            tile -= 1.0
            tile /= sigma**2  # -|x - y|^2 / (2 sigma^2)
            np.expm1(tile, out=tile)
            sums[rows] += tile.sum(axis=1, dtype=np.float64)
            if same and cols != rows:
                sums[cols] += tile.sum(axis=0, dtype=np.float64)
    return sums
