"""What stands in a cell, as every format shows it: numbers, headings, the sign for nothing."""

__all__ = [
    "MISSING",
    "half_width",
    "integer",
    "is_missing",
    "metric_heading",
    "number",
    "rows",
    "speed",
    "training_cost",
]

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from bench.catalog import METRICS

MISSING = "\u2013"


def metric_heading(name: str) -> str:
    """Column heading of a metric, with the direction that is better."""
    kind = METRICS[name]
    return f"{kind.label} ({'↑' if kind.higher_is_better else '↓'})"


def number(value: float, decimals: int) -> str:
    """A number with so many decimals, and no minus before a zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def half_width(value: float, decimals: int) -> str:
    """Half of an interval without its leading zero, `.045`: columns stay narrow."""
    return number(value, decimals).removeprefix("0") or "0"


def integer(value: Any) -> str:
    """An integer, or the sign for a missing one."""
    return MISSING if is_missing(value) else f"{int(value)}"


def speed(value: Any) -> str:
    """Images a second, to three digits or more."""
    if is_missing(value):
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def training_cost(training: Mapping[str, Any]) -> str:
    """What a training took, `15.9 min, 768,000 images seen`; "" where that is not known.

    Args:
        training: Of a record's method; numbers under `seconds` and `images_seen`.
    """
    parts = []
    for key, factor, form in (
        ("seconds", 60, "{:,.1f} min"),
        ("images_seen", 1, "{:,.0f} images seen"),
    ):
        value = training.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(form.format(value / factor))
    return ", ".join(parts)


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame, each as a dict with plain Python values."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def is_missing(value: Any) -> bool:
    """Whether a cell of a data frame holds None, NaN or NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
