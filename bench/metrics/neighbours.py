"""Pairwise squared distances in tiles: fast bounds first, exact distances where they matter.

The canonical squared distance of two rows is the float64 sum of their squared differences, which
depends on the two rows alone. A tile computes it by matrix product in a narrow type, with a
rigorous bound on the error; only pairs whose comparison the bound leaves open need the canonical
one.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bench.features.stats import row_blocks

_Array = npt.NDArray[Any]
_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

PRECISIONS = (torch.float32, torch.float64)  # of matrix products, the narrow one first

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # of sums
_ROUNDING = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}  # of rows
_TINY = 2.0**-100  # Above all that underflows, with values of 2^-10 to 2^10.
_PREPARED_ROWS = 256  # Rows centred at a time: they stay in the cache.
_GATHER_ELEMENTS = 1 << 17  # Elements of one block of exact differences (1 MiB).


def in_range(*sets: _Array) -> list[_Array]:
    """The sets in one dtype, float32 or float64, and with squares that float64 can hold."""
    narrow = all(np.can_cast(features.dtype, np.float32) for features in sets)
    sets = tuple(features.astype("f4" if narrow else "f8", copy=False) for features in sets)
    largest = max(_largest(features) for features in sets)
    if narrow or largest == 0 or 1e-100 < largest < 1e100:
        return list(sets)
    return [np.ldexp(features, -np.frexp(largest)[1]) for features in sets]


class Distinct:
    """The distinct rows of a feature set, so that duplicates are processed once.

    Attributes:
        features: The whole set, `[N, D]` float32 or float64.
        first: Index of each distinct row in it, `[n]`, ascending.
        copies: How often each occurs, `[n]`.
        of_row: Which distinct row each row is, `[N]`.
    """

    def __init__(self, features: _Array) -> None:
        self.features = features
        sums = np.empty(len(features), dtype=np.uint64)  # Sums of the bits: equal for equal rows.
        for rows in row_blocks(len(features), _PREPARED_ROWS):
            bits = np.ascontiguousarray(features[rows]).view(np.uint32)
            sums[rows] = bits.sum(axis=1, dtype=np.uint64)
        _, of_sum, count = np.unique(sums, return_inverse=True, return_counts=True)
        key = np.arange(len(features))
        seen: dict[bytes, int] = {}
        for row in np.flatnonzero(count[of_sum] > 1):
            digest = hashlib.blake2b(features[row].tobytes(), digest_size=16).digest()
            key[row] = seen.setdefault(digest, int(row))
        self.first, self.of_row, self.copies = np.unique(
            key, return_inverse=True, return_counts=True
        )

    def __len__(self) -> int:
        return len(self.first)


class Pairs(NamedTuple):
    """Pairs of distinct rows `[P]`, and bounds on their canonical squared distances."""

    row: _Ints
    col: _Ints
    lower: _Floats
    upper: _Floats

    def where(self, chosen: _Array) -> "Pairs":
        return Pairs(self.row[chosen], self.col[chosen], self.lower[chosen], self.upper[chosen])

    def settled(self, left: Distinct, right: Distinct, doubtful: npt.NDArray[np.bool_]) -> "Pairs":
        """These pairs, with the distance itself as both bounds of the doubtful ones."""
        chosen = np.flatnonzero(doubtful & (self.lower < self.upper))
        lower, upper = self.lower.copy(), self.upper.copy()
        row, col = left.first[self.row[chosen]], right.first[self.col[chosen]]
        lower[chosen] = upper[chosen] = _canonical(left.features, row, right.features, col)
        return self._replace(lower=lower, upper=upper)


class _Block(NamedTuple):
    """Rows as a matrix product sees them.

    Attributes:
        rows: `[R, D]`, centred, scaled and rounded, on the device of the products.
        norms: Their squared norms before rounding, `[R]`.
        errors: `[R]`; a squared distance is off by at most the sum of its two rows' errors, plus
            the rounding of the product itself.
    """

    rows: torch.Tensor
    norms: _Floats
    errors: _Floats


class Points:
    """The distinct rows of a set as blocks of either precision; float32 blocks are kept.

    Args:
        center: A point amid the features, `[D]`, in their dtype: it leaves distances as they are
            and shrinks norms and so the error bounds.
        scale: A power of two that brings the features to about 1.
        device: Where float32 products run; float64 products always run on the CPU.
    """

    def __init__(
        self, distinct: Distinct, center: _Array, scale: float, device: torch.device
    ) -> None:
        self.scale = scale
        self._distinct = distinct
        self._center = center * scale
        self._device = device
        rounded = torch.empty((len(distinct), len(center)), dtype=torch.float32, device=device)
        norms, errors = np.empty(len(distinct)), np.empty(len(distinct))
        for rows in row_blocks(len(distinct), _PREPARED_ROWS):
            rounded[rows], norms[rows], errors[rows] = self._prepared(rows, torch.float32)
        self._kept = _Block(rounded, norms, errors)

    def block(self, rows: slice, precision: torch.dtype) -> _Block:
        if precision == torch.float32:
            rounded, norms, errors = self._kept
            return _Block(rounded[rows], norms[rows], errors[rows])
        return self._prepared(rows, precision)

    def _prepared(self, rows: slice, precision: torch.dtype) -> _Block:
        """Centres, scales and rounds, and bounds the error of squared distances.

        With d the loss of a row a and e a number of its relative size,
        `2 |d_a . b| <= |d_a|^2 / e + e |b|^2` splits a product's error into one part per row; the
        exact value of e is free. Added to it, u the unit of the sums, are `D u (|a|^2 + |b|^2)`
        for a sum of D products in any order, 10 u of the same for centering, norms and the
        additions after it (all doubled, for second-order terms), and 4 (D + 10) 2^-53 of it for
        the canonical sum.
        """
        exact = self._distinct.features[self._distinct.first[rows]]
        if precision == torch.float64:
            exact = exact.astype(np.float64)
        if self.scale != 1.0:
            exact *= self.scale
        exact -= self._center
        rounded = torch.from_numpy(exact).to(precision)
        norms = _squared_norms(exact)
        lost = np.sqrt(_squared_norms(exact - rounded.to(torch.from_numpy(exact).dtype).numpy()))
        lost += _UNIT[precision] * np.sqrt(norms)
        dim, typical = exact.shape[1], _ROUNDING[precision]
        relative = typical + (dim + 10) * (2 * _UNIT[precision] + 4 * 2.0**-53)
        errors = lost**2 * (1 + 1 / typical) + relative * norms + dim * _TINY
        device = "cpu" if precision == torch.float64 else self._device
        return _Block(rounded.to(device), norms, errors)


class Tile:
    """Bounds on the squared distances of a block of rows to a block of columns.

    `_x` `[R, C]` is -1/2 times a lower bound, in scaled units, so that a comparison with a reach
    takes two subtractions after the product.
    """

    def __init__(
        self, left: Points, rows: slice, right: Points, cols: slice, precision: torch.dtype
    ) -> None:
        self._rows, self._cols = rows, cols
        self._left, self._right = left.block(rows, precision), right.block(cols, precision)
        self._unit = left.scale**-2
        self._own = left is right and rows == cols
        x = self._left.rows @ self._right.rows.T
        self._half = [(block.norms - block.errors) / 2 for block in (self._left, self._right)]
        x -= torch.from_numpy(self._half[0]).to(x)[:, None]
        x -= torch.from_numpy(self._half[1]).to(x)
        if self._own:
            x.fill_diagonal_(-torch.inf)
        self._x = x

    def within(self, left: _Floats, right: _Floats) -> _Ints:
        """Places (row times C plus column) of all pairs that may be within a reach of either.

        `left` `[R]` and `right` `[C]` are squared reaches; -inf for none, inf for all.
        """
        limits = [
            torch.from_numpy(reach * (-0.5 * (1 + 2.0**-20) / self._unit)).to(self._x)
            for reach in (left, right)
        ]
        near = self._x >= limits[0][:, None]
        near |= self._x >= limits[1]
        if self._own:
            near.fill_diagonal_(False)
        if near.device.type == "cpu":
            return np.flatnonzero(near.numpy())
        return near.flatten().nonzero().flatten().cpu().numpy()

    def pairs(self, places: _Ints) -> Pairs:
        """The pairs at these places, as indices of the whole sets."""
        row, col = np.divmod(places, self._x.shape[1])
        x = self._x.flatten()[torch.from_numpy(places).to(self._x.device)].double().cpu().numpy()
        doubt = 2 * (self._left.errors[row] + self._right.errors[col])
        lower = -2 * self._unit * x
        return Pairs(
            row + self._rows.start, col + self._cols.start, lower, lower + self._unit * doubt
        )

    def reach(self, k: int, *, of_columns: bool = False) -> _Floats:
        """Squared distance within which each row (column) has k others of this tile; or inf."""
        x = self._x.T.contiguous() if of_columns else self._x
        if x.shape[1] < k:
            return np.full(len(x), np.inf)
        nearest = x.topk(k, dim=1, sorted=False).indices.cpu().numpy()
        own = np.arange(len(x))[:, None]
        places = nearest * len(x) + own if of_columns else own * x.shape[1] + nearest
        farthest: _Floats = self.pairs(places.ravel()).upper.reshape(-1, k).max(axis=1)
        return farthest


def points_of(*sets: Distinct, device: torch.device) -> list[Points]:
    """The sets around one center and in one scale, for float32 products on `device`."""
    center = np.mean([one.features.mean(axis=0, dtype=np.float64) for one in sets], axis=0)
    largest = max(_largest(one.features) for one in sets)
    dtype = sets[0].features.dtype
    exponent = 0 if 2.0**-10 < largest < 2.0**10 else int(np.frexp(largest)[1])
    limit = -np.finfo(dtype).minexp  # The scale is to be a number of this type.
    scale = 2.0 ** -max(-limit, min(exponent, limit))
    return [Points(one, center.astype(dtype), scale, device) for one in sets]


def _canonical(left: _Array, row: _Ints, right: _Array, col: _Ints) -> _Floats:
    """Canonical squared distances `[P]` of the pairs `left[row]`, `right[col]`; symmetric."""
    distances = np.empty(row.size)

    def fill(pairs: slice) -> None:
        difference = left[row[pairs]].astype(np.float64)
        difference -= right[col[pairs]]
        np.square(difference, out=difference)
        distances[pairs] = difference.sum(axis=1)

    parts = list(row_blocks(row.size, max(1, _GATHER_ELEMENTS // left.shape[1])))
    if len(parts) > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, parts))  # numpy releases the interpreter's lock
    else:
        fill(slice(None))
    return distances


def _largest(features: _Array) -> float:
    return float(max(features.max(), -features.min()))


def _squared_norms(rows: _Array) -> _Floats:
    return np.einsum("nd,nd->n", rows, rows, dtype=np.float64)  # type: ignore[no-any-return]
