"""Two rows on the same samples: is the difference more than chance of images and training?"""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from statistics import NormalDist, fmean, variance
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from bench.metrics.base import Interval, Score, paired_interval
from bench.protocol import Protocol
from bench.protocol.catalog import METRICS
from bench.records.record import ResultRecord, protocol_of
from bench.records.seeds import across_seeds, open_hashes, seed_key, training_seed
from bench.records.store import find_record, load_all, load_contributions
from dimo.errors import DimoError

_Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Difference:
    """First minus second row in one metric, with an interval of the difference.

    With `retraining`, rows are means over their training seeds and the interval is that of
    `combined_interval`; else they are the two records, and it is that of resampling images.
    """

    metric: str
    first: float
    second: float
    low: float  # end of the interval of `first - second`
    high: float
    better: str  # "first" or "second" if the interval leaves out 0, else "neither"
    first_seeds: tuple[int, ...] = ()  # training seeds; none: not a student, or unknown
    second_seeds: tuple[int, ...] = ()
    retraining: bool = False


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
    first: str | ResultRecord,
    second: str | ResultRecord,
    *,
    protocol: str | PathLike[str] | None = None,
    results: str | PathLike[str] = "results",
) -> list[Difference]:
    """Differences of two rows in every metric of their protocol: first minus second.

    Each row is a record, its file, or the start of its run id in `results`. Image i of one row is
    paired with image i of the other, same seed or same labels: what both have in common drops out
    of the interval. Where the folder has records of several training seeds of each student, their
    means are compared, and the interval covers retraining, too; a row that is no student's, such as
    a teacher's, is taken as it is. `protocol`: the file of their protocol; None: a bundled one.

    Raises:
        DimoError: No such records, not of one protocol and reference, not paired, or without
            contributions.
    """
    (a, folder_a), (b, folder_b) = (
        (row, Path(results)) if isinstance(row, ResultRecord) else find_record(row, results)
        for row in (first, second)
    )
    _check_pair(a, b)
    fixed = protocol_of(a, protocol)
    sides = (_seeds(a, folder_a, fixed), _seeds(b, folder_b, fixed))
    trained = [side for side in sides if training_seed(side[0]) is not None]
    if not trained or min(map(len, trained)) == 1 or seed_key(a) == seed_key(b):
        sides, trained = ([a], [b]), []
    left, right = _contributions(sides[0], a, folder_a), _contributions(sides[1], b, folder_b)
    seeds = [tuple(s for s in map(training_seed, side) if s is not None) for side in sides]
    chance, differences = fixed.uncertainty, []
    for name in [name for name in a.metrics if name in b.metrics]:
        values = [[record.metrics[name].value for record in side] for side in sides]
        means = [fmean(of_side) for of_side in values]
        try:
            interval = paired_interval(
                left[name],
                right[name],
                difference=means[0] - means[1],
                n_bootstrap=chance.n_bootstrap,
                seed=chance.seed,
                level=chance.level,
                labels=left.get(f"{name}.labels"),
            )
        except DimoError as error:
            raise DimoError(f"{name}: {error}") from error
        if trained:
            interval = combined_interval(means[0] - means[1], interval, values, chance.level)
        better = "neither"
        if interval.low > 0 or interval.high < 0:
            better = "first" if (interval.low > 0) == METRICS[name].higher_is_better else "second"
        found = (name, means[0], means[1], interval.low, interval.high, better)
        differences.append(Difference(*found, seeds[0], seeds[1], bool(trained)))
    return differences


def combined_interval(
    difference: float, resampling: Interval, values: Sequence[Sequence[float]], level: float
) -> Interval:
    """Interval of a difference of means over training seeds, for other images and other seeds.

    Variances add: that of resampling, from the half width of its interval, and s^2 / k of each side
    with k > 1 seeds, s^2 the sample variance of its `values`. The half width is the root of their
    sum v times Student's quantile with the effective degrees of freedom of Welch (1947) and
    Satterthwaite (1946), v^2 / sum((s^2 / k)^2 / (k - 1)), resampling taken as known. Seeds also
    differ by resampling, which is so counted twice: the interval is too wide, if anything.
    """
    tail = (1 + level) / 2
    parts = [(variance(side) / len(side), len(side) - 1) for side in values if len(side) > 1]
    known = ((resampling.high - resampling.low) / 2 / NormalDist().inv_cdf(tail)) ** 2
    total = known + sum(part for part, _ in parts)
    uncertain = sum(part**2 / degrees for part, degrees in parts)
    half = math.sqrt(total) * float(stdtrit(total**2 / uncertain if uncertain else math.inf, tail))
    return Interval(difference - half, difference + half)


def _seeds(record: ResultRecord, folder: Path, protocol: Protocol) -> list[ResultRecord]:
    """The record and those in its folder that differ in the training seed only, in order."""

    def measured(other: ResultRecord) -> Any:
        return open_hashes(protocol, other), other.metrics.keys()

    network = record.method.weights_sha256
    others = [
        other
        for other in load_all(folder)[0]
        if other.method.weights_sha256 != network and measured(other) == measured(record)
    ]
    return next(row for row in across_seeds([*others, record]) if record in row)


def _contributions(records: Sequence[ResultRecord], named: ResultRecord, folder: Path) -> _Arrays:
    """Mean contributions of some records; only the named one must have any."""
    files: list[_Arrays] = []
    for record in records:
        try:
            files.append(_unpack(load_contributions(record, folder)))
        except DimoError:
            if record is named:
                raise
    return {
        name: array if array.dtype.kind == "i" else np.mean([file[name] for file in files], axis=0)
        for name, array in files[0].items()
    }


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
    for part in ("reference", "extractor", "scorer", "prompts", "detector"):
        if getattr(a, f"{part}_sha256") != getattr(b, f"{part}_sha256"):
            raise DimoError(f"{names} were measured with different {part}; use the same for both")
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
