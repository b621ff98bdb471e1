"""What a cell shows."""

import pytest

from bench.report.runs import number
from bench.report.table import uncertainty


def test_zero_has_no_sign():
    assert [number(value) for value in (-1e-13, -0.0, 1e-9)] == ["0.0000"] * 3


@pytest.mark.parametrize(
    ("half", "decimals", "shown"),
    [
        (0.045, 3, "±.045"),
        (0.0004, 3, "±.000"),
        (0.9996, 3, "±1.000"),  # as the value beside it
        (7.78, 2, "±7.78"),
        (7.0, 0, "±7"),
        (0.2, 0, "±0"),
    ],
)
def test_an_interval_is_shown_by_its_half(half, decimals, shown):
    assert uncertainty(half, decimals) == shown
