"""Precision, recall, density and coverage of k-nearest-neighbour manifolds, and AuthPct.

Kynkaanniemi et al. 2019 (arXiv 1904.06991) for precision and recall, Naeem et al. 2020 (arXiv
2002.09797) for density and coverage. Their convention is that of the `prdc` package:

- The radius of a sample is its distance to its k-th nearest neighbour in its own set, itself left
  out. A duplicate of a sample is a neighbour like any other, at distance 0.
- A ball is open: a point exactly on the radius is outside (strict `<`). So a sample with k or
  more duplicates has radius 0 and an empty ball, and a set of one repeated image scores 0, not 1.
  torch-fidelity and ADM count the rim in (`<=`).

Ties matter, so every comparison uses the canonical distance of `bench.metrics.neighbours`; matrix
products, in float32 or, for tiles with too many undecided pairs, float64, only rule out pairs. The
result does not depend on the device, the chunk size, the order of the rows or the BLAS.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.features.stats import Features, check_features, full_float32, row_blocks
from bench.metrics.base import Samples, Score
from bench.metrics.neighbours import PRECISIONS, Distinct, Pairs, Tile, in_range, points_of
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

_CROWDED = 4  # Undecided pairs per row or column of a tile above which float64 is faster.
_PENDING = 16  # Candidates per sample, in units of k, above which the list is thinned.


@dataclass(frozen=True)
class PRDC:
    """The four scores, and the coverage to expect for two samples of one distribution.

    Precision, recall and coverage are in 0 to 1; density is not bounded by 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    coverage_ceiling: float


@dataclass(frozen=True, eq=False)
class ManifoldMembership:
    """Per-sample contributions, float64, whose means are the scores.

    Attributes:
        precision: `[N]`, 1 where a generated sample is in a reference ball, else 0.
        recall: `[M]`, 1 where a reference sample is in a generated ball, else 0.
        density: `[N]`, number of reference balls around a generated sample, over k.
        coverage: `[M]`, 1 where a reference ball holds a generated sample, else 0.
    """

    precision: _Floats
    recall: _Floats
    density: _Floats
    coverage: _Floats


def prdc(
    *,
    generated: Features,
    reference: Features,
    k: int,
    chunk_size: int = 2048,
    device: torch.device | str = "cpu",
) -> PRDC:
    """Precision, recall, density, coverage, and the expected coverage of a perfect generator.

    Args:
        generated: `[N, D]` features of the generated images.
        reference: `[M, D]` features of the reference images.
        k: Which nearest neighbour sets the radius, 1 or more.
        chunk_size: Rows and columns of a tile of distances; beside one rounded copy of the
            features, memory grows with its square. No effect on the result.
        device: Where the tiles are computed. No effect on the result.

    Raises: DimoError: Shapes do not fit, a value is not finite, or k or chunk_size is out of range.
    """
    members = manifold_membership(
        generated=generated, reference=reference, k=k, chunk_size=chunk_size, device=device
    )
    scores = {name: float(values.mean()) for name, values in vars(members).items()}
    ceiling = coverage_ceiling(len(members.precision), len(members.coverage), k)
    return PRDC(**scores, coverage_ceiling=ceiling)


def manifold_membership(
    *,
    generated: Features,
    reference: Features,
    k: int,
    chunk_size: int = 2048,
    device: torch.device | str = "cpu",
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
    ref_set, gen_set = (Distinct(array) for array in in_range(ref, gen))
    tiling = chunk_size, torch.device(device)
    with full_float32():
        ref_radii, gen_radii = (_squared_radii(each, k, *tiling) for each in (ref_set, gen_set))
        balls_around, covered, recalled = _cross(ref_set, gen_set, ref_radii, gen_radii, *tiling)
    return ManifoldMembership(
        precision=(balls_around[gen_set.of_row] > 0).astype(np.float64),
        recall=recalled[ref_set.of_row].astype(np.float64),
        density=balls_around[gen_set.of_row] / k,
        coverage=covered[ref_set.of_row].astype(np.float64),
    )


def _score(
    name: str, samples: Samples, k: int, blocks: int = 1, block_size: int = 0, seed: int = 0
) -> Score:
    """One of the four scores, averaged over blocks of samples where the protocol asks for them."""
    parts = []
    for position, (generated, reference) in enumerate(_blocks(samples, blocks, block_size, seed)):
        key = ("neighbours", k, blocks, block_size, seed, position)
        if key not in samples.shared:
            samples.shared[key] = manifold_membership(
                generated=generated, reference=reference, k=k, device=samples.device
            )
        parts.append(getattr(samples.shared[key], name))
    values: _Floats = np.concatenate(parts)
    ceiling = {"ceiling": coverage_ceiling(len(generated), len(reference), k)}
    return Score(
        float(values.mean()),
        values,
        extra=ceiling if name == "coverage" else {},
        of_reference=name in ("recall", "coverage"),
    )


score_precision = functools.partial(_score, "precision")
score_recall = functools.partial(_score, "recall")
score_density = functools.partial(_score, "density")
score_coverage = functools.partial(_score, "coverage")


def _blocks(
    samples: Samples, blocks: int, block_size: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Pairs of generated and reference samples; smaller blocks where there are too few."""
    sides = samples.sides()
    if not block_size:
        yield sides
        return
    size = min(block_size, *(len(side) // blocks for side in sides))
    orders = [np.random.RandomState(seed).permutation(len(side)) for side in sides]
    for rows in row_blocks(blocks * size, size):
        gen, ref = (side[np.sort(order[rows])] for side, order in zip(sides, orders, strict=True))
        yield gen, ref


def authpct(
    *,
    generated: Features,
    reference: Features,
    chunk_size: int = 2048,
    device: torch.device | str = "cpu",
) -> float:
    """Percentage of authentic generated samples, 0 to 100: few of them mean memorization.

    Authenticity of Alaa et al. 2022 (arXiv 2102.08921), as `AuthPct` of dgm-eval (arXiv 2306.04675)
    and FLD: a sample is authentic if it is farther from its nearest training sample than that
    training sample is from its own nearest neighbour in the training set. An exact copy of a
    training sample is never authentic; of fresh samples from the same distribution, as a perfect
    generator draws, a third (in one dimension) to a half (in many dimensions) are.

    Args:
        generated: `[N, D]` features of the generated images.
        reference: `[M, D]` features of the training images, M >= 2. If several are equally near to
            a sample, the condition must hold for each of them.
        chunk_size, device: See `prdc`; no effect on the result.

    Raises: DimoError: Shapes do not fit, a value is not finite, or there are too few samples.
    """
    arrays = {"generated": generated, "reference": reference}
    return 100.0 * float(authentic(**arrays, chunk_size=chunk_size, device=device).mean())


def authentic(
    *,
    generated: Features,
    reference: Features,
    chunk_size: int = 2048,
    device: torch.device | str = "cpu",
) -> _Floats:
    """What `authpct` averages: `[N]`, 1.0 where a sample is authentic, else 0.0."""
    ref = check_features(reference, name="reference features", min_count=2)
    gen = check_features(generated, name="generated features", dim=ref.shape[1])
    ref_set, gen_set = (Distinct(array) for array in in_range(ref, gen))
    tiling = chunk_size, torch.device(device)
    with full_float32():
        radii = _squared_radii(ref_set, 1, *tiling)
        distance, radius = _nearest(gen_set, ref_set, radii, *tiling)
    return (distance > radius)[gen_set.of_row].astype(np.float64)


def score_authpct(samples: Samples) -> Score:
    """AuthPct with its contributions."""
    generated, reference = samples.sides()
    values = 100.0 * authentic(generated=generated, reference=reference, device=samples.device)
    return Score(float(values.mean()), values)


def coverage_ceiling(num_generated: int, num_reference: int, k: int) -> float:
    """Expected coverage when both sets come from one continuous distribution.

    A ball is missed when the k nearest of the M - 1 + N other samples are all reference ones:
    probability `prod_{i=1..k} (M - i) / (N + M - i)`.
    """
    i = np.arange(1, k + 1)
    missed = (num_reference - i) / (num_generated + num_reference - i)
    return float(1.0 - missed.prod())


def _squared_radii(distinct: Distinct, k: int, chunk_size: int, device: torch.device) -> _Floats:
    """Canonical squared distance of each distinct row to its k-th nearest other row, `[n]`."""
    need = k + 1 - distinct.copies  # How many neighbours are not its own copies.
    reach = np.where(need > 0, np.inf, -np.inf)  # No more than this is known to be needed.
    if (need <= 0).all():
        return np.zeros(len(distinct))
    near = _Near(distinct, need, reach)
    (points,) = points_of(distinct, device=device)
    parts = list(row_blocks(len(distinct), chunk_size))
    for position, rows in enumerate(parts):
        for cols in parts[position:]:  # The matrix is symmetric: each tile serves both its sides.
            if max(reach[rows].max(), reach[cols].max()) == -np.inf:
                continue
            crowd = _CROWDED * k * (rows.stop - rows.start + cols.stop - cols.start)
            for precision in PRECISIONS:
                tile = Tile(points, rows, points, cols, precision)
                places = tile.within(reach[rows], reach[cols])
                if places.size > crowd:
                    reach[rows] = np.minimum(reach[rows], tile.reach(k))
                    if rows != cols:
                        reach[cols] = np.minimum(reach[cols], tile.reach(k, of_columns=True))
                    places = tile.within(reach[rows], reach[cols])
                if places.size <= crowd:
                    break
            pairs = tile.pairs(places)
            near.add(pairs)
            if rows != cols:
                near.add(pairs._replace(row=pairs.col, col=pairs.row))
            if near.count > _PENDING * k * len(distinct):
                near.thin()
    return near.squared_radii()


class _Near:
    """Candidates for the nearest neighbours of each row of a set.

    Args:
        need: How many neighbours to find for each row, `[n]`; duplicates of a neighbour count.
        reach: Squared distance within which they are, `[n]`; lowered in place.
    """

    def __init__(self, distinct: Distinct, need: _Ints, reach: _Floats) -> None:
        self.count = 0
        self._distinct, self._need, self._reach = distinct, need, reach
        self._added: list[Pairs] = []

    def add(self, pairs: Pairs) -> None:
        self._added.append(pairs.where(pairs.lower <= self._reach[pairs.row]))
        self.count += self._added[-1].row.size

    def thin(self) -> None:
        """Drops what the others rule out; if that leaves many, settles them to the few needed."""
        before, pairs = self.count, self._pruned()
        if pairs.row.size > before // 2:
            pairs = pairs.settled(self._distinct, self._distinct, np.full(pairs.row.size, True))
            kth, counted = self._kth(pairs, pairs.upper)
            np.minimum(self._reach, kth, out=self._reach)
            pairs = pairs.where(counted)
        self._added, self.count = [pairs], pairs.row.size

    def squared_radii(self) -> _Floats:
        """The distances of the last neighbours needed, `[n]`; 0 where none is."""
        pairs = self._pruned()
        doubtful = pairs.upper >= self._kth(pairs, pairs.lower)[0][pairs.row]
        pairs = pairs.settled(self._distinct, self._distinct, doubtful)
        kth, _ = self._kth(pairs, pairs.lower)  # Exact, or of a pair that is nearer than the last.
        return np.where(self._need > 0, kth, 0.0)

    def _pruned(self) -> Pairs:
        pairs = Pairs(*(np.concatenate(column) for column in zip(*self._added, strict=True)))
        np.minimum(self._reach, self._kth(pairs, pairs.upper)[0], out=self._reach)
        return pairs.where(pairs.lower <= self._reach[pairs.row])

    def _kth(self, pairs: Pairs, values: _Floats) -> tuple[_Floats, npt.NDArray[np.bool_]]:
        """The last value needed of each row `[n]`, inf if there are too few, and which count."""
        order = np.lexsort((values, pairs.row))
        row, weight = pairs.row[order], self._distinct.copies[pairs.col[order]]
        total = np.cumsum(weight)
        first = np.searchsorted(row, row)
        nearer = total - weight - (total - weight)[first]  # Weight before each, in its row.
        counts = nearer < self._need[row]
        last = counts & (nearer + weight >= self._need[row])
        kth = np.full(self._need.size, np.inf)
        kth[row[last]] = values[order[last]]
        counted = np.empty(row.size, dtype=bool)
        counted[order] = counts
        return kth, counted


def _cross(
    ref: Distinct,
    gen: Distinct,
    ref_radii: _Floats,
    gen_radii: _Floats,
    chunk_size: int,
    device: torch.device,
) -> tuple[_Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Number of reference balls around each generated row `[n]`; which reference rows `[m]` have a
    generated row in their ball; and which are in a generated ball. Radii are squared.
    """
    balls_around = np.zeros(len(gen))
    covered, recalled = np.zeros(len(ref), dtype=bool), np.zeros(len(ref), dtype=bool)
    ref_points, gen_points = points_of(ref, gen, device=device)
    for rows in row_blocks(len(ref), chunk_size):
        for cols in row_blocks(len(gen), chunk_size):
            crowd = _CROWDED * (rows.stop - rows.start + cols.stop - cols.start)
            for precision in PRECISIONS:
                tile = Tile(ref_points, rows, gen_points, cols, precision)
                pairs = tile.pairs(tile.within(ref_radii[rows], gen_radii[cols]))
                radii = ref_radii[pairs.row], gen_radii[pairs.col]
                doubtful = _undecided(pairs, radii[0]) | _undecided(pairs, radii[1])
                if np.count_nonzero(doubtful) <= crowd:
                    break
            distance = pairs.settled(ref, gen, doubtful).upper
            in_ref, in_gen = (distance < radius for radius in radii)
            balls_around += np.bincount(
                pairs.col[in_ref], ref.copies[pairs.row[in_ref]], minlength=len(gen)
            )
            covered[pairs.row[in_ref]] = True
            recalled[pairs.row[in_gen]] = True
    return balls_around, covered, recalled


def _nearest(
    gen: Distinct, ref: Distinct, ref_radii: _Floats, chunk_size: int, device: torch.device
) -> tuple[_Floats, _Floats]:
    """Squared distance of each generated row to its nearest reference row, and the squared radius
    of that row, `[n]` each; the largest radius where several are nearest.
    """
    distance, radius = np.full(len(gen), np.inf), np.zeros(len(gen))
    gen_points, ref_points = points_of(gen, ref, device=device)
    for rows in row_blocks(len(gen), chunk_size):
        for cols in row_blocks(len(ref), chunk_size):
            nobody = np.full(cols.stop - cols.start, -np.inf)
            crowd = _CROWDED * (rows.stop - rows.start + cols.stop - cols.start)
            for precision in PRECISIONS:
                tile = Tile(gen_points, rows, ref_points, cols, precision)
                places = tile.within(np.minimum(distance[rows], tile.reach(1)), nobody)
                if places.size <= crowd:
                    break
            pairs = tile.pairs(places)
            exact = pairs.settled(gen, ref, np.full(places.size, True)).upper
            before = distance[rows].copy()
            np.minimum.at(distance, pairs.row, exact)
            radius[rows][distance[rows] < before] = 0.0
            tied = exact == distance[pairs.row]
            np.maximum.at(radius, pairs.row[tied], ref_radii[pairs.col[tied]])
    return distance, radius


def _undecided(pairs: Pairs, squared_radii: _Floats) -> npt.NDArray[np.bool_]:
    """Which pairs may be on either side of their radius, `[P]`."""
    return (pairs.lower <= squared_radii * (1 + 1e-15)) & (
        pairs.upper >= squared_radii * (1 - 1e-15)
    )
