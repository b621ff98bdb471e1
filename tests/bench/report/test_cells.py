"""What stands in a cell."""

import pytest

from bench.report.table import training_cost


@pytest.mark.parametrize(
    ("training", "shown"),
    [
        ({"seconds": 954.9, "images_seen": 768_000}, "15.9 min, 768,000 images seen"),
        ({"seconds": 7200.0, "images_seen": None}, "120.0 min"),
        ({"recipe": "x", "images_seen": 4}, "4 images seen"),
        ({"seconds": None, "images_seen": None}, ""),
        ({"seconds": "long", "images_seen": True}, ""),
        ({}, ""),
    ],
)
def test_what_a_training_took(training, shown):
    assert training_cost(training) == shown
