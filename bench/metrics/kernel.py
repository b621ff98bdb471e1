"""Maximum mean discrepancies: KID and CMMD, and what each generated sample contributes to them.

`MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, x generated and y reference (Gretton et
al. 2012). KID (Binkowski et al. 2018, arXiv 1801.01401) takes `k = (gamma x.y + coef0)^degree`
on Inception features and averages the unbiased estimate over random subsets. CMMD (Jayasumana et
al. 2024, arXiv 2401.09603) takes `k = exp(-|x - y|^2 / (2 sigma^2))` on normalised CLIP embeddings
and the biased estimate over all pairs.

All sums are float64, and no function holds more of a kernel matrix than one tile.
"""

__all__ = [
    "KernelDistance",
    "cmmd",
    "cmmd_witness",
    "kernel_distance",
    "kernel_distance_witness",
]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.stats import Features, check_features
from dimo.errors import DimoError

_Array = npt.NDArray[Any]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KernelDistance:
    """Mean and population standard deviation (ddof 0) over the subsets; below 0 is legal."""

    mean: float
    std: float


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
) -> KernelDistance:
    """KID: unbiased MMD^2 under a polynomial kernel, over random subsets.

    The subsets are torch-fidelity's for `input1` generated and `input2` reference: for each, a
    `RandomState(seed).choice` without replacement of generated rows, then one of reference rows.

    Args:
        generated: `[N, D]` features of the generated images.
        reference: `[M, D]` features of the reference images.
        subsets: Number of subsets.
        subset_size: Rows of each side in a subset, 2 to min(N, M).
        seed: Seed of the subsets.
        degree: Power of the kernel, 1 or more.
        coef0: Constant of the kernel.
        gamma: Scale of the inner product; None is 1 / D.

    Raises:
        DimoError: Shapes do not fit, a value is not finite, or a setting is out of range.
    """
    gen, ref = _check_sides(generated, reference)
    distances = []
    for chosen, others in _draw_subsets(len(gen), len(ref), subsets, subset_size, seed):
        x, y = gen[chosen].astype(np.float64), ref[others].astype(np.float64)  # [m, D]
        within = _mean_of_others(_polynomial(x, x, degree, coef0, gamma)).mean()
        within += _mean_of_others(_polynomial(y, y, degree, coef0, gamma)).mean()
        distances.append(within - 2.0 * _polynomial(x, y, degree, coef0, gamma).mean())
    return KernelDistance(mean=float(np.mean(distances)), std=float(np.std(distances)))


def kernel_distance_witness(
    *,
    generated: Features,
    reference: Features,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    degree: int = 3,
    coef0: float = 1.0,
    gamma: float | None = None,
) -> _Floats:
    """What each generated sample adds to `kernel_distance`, to first order: `[N]`.

    In a subset, sample i has the witness `w_i`, twice the mean of `k(x_i, x_j)` over the other x
    less twice that of `k(x_i, y_j)`. Its contribution is `N / (subsets * subset_size)` times the
    sum of `w_i - mean w` over the subsets that hold it, 0 if none does; together they sum to 0.
    Their spread includes that of the subsets. A witness over all N M pairs would lack it and be
    several times too narrow where the subsets hold few of the pairs.

    Arguments and errors are those of `kernel_distance`.
    """
    gen, ref = _check_sides(generated, reference)
    contributions = np.zeros(len(gen))
    for chosen, others in _draw_subsets(len(gen), len(ref), subsets, subset_size, seed):
        x, y = gen[chosen].astype(np.float64), ref[others].astype(np.float64)
        witness = _mean_of_others(_polynomial(x, x, degree, coef0, gamma))
        witness -= _polynomial(x, y, degree, coef0, gamma).mean(axis=1)
        contributions[chosen] += 2.0 * (witness - witness.mean())
    contributions *= len(gen) / (subsets * subset_size)
    return contributions


def cmmd(
    *,
    generated: Features,
    reference: Features,
    sigma: float = 10.0,
    scale: float = 1000.0,
    chunk_size: int = 2048,
) -> float:
    """CMMD: `scale` times the biased MMD^2 under a Gaussian kernel, rows scaled to length 1.

    Args:
        generated: `[N, D]` features of the generated images.
        reference: `[M, D]` features of the reference images.
        sigma: Width of the kernel.
        scale: Factor of the result.
        chunk_size: Rows and columns of a tile of the kernel matrix. No effect on the result.

    Raises:
        DimoError: Shapes do not fit, a value is not finite, a row is zero, or a setting is not
            above 0.
    """
    gen, ref = _unit_rows(generated, reference, sigma, chunk_size, np.float64)
    within = _gaussian_sums(gen, gen, sigma, chunk_size).sum() / len(gen) ** 2
    within += _gaussian_sums(ref, ref, sigma, chunk_size).sum() / len(ref) ** 2
    across = _gaussian_sums(gen, ref, sigma, chunk_size).sum() / (len(gen) * len(ref))
    return float(scale * (within - 2.0 * across))


def cmmd_witness(
    *,
    generated: Features,
    reference: Features,
    sigma: float = 10.0,
    scale: float = 1000.0,
    chunk_size: int = 2048,
) -> _Floats:
    """What each generated sample adds to `cmmd`, to first order: `[N]`.

    `2 scale (mean_j k(x_i, x_j) - mean_j k(x_i, y_j))`, to 1e-6 scale: kernels are taken in
    float32, which halves the time. Arguments and errors are those of `cmmd`.
    """
    gen, ref = _unit_rows(generated, reference, sigma, chunk_size, np.float32)
    witness = _gaussian_sums(gen, gen, sigma, chunk_size) / len(gen)
    witness -= _gaussian_sums(gen, ref, sigma, chunk_size) / len(ref)
    witness *= 2.0 * scale
    return witness


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
    means: _Floats = kernel.sum(axis=1)
    means -= kernel.diagonal()
    means /= len(kernel) - 1
    return means


@dataclass(frozen=True, eq=False)
class _UnitRows:
    """Rows to be scaled to length 1 when they are read, so that no copy of all is held."""

    array: _Array  # [N, D]
    norms: _Floats  # [N]
    dtype: type[np.floating[Any]]  # Of the rows that are read.

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice) -> _Array:
        unit = self.array[rows] / self.norms[rows, None]
        return unit.astype(self.dtype, copy=False)


def _unit_rows(
    generated: Features,
    reference: Features,
    sigma: float,
    chunk_size: int,
    dtype: type[np.floating[Any]],
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
        for rows in _chunks(len(array), chunk_size):
            norms[rows] = np.linalg.norm(array[rows].astype(np.float64), axis=1)
        zero = np.flatnonzero(norms == 0)
        if zero.size:
            raise DimoError(
                f"{name} features hold {zero.size} zero rows, the first is row {zero[0]}; allowed: "
                "rows with a direction; check those images and the extractor"
            )
        sides.append(_UnitRows(array, norms, dtype))
    return sides[0], sides[1]


def _gaussian_sums(left: _UnitRows, right: _UnitRows, sigma: float, chunk_size: int) -> _Floats:
    """`sum_j (k(x_i, y_j) - 1)` for each row i of `left`, `[N]`.

    At length 1 and sigma = 10 every k is above 0.98. The 1 drops out of any MMD, and without it
    the sums, which are always float64, keep two more digits.
    """
    sums = np.zeros(len(left))
    same = left is right
    for rows in _chunks(len(left), chunk_size):
        x = left[rows]
        for cols in _chunks(len(right), chunk_size):
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


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
