"""`fdr6` and the six `mind_*`: each network's features alone, by the published formula."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from bench.features import Features
from bench.features.references import ReferenceSet
from bench.features.stats import compute_stats
from bench.metrics import mind
from bench.metrics.base import Samples, bootstrap_interval
from bench.metrics.frechet import score_fdr6
from bench.metrics.scores import known_gaps, score
from bench.protocol import load_protocol
from bench.protocol.catalog import SIX
from dimo.errors import DimoError

PUBLISHED = (1.68, 56.87, 14.19, 0.04, 0.60, 5.60)  # of catalogue.yaml, in the order of SIX
WIDTHS = (9, 5, 6, 4, 7, 5)
STOPS = np.cumsum(WIDTHS)
COLUMNS = {
    name: slice(stop - width, stop) for name, width, stop in zip(SIX, WIDTHS, STOPS, strict=True)
}


def draw(seed, count, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((STOPS[-1], STOPS[-1]))
    scale = np.repeat([1, 3, 2, 0.1, 0.3, 1], WIDTHS)
    return ((rng.standard_normal((count, STOPS[-1])) @ mix + shift) * scale).astype("f4")


def published(x, y):
    """Moments by sums, the root by scipy's `sqrtm`, one distance after the other."""
    ratios = []
    for columns, constant in zip(COLUMNS.values(), PUBLISHED, strict=True):
        moments = []
        for side in (x[:, columns].astype("f8"), y[:, columns].astype("f8")):
            mu, count = side.mean(0), len(side)
            moments.append((mu, (side.T @ side - count * np.outer(mu, mu)) / (count - 1)))
        (mu, s), (other, t) = moments
        root = scipy.linalg.sqrtm(s @ t).real
        distance = (mu - other) @ (mu - other) + np.trace(s) + np.trace(t) - 2 * np.trace(root)
        ratios.append(distance / constant)
    return ratios


def samples(x, y):
    parts = {
        name: Samples(x[:, c], statistics=compute_stats(y[:, c], extractor="six"))
        for name, c in COLUMNS.items()
    }
    return Samples(x, parts=parts)


def reference_of(y, *, features=True):
    stats = {name: compute_stats(y[:, c], extractor="six") for name, c in COLUMNS.items()}
    kept = Features(y) if features else None
    return ReferenceSet("r", "0" * 64, stats, kept, len(y) if features else None, COLUMNS)


@pytest.fixture(scope="module")
def protocol():
    return load_protocol("imagenet256-six")


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_equals_the_published_formula(shift):
    x, y = draw(0, 300, shift), draw(1, 400)
    found, expected = score_fdr6(samples(x, y)), published(x, y)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-6)
    assert list(found.extra.values()) == pytest.approx(expected, rel=1e-6)
    assert list(found.extra) == list(SIX)


def test_contributions_are_those_of_images_left_out():
    x, y = draw(0, 200, 0.2), draw(1, 300)
    found = score_fdr6(samples(x, y))
    for i in (0, 17):
        less = score_fdr6(samples(np.delete(x, i, 0), y)).value
        assert found.contributions[i] == pytest.approx(
            (len(x) - 1) * (found.value - less), rel=1e-4
        )
    interval = bootstrap_interval(found.contributions, point=found.value, n_bootstrap=50, seed=0)
    assert 0 < interval.low < found.value < interval.high


def test_a_protocol_has_fdr6_and_six_minds_of_the_columns(protocol):
    x, y = draw(0, 120, 0.2), draw(1, 150)
    features = Features(x, labels=np.arange(120) % 10)
    found = score(protocol, features, reference_of(y), device=torch.device("cpu"))
    assert list(found) == ["fdr6", *(f"mind_{name}" for name in SIX)]
    assert found["fdr6"].value == pytest.approx(np.mean(published(x, y)), rel=1e-6)
    for name, columns in COLUMNS.items():
        alone = mind(generated=x[:, columns], reference=y[:, columns])
        assert found[f"mind_{name}"].value == alone.value
        assert found[f"mind_{name}"].labels is not None
    swapped = score(protocol, Features(y), reference_of(x), device=torch.device("cpu"))
    assert swapped["fdr6"].value == pytest.approx(found["fdr6"].value, rel=1e-9)
    assert len(swapped["fdr6"].contributions) == 150


def test_statistics_alone_leave_out_the_minds(protocol):
    x, reference = draw(0, 60), reference_of(draw(1, 80), features=False)
    found = score(protocol, Features(x), reference, device=torch.device("cpu"))
    assert list(found) == ["fdr6"]
    options = {"count": 60, "has_labels": True, "outputs": ("features",)}
    assert "fdr6" not in known_gaps(protocol, reference, **options)
    less = replace(reference, stats={"inception": reference.stats["inception"]})
    gap = known_gaps(protocol, less, **options)["fdr6"]
    assert gap == "the reference has no statistics of convnext, dinov2, mae, siglip2, clip"


def test_features_of_other_networks_are_refused(protocol):
    y = draw(1, 80)
    with pytest.raises(DimoError, match="fdr6: features have dimension 9; expected 36"):
        score(protocol, Features(y[:, :9]), reference_of(y), device=torch.device("cpu"))
