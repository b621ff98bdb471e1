"""Features to mean and covariance: one pass, float64, mergeable; and their files."""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dimo.errors import DimoError
from dimo.util.files import replacing

Features: TypeAlias = npt.NDArray[Any] | torch.Tensor
"""What every metric accepts: a numpy array, or a torch tensor on any device."""

_SUFFIX = {"features": "", "spatial": "_s"}  # of the keys mu and sigma in files; else "_NAME"
_BLOCK_ROWS = 4096  # Rows converted to float64 at a time; bounds memory, not results' meaning.


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Mean `mu` [D] and unbiased covariance `sigma` [D, D] of `count` >= 2 features, float64.

    `extractor` names the feature extractor; statistics of two extractors never mix.

    Raises: DimoError: The count, the shapes or the values cannot be those of a covariance.
    """

    extractor: str
    count: int
    mu: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        mu = np.asarray(self.mu, dtype=np.float64)
        sigma = np.asarray(self.sigma, dtype=np.float64)
        what = f"statistics of extractor {self.extractor!r}"
        if self.count < 2:
            raise DimoError(
                f"{what} have count {self.count}; a covariance needs at least 2 samples; "
                "score more images"
            )
        if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
            raise DimoError(
                f"{what} have mu {list(mu.shape)} and sigma {list(sigma.shape)}; "
                "allowed: [D] and [D, D]; recompute them"
            )
        bad = mu.size - int(np.isfinite(mu).sum()), sigma.size - int(np.isfinite(sigma).sum())
        if any(bad):
            raise DimoError(
                f"{what} hold {bad[0]} non-finite values in mu and {bad[1]} in sigma; "
                "allowed: finite numbers; recompute them"
            )
        # Files of other tools may come from float32: forgive rounding, not another matrix.
        asymmetry = float(np.abs(sigma - sigma.T).max())
        if asymmetry > 1e-4 * float(np.abs(sigma).max()) or float(sigma.diagonal().min()) < 0:
            raise DimoError(
                f"{what} have a sigma that is no covariance (largest asymmetry {asymmetry:.3g}, "
                f"smallest variance {float(sigma.diagonal().min()):.3g}); recompute them"
            )
        if asymmetry > 0:
            sigma = (sigma + sigma.T) / 2
        object.__setattr__(self, "mu", mu)
        object.__setattr__(self, "sigma", sigma)


class StreamingStats:
    """Accumulates mean and covariance batch by batch, in O(D^2) memory.

    Keeps count, mean and scatter about the mean, and combines them pairwise (Chan, Golub and
    LeVeque 1979), so a large common offset costs no digits. The split into batches and the order
    of `merge` change the result by rounding only.
    """

    def __init__(self, extractor: str, dim: int) -> None:
        self.extractor = extractor
        self.dim = dim
        self.count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    def update(self, features: Features) -> None:
        """Adds samples `[N, D]` of any real dtype.

        Raises: DimoError: Not `[N, D]`, empty, or not finite; nothing is added then.
        """
        array = check_features(features, name="features", dim=self.dim)
        for rows in row_blocks(len(array), _BLOCK_ROWS):
            block = array[rows].astype(np.float64)  # [B, D]
            mean = block.mean(axis=0)
            block -= mean
            self._combine(len(block), mean, block.T @ block)

    def merge(self, other: "StreamingStats") -> None:
        """Adds everything `other` has seen, e.g. on another rank.

        Raises: DimoError: `other` has another extractor or dimension.
        """
        if (other.extractor, other.dim) != (self.extractor, self.dim):
            raise DimoError(
                f"cannot merge statistics of extractor {other.extractor!r} (D = {other.dim}) into "
                f"{self.extractor!r} (D = {self.dim}); use one extractor for both"
            )
        if other.count:
            self._combine(other.count, other._mean, other._scatter)

    def finalize(self) -> FeatureStats:
        """The statistics of at least 2 samples so far; more may be added afterwards."""
        scale = max(self.count - 1, 1)
        return FeatureStats(self.extractor, self.count, self._mean.copy(), self._scatter / scale)

    def _combine(
        self, count: int, mean: npt.NDArray[np.float64], scatter: npt.NDArray[np.float64]
    ) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total


def compute_stats(features: Features, *, extractor: str) -> FeatureStats:
    """Mean and covariance of `features` `[N, D]`, N >= 2, D >= 1.

    Equal to `numpy.mean` and `numpy.cov(rowvar=False)` in float64, without a float64 copy of the
    features.

    Raises: DimoError: Not `[N, D]`, fewer than 2 samples, or not finite.
    """
    array = check_features(features, name="features", min_count=2)
    stats = StreamingStats(extractor, array.shape[1])
    stats.update(array)
    return stats.finalize()


def save_stats(
    path: str | os.PathLike[str],
    stats: Mapping[str, FeatureStats],
    *,
    features: npt.NDArray[Any] | None = None,
    provenance: str = "",
) -> None:
    """Writes statistics as an npz that other tools read too; the same content gives the same bytes.

    Keys: `mu` `[D]` and `sigma` `[D, D]` of the output "features", `mu_s` and `sigma_s` of
    "spatial" (ADM's names), `mu_NAME` and `sigma_NAME` of each network of several, `n`,
    `extractor`, and, if given, `features` `[N, D]` and `provenance`.

    Raises: DimoError: The file cannot be written.
    """
    first = next(iter(stats.values()))
    arrays: dict[str, Any] = {"n": np.int64(first.count), "extractor": np.str_(first.extractor)}
    for output, each in stats.items():
        arrays[stats_key("mu", output)] = each.mu
        arrays[stats_key("sigma", output)] = each.sigma
    if features is not None:
        arrays["features"] = features
    if provenance:
        arrays["provenance"] = np.str_(provenance)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def stats_key(part: str, output: str) -> str:
    """The key of "mu" or "sigma" of an output, or of one of several networks, in a file."""
    return f"{part}{_SUFFIX.get(output, f'_{output}')}"


def load_stats(
    path: str | os.PathLike[str],
    *,
    extractor: str,
    count: int | None = None,
    outputs: Sequence[str] = ("features",),
) -> dict[str, FeatureStats]:
    """Reads the npz of `save_stats` or of other tools: float32 or float64 `mu`, `sigma`.

    Args:
        path: An npz with the keys of `save_stats`.
        extractor: The extractor the caller needs. A file that names its own must agree.
        count: Number of samples of a file that has no `n`, as ADM's.

    Raises: DimoError: Unreadable file, missing key, another extractor, or values that are no
        statistics.
    """
    required = [stats_key(part, output) for output in outputs for part in ("mu", "sigma")]
    try:
        with Path(path).open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            keys = sorted(file.files)
            content = {k: file[k] for k in (*required, "n", "extractor") if k in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DimoError(
            f"cannot read statistics from {path}: {error}; give an npz with the keys mu and sigma"
        ) from error
    _check_precision(path, {key: content[key] for key in required if key in content})
    missing = [key for key in required if key not in content]
    if missing:
        raise DimoError(
            f"{path} lacks {', '.join(missing)} (it has: {', '.join(keys) or 'nothing'}); "
            "give an npz with these keys, made by dimo reference"
        )
    if "n" not in content and count is None:
        raise DimoError(
            f"{path} does not say of how many images it is (key n); make it with dimo reference, "
            "or use a protocol that gives reference.statistics_count"
        )
    named = str(content.get("extractor", extractor))
    if named != extractor:
        raise DimoError(
            f"{path} holds statistics of extractor {named!r}; the protocol needs {extractor!r}; "
            "give a file made with that extractor"
        )
    try:
        number = int(content["n"]) if "n" in content else count
        return {
            output: FeatureStats(
                extractor,
                number,  # type: ignore[arg-type]
                content[stats_key("mu", output)],
                content[stats_key("sigma", output)],
            )
            for output in outputs
        }
    except (TypeError, ValueError) as error:
        raise DimoError(f"{path}: {error}") from error


def _check_precision(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    for key, array in arrays.items():
        if array.dtype.kind != "f" or array.dtype.itemsize < 4:
            raise DimoError(
                f"{key} of {path} is {array.dtype}; allowed: float32 or float64, as distances need "
                "its digits; make the statistics again in float64"
            )


def check_features(
    features: Features, *, name: str, dim: int | None = None, min_count: int = 1
) -> npt.NDArray[Any]:
    """`features` as a finite real numpy array `[N, D]`, N >= `min_count`, in its own dtype.

    `name` is what an error calls it, e.g. `"generated"`; `dim` is the required D, if any.

    Raises: DimoError: Wrong rank, dtype, N or D, or a value that is NaN or infinite.
    """
    array = as_numpy(features)
    if array.dtype.kind not in "fiu":
        raise DimoError(f"{name} have dtype {array.dtype}; allowed: real numbers; convert them")
    if array.ndim != 2:
        raise DimoError(f"{name} have shape {list(array.shape)}; allowed: [N, D]; flatten the rest")
    if dim is not None and array.shape[1] != dim:
        raise DimoError(
            f"{name} have dimension {array.shape[1]}; expected {dim}; "
            "use one feature extractor for both sides"
        )
    if len(array) < min_count or array.shape[1] == 0:
        raise DimoError(
            f"{name} have shape {list(array.shape)}; allowed: at least {min_count} samples "
            "of dimension 1 or more; score more images"
        )
    blocks = row_blocks(len(array), _BLOCK_ROWS)
    finite = np.concatenate([np.isfinite(array[rows]).all(axis=1) for rows in blocks])
    if not finite.all():
        bad = array[~finite]
        raise DimoError(
            f"{name} hold {np.isnan(bad).sum()} NaN and {np.isinf(bad).sum()} infinite values in "
            f"{len(bad)} of {len(array)} rows, the first in row {finite.argmin()}; allowed: finite "
            "numbers; check those images and run the extractor in float32"
        )
    return array


def as_numpy(features: Features) -> npt.NDArray[Any]:
    """`features` as a numpy array: no copy where none is needed, float32 for bfloat16."""
    if isinstance(features, torch.Tensor):
        tensor = features.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(features)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products in float32, also where TF32 or bfloat16 is allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def row_blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` rows that cover `count`; the last may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
