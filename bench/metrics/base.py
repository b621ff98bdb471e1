"""What a metric is computed from, and what it returns.

A row of `bench.protocol.catalog.METRICS` names a function `(samples: Samples, **params) -> Score`,
where `params` are the metric's integers in the protocol.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.features.stats import FeatureStats
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Samples:
    """One set of generated images and its reference, as arrays.

    Attributes:
        generated: `[N, D]` float32, the extractor output that the metric's row names in `needs`.
        reference: `[M, D]` float32; None unless the row compares with samples.
        statistics: Mean and covariance of the reference; None unless the row compares with them.
        labels: `[N]` requested classes; None if unknown.
        device: Where distances between samples are computed.
        shared: Intermediate results that several metrics use, by a key of the metric's choice.
    """

    generated: npt.NDArray[np.float32]
    reference: npt.NDArray[np.float32] | None = None
    statistics: FeatureStats | None = None
    labels: npt.NDArray[np.int64] | None = None
    device: torch.device = _CPU
    shared: dict[Any, Any] = field(default_factory=dict)

    def sides(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Generated and reference samples."""
        if self.reference is None:
            raise DimoError("no reference samples; set compares_with='samples' in its METRICS row")
        return self.generated, self.reference


@dataclass(frozen=True, eq=False)
class Score:
    """One metric of one set of images.

    Attributes:
        value: The metric.
        contributions: `[K]`, what each sample adds to the value, to first order
            (`bench.metrics.uncertainty`).
        labels: Label of each of these samples, where the protocol fixes how many have each.
        extra: Further numbers for the record.
        smallest: Lowest possible value, where intervals end; None if unbounded.
        of_reference: Whether the contributions are those of the reference images.
    """

    value: float
    contributions: _Floats
    labels: npt.NDArray[np.int64] | None = None
    extra: dict[str, float] = field(default_factory=dict)
    smallest: float | None = 0.0
    of_reference: bool = False
