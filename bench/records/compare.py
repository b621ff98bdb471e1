"""Two rows on the same samples: is the difference more than chance?"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.metrics.base import Score, paired_interval
from bench.protocol import Uncertainty
from bench.protocol.catalog import METRICS
from bench.records.record import ResultRecord
from dimo.errors import DimoError

_Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Difference:
    """First minus second row in one metric, with the bootstrap interval of the difference."""

    metric: str
    first: float
    second: float
    low: float  # end of the interval of `first - second`
    high: float
    better: str  # "first" or "second" if the interval leaves out 0, else "neither"


def pack_contributions(scores: Mapping[str, Score]) -> bytes:
    """An npz of float32 arrays by metric, and `METRIC.labels`; equal scores give equal bytes."""
    arrays: _Arrays = {}
    for name, score in scores.items():
        arrays[name] = score.contributions.astype(np.float32)
        if score.labels is not None:
            arrays[f"{name}.labels"] = score.labels.astype(np.int32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def compare(
    first: ResultRecord,
    second: ResultRecord,
    contributions: tuple[bytes, bytes],
    uncertainty: Uncertainty,
) -> list[Difference]:
    """Differences of two rows in every metric of their protocol.

    Image i of one row is paired with image i of the other: same seed or same labels. What both
    have in common then drops out of the interval. `contributions`: their files, as
    `pack_contributions` made them.

    Raises:
        DimoError: The rows are not of one protocol and reference, or not paired.
    """
    _check_pair(first, second)
    left, right = (_unpack(data) for data in contributions)
    differences = []
    for name, value in first.metrics.items():
        if name not in second.metrics:
            continue
        a, b = value.value, second.metrics[name].value
        try:
            interval = paired_interval(
                left[name],
                right[name],
                difference=a - b,
                n_bootstrap=uncertainty.n_bootstrap,
                seed=uncertainty.seed,
                level=uncertainty.level,
                labels=left.get(f"{name}.labels"),
            )
        except DimoError as error:
            raise DimoError(f"{name}: {error}") from error
        better = "neither"
        if interval.low > 0 or interval.high < 0:
            better = "first" if (interval.low > 0) == METRICS[name].higher_is_better else "second"
        differences.append(Difference(name, a, b, interval.low, interval.high, better))
    return differences


def _check_pair(first: ResultRecord, second: ResultRecord) -> None:
    names = f"{first.method.name!r} and {second.method.name!r}"
    if first.protocol.sha256 != second.protocol.sha256:
        raise DimoError(
            f"{names} were measured under {first.protocol.name} {first.protocol.sha256[:12]} and "
            f"{second.protocol.name} {second.protocol.sha256[:12]}; compare rows of one protocol"
        )
    a, b = first.evidence, second.evidence
    if a is None or b is None:
        raise DimoError(f"{names}: a record from before version 0.2 cannot be paired; run it again")
    if (a.reference_sha256, a.extractor_sha256) != (b.reference_sha256, b.extractor_sha256):
        raise DimoError(f"{names} were measured with another reference or extractor; use one")
    if (a.scorer_sha256, a.prompts_sha256) != (b.scorer_sha256, b.prompts_sha256):
        raise DimoError(f"{names} were measured with another scorer or other prompts; use one")
    if a.detector_sha256 != b.detector_sha256:
        raise DimoError(f"{names} were measured with another detector; use one")
    if first.seed != second.seed or (first.seed is None and a.labels_sha256 != b.labels_sha256):
        raise DimoError(
            f"{names} are not paired: their images have other seeds or labels; compare rows of "
            "the same seed, or sets with the same labels in the same order"
        )
    if first.num_images != second.num_images:
        raise DimoError(
            f"{names} have {first.num_images:,} and {second.num_images:,} images; compare rows "
            "with the same number of images"
        )


def _unpack(data: bytes) -> _Arrays:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DimoError(f"cannot read the contributions: {error}; run the row again") from error
