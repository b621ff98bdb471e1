"""bench.metrics.base: contributions that predict resampling, and intervals of the right
width."""

import time
import tracemalloc

import numpy as np
import pytest
import torch

from bench.features.stats import FeatureStats, compute_stats
from bench.metrics import cmmd, frechet_distance, inception_score, kernel_distance, mind
from bench.metrics.base import (
    Interval,
    bootstrap_interval,
    paired_interval,
)
from bench.metrics.frechet import frechet_contributions
from dimo.errors import DimoError

KID = {"subsets": 10, "subset_size": 80, "seed": 3}


def draw(seed, count, dim=8, scale=1.0):
    mix = np.random.default_rng(99).standard_normal((dim, dim)) / dim**0.5 * scale
    return np.maximum(np.random.default_rng(seed).standard_normal((count, dim)) @ mix, 0)


def draw_logits(seed, count=500, classes=10):
    return np.random.default_rng(seed).standard_normal((count, classes)) * 3


def stats(features):
    return compute_stats(features, extractor="x")


def frechet(features, reference):
    return frechet_distance(generated=stats(features), reference=reference)


def width(contributions, **settings):
    settings = {"point": 0.0, "n_bootstrap": 500, "seed": 0} | settings
    interval = bootstrap_interval(contributions, **settings)
    return interval.high - interval.low


def spread(values):
    """Width of the 95 % interval of normal values."""
    return 2 * 1.96 * np.std(values)


def resampled(metric, features, repeats, seed=0):
    """The metric of `repeats` bootstrap resamples of the rows, the slow way."""
    rng, count = np.random.default_rng(seed), len(features)
    return [metric(features[rng.integers(count, size=count)]) for _ in range(repeats)]


# The bootstrap of a mean


def test_width_of_the_normal_interval():
    values = (np.random.default_rng(0).random(2000) < 0.3).astype("f8")
    interval = bootstrap_interval(values, point=values.mean(), n_bootstrap=2000, seed=0)
    half = 1.96 * values.std() / 2000**0.5
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrower = width(values, n_bootstrap=2000, level=0.5)
    assert narrower == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.1)


def test_holds_the_true_mean_as_often_as_it_says():
    held = 0
    for seed in range(200):
        values = np.random.default_rng(seed).exponential(size=200)
        interval = bootstrap_interval(values, point=values.mean(), n_bootstrap=200, seed=seed)
        held += interval.low <= 1 <= interval.high
    assert 0.88 * 200 <= held <= 0.99 * 200


def test_interval_lies_around_the_point_and_stops_at_the_smallest_value():
    values = np.random.default_rng(0).standard_normal(100)
    settings = {"n_bootstrap": 100, "seed": 0}
    there = bootstrap_interval(values, point=3.0, **settings)
    shifted = bootstrap_interval(values + 1e6, point=5.0, **settings)
    assert there.low < 3 < there.high
    expected = there.low + 2, there.high + 2
    assert (shifted.low, shifted.high) == pytest.approx(expected, rel=1e-9)
    assert bootstrap_interval(values, point=3.0, smallest=2.99, **settings).low == 2.99
    assert bootstrap_interval(values, point=3.0, smallest=-9.0, **settings) == there
    below = bootstrap_interval(values, point=-1e-13, smallest=0.0, **settings)
    assert below.low == -1e-13  # rounding below the smallest value stays inside
    one = bootstrap_interval(values, point=3.0, n_bootstrap=1, seed=0)
    assert 3.0 in (one.low, one.high)
    assert one.low < one.high


def test_equal_contributions_have_no_width():
    settings = {"n_bootstrap": 20, "seed": 0}
    interval = bootstrap_interval(np.full(7, 0.1), point=0.1, **settings)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1), rel=1e-15)
    assert bootstrap_interval(torch.ones(1), point=1, **settings) == Interval(1.0, 1.0)


def test_balanced_labels_leave_the_spread_within_labels():
    means, labels = np.arange(10.0), np.arange(300) % 10

    def fresh(seed):
        return np.random.default_rng(seed).standard_normal(300) + means[labels]

    truth = spread([fresh(seed).mean() for seed in range(1000)])
    assert width(fresh(0), labels=labels, n_bootstrap=2000) == pytest.approx(truth, rel=0.12)
    assert width(fresh(0), n_bootstrap=2000) > 2.5 * truth
    shuffled = np.random.default_rng(0).permutation(labels)
    assert width(fresh(0), labels=shuffled) == pytest.approx(width(fresh(0)), rel=0.1)


def test_labels_of_few_samples_do_not_hide_the_spread():
    values = np.random.default_rng(0).standard_normal(3000)
    for each in (1, 2, 3):
        within = width(values, labels=np.arange(3000) // each)
        assert within == pytest.approx(width(values), rel=0.1)


def test_paired_rows_keep_what_differs():
    rng = np.random.default_rng(0)
    common, noise = rng.standard_normal(1000) * 9, rng.standard_normal(1000)
    settings = {"difference": 2.0, "n_bootstrap": 1000, "seed": 0}
    interval = paired_interval(common + noise, common, **settings)
    half = 1.96 * noise.std() / 1000**0.5
    assert (interval.low, interval.high) == pytest.approx((2 - half, 2 + half), abs=0.15 * half)
    swapped = paired_interval(common, common + noise, **settings | {"difference": -2.0})
    assert swapped == pytest.approx(Interval(-interval.high, -interval.low))
    assert paired_interval(common, common, **settings) == Interval(2.0, 2.0)
    labels = np.arange(1000) % 5
    offset = paired_interval(common + labels, common, labels=labels, **settings)
    assert (offset.low, offset.high) == pytest.approx((2.0, 2.0), abs=1e-12)


# Frechet distance


@pytest.mark.parametrize("reference_count", [2000, 15])
@pytest.mark.parametrize(("count", "dim"), [(50, 8), (9, 8), (20, 40), (3, 4)])
def test_frechet_contributions_are_what_leaving_out_an_image_costs(count, dim, reference_count):
    features = draw(1, count, dim) + 3
    reference = stats(draw(2, reference_count, dim) * 1.3 + 3)
    found = frechet_contributions(generated=torch.from_numpy(features), reference=reference)
    point = frechet(features, reference)
    without = [frechet(np.delete(features, i, axis=0), reference) for i in range(count)]
    expected = (count - 1) * (point - np.array(without))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_frechet_contributions_by_known_statistics_are_the_same():
    features, reference = draw(3, 60), stats(draw(4, 90))
    known = frechet_contributions(generated=features, reference=reference, stats=stats(features))
    np.testing.assert_array_equal(
        known, frechet_contributions(generated=features, reference=reference)
    )


def test_frechet_contributions_tend_to_the_influence_function():
    features, reference = draw(1, 40000), stats(draw(2, 5000) * 1.3)
    generated = stats(features)
    root = np.linalg.cholesky(reference.sigma)
    values, vectors = np.linalg.eigh(root.T @ generated.sigma @ root)
    optimal_map = root @ (vectors / np.sqrt(values)) @ vectors.T @ root.T
    np.testing.assert_allclose(optimal_map @ generated.sigma @ optimal_map, reference.sigma)
    centered = features - generated.mu
    influence = 2 * centered @ (generated.mu - reference.mu)
    influence += np.einsum("nd,nd->n", centered, centered @ (np.eye(8) - optimal_map))
    found = frechet_contributions(generated=features, reference=reference)
    found, influence = found - found.mean(), influence - influence.mean()
    np.testing.assert_allclose(found, influence, rtol=3e-3, atol=1e-3 * influence.std())


@pytest.mark.parametrize("count", [2000, 100, 16])
def test_frechet_intervals_have_the_spread_of_fresh_samples(count):
    reference = stats(draw(0, 5000, 16) * 1.2 + 0.1)
    truth = spread([frechet(draw(seed, count, 16), reference) for seed in range(100, 500)])
    widths = [
        width(frechet_contributions(generated=draw(seed, count, 16), reference=reference))
        for seed in range(100, 110)
    ]
    assert 0.8 < np.mean(widths) / truth < 1.25


def test_frechet_intervals_between_equal_distributions_are_on_the_safe_side():
    reference = stats(draw(0, 100000, 16))
    features = [draw(seed, 500, 16) for seed in range(100, 500)]
    truth = spread([frechet(sample, reference) for sample in features])
    few = features[:8]
    ours = [width(frechet_contributions(generated=x, reference=reference)) for x in few]
    slow = [spread(resampled(lambda x: frechet(x, reference), x, 60)) for x in few]
    assert 1.2 < np.mean(ours) / truth < 1.6  # sqrt(2)
    assert 1.5 < np.mean(slow) / truth < 2.2  # sqrt(3), more for N of some D


def test_frechet_intervals_agree_with_resampling_the_images():
    reference, features = stats(draw(0, 1797, 64) * 1.2 + 0.1), draw(1, 2000, 64)
    slow = spread(resampled(lambda x: frechet(x, reference), features, 100))
    ours = width(frechet_contributions(generated=features, reference=reference))
    assert ours == pytest.approx(slow, rel=0.2)


def test_frechet_contributions_of_constant_features():
    reference = FeatureStats("x", 9, np.zeros(3), np.zeros((3, 3)))
    for other in (reference, stats(draw(0, 100, 3))):
        found = frechet_contributions(generated=np.ones((20, 3)), reference=other)
        np.testing.assert_allclose(found, 0, atol=1e-12)


def test_frechet_contributions_follow_scale_and_order():
    features, reference = draw(1, 60), draw(2, 500)
    found = frechet_contributions(generated=features, reference=stats(reference))
    for scale in (1e-9, 1e9):
        other = frechet_contributions(
            generated=(features * scale)[::-1], reference=stats(reference * scale)
        )
        np.testing.assert_allclose(other[::-1] / scale**2, found, rtol=1e-6, atol=1e-8)


def test_frechet_contributions_copy_no_features():
    features, reference = draw(1, 50000, 16).astype("f4"), stats(draw(2, 500, 16))
    tracemalloc.start()
    frechet_contributions(generated=features, reference=reference)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5.5e6  # a float64 copy takes 6.4 MB, the contributions 0.4


# Inception Score


def test_score_contributions_by_hand():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    divergence = (p * np.log(p / p.mean(0))).sum(1)
    expected = np.exp(divergence.mean()) * divergence
    found = inception_score(torch.from_numpy(np.log(p) + 5), splits=1, seed=0).contributions
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("splits", [1, 3])
def test_score_contributions_are_the_derivative_of_the_score(splits):
    logits, times = draw_logits(0, 300 * splits + splits - 1, 4), 40
    found = inception_score(logits, splits=splits, seed=7).contributions
    order = np.random.RandomState(7).permutation(len(logits))
    bounds = np.arange(splits + 1) * len(logits) // splits
    for part in range(splits):
        rows = order[bounds[part] : bounds[part + 1]]
        repeated = np.repeat(logits[rows], times, axis=0)
        value = inception_score(repeated, splits=1, seed=0).value
        for row in rows[:3]:
            more = np.concatenate([repeated, logits[row : row + 1]])
            slope = (inception_score(more, splits=1, seed=0).value - value) * len(more)
            share = splits * len(rows) / len(logits)
            expected = (found[row] - found[rows].mean()) * share
            assert slope == pytest.approx(expected, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("splits", [1, 10])
def test_score_intervals_have_the_spread_of_fresh_samples_and_of_resampling(splits):
    def score(logits):
        return inception_score(logits, splits=splits, seed=2020).value

    truth = spread([score(draw_logits(seed)) for seed in range(300)])
    slow = spread(resampled(score, draw_logits(0), 300))
    contributions = [
        inception_score(draw_logits(seed), splits=splits, seed=2020).contributions
        for seed in range(8)
    ]
    assert 0.8 < np.mean([width(c) for c in contributions]) / truth < 1.25
    assert width(contributions[0]) == pytest.approx(slow, rel=0.15)


def test_score_contributions_of_certain_logits_are_finite():
    certain = 1e4 * np.eye(10)[np.arange(200) % 10]
    found = inception_score(certain, splits=2, seed=0).contributions
    assert np.isfinite(found).all()
    assert found.mean() == pytest.approx(10 * np.log(10), rel=0.05)


# Kernel distances


@pytest.mark.parametrize(("scale", "ratio"), [(1.5, (0.8, 1.25)), (1.0, (0.9, 1.4))])
@pytest.mark.parametrize("kind", ["polynomial", "rbf"])
def test_kernel_intervals_have_the_spread_of_fresh_samples(kind, scale, ratio):
    reference = draw(1, 500) + 0.2
    settings = KID if kind == "polynomial" else {"sigma": 1.0}

    def metric(features):
        sides = {"generated": features, "reference": reference}
        if kind == "polynomial":
            return kernel_distance(**sides, **settings).value
        return cmmd(**sides, **settings).value

    features = [draw(seed, 400, scale=scale) + 0.2 for seed in range(100, 350)]
    truth = spread([metric(sample) for sample in features])
    measure = kernel_distance if kind == "polynomial" else cmmd
    contributions = [
        measure(generated=sample, reference=reference, **settings).contributions
        for sample in features[:10]
    ]
    ours = np.mean([width(c) for c in contributions])
    assert ratio[0] < ours / truth < ratio[1]
    slow = [spread(resampled(metric, sample, 50)) for sample in features[:4]]
    assert ours == pytest.approx(np.mean(slow), rel=0.25)


# Sliced optimal transport


@pytest.mark.parametrize("sizes", [(400, 500), (500, 400)])  # either side may be the larger one
@pytest.mark.parametrize(("scale", "ratio"), [(1.4, (0.85, 1.2)), (1.0, (0.9, 1.4))])
def test_mind_intervals_have_the_spread_of_fresh_samples(sizes, scale, ratio):
    reference = draw(1, sizes[1])
    found = [
        mind(generated=draw(seed, sizes[0], scale=scale), reference=reference, projections=50)
        for seed in range(100, 350)
    ]
    truth = spread([score.value for score in found])
    assert ratio[0] < np.mean([width(s.contributions) for s in found[:10]]) / truth < ratio[1]


def test_mind_intervals_within_labels_have_the_spread_of_fresh_samples():
    labels, reference = np.arange(600) % 6, draw(1, 400)  # 400 of the 600 are taken
    middles = 2 * np.random.default_rng(5).standard_normal((6, 8))
    found = [
        mind(generated=draw(seed, 600) + middles[labels], reference=reference, projections=50)
        for seed in range(100, 300)
    ]
    truth = spread([score.value for score in found])
    few = found[:10]
    within = np.mean([width(s.contributions, labels=labels[s.rows]) for s in few])
    assert 0.85 < within / truth < 1.2
    assert np.mean([width(s.contributions) for s in few]) > 1.5 * truth


# All


@pytest.mark.parametrize(
    "interval_of_seed",
    [
        lambda seed: bootstrap_interval(draw(1, 50)[:, 0], point=0.0, n_bootstrap=50, seed=seed),
        lambda seed: paired_interval(
            draw(1, 50)[:, 0], draw(2, 50)[:, 0], difference=0.0, n_bootstrap=50, seed=seed
        ),
    ],
)
def test_a_seed_fixes_the_interval(interval_of_seed):
    first = interval_of_seed(3)
    np.random.random(5)  # noqa: NPY002 - the global stream must not matter
    assert interval_of_seed(3) == first
    assert interval_of_seed(4) != first


def test_fifty_thousand_images_take_seconds():
    features, logits = draw(1, 50000, 16), draw_logits(2, 50000)
    reference = stats(draw(3, 1797, 16))
    start = time.process_time()
    contributions = frechet_contributions(generated=features, reference=reference)
    width(contributions, n_bootstrap=1000)
    width(inception_score(logits, splits=10, seed=0).contributions, n_bootstrap=1000)
    assert time.process_time() - start < 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bootstrap": 0}, "n_bootstrap is 0"),
        ({"level": 1.0}, "level 1.0"),
        ({"level": 0.0}, "level 0.0"),
        ({"point": float("nan")}, "point is nan"),
        ({"labels": np.zeros(4, dtype="i8")}, r"labels have shape \[4\] .* 5 samples"),
        ({"labels": np.zeros(5)}, "labels have .* dtype float64"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(DimoError, match=message):
        bootstrap_interval(np.zeros(5), **{"point": 0.0, "n_bootstrap": 9, "seed": 0} | settings)


def test_refuses():
    settings = {"point": 0.0, "n_bootstrap": 10, "seed": 0}
    with pytest.raises(DimoError, match=r"contributions have shape \[2, 2\]"):
        bootstrap_interval(np.zeros((2, 2)), **settings)
    with pytest.raises(DimoError, match="at least 1 samples"):
        bootstrap_interval(np.zeros(0), **settings)
    with pytest.raises(DimoError, match="contributions hold 1 NaN"):
        bootstrap_interval(np.array([0, np.nan]), **settings)
    with pytest.raises(DimoError, match="the rows have 4 and 1 samples"):
        paired_interval(np.zeros(4), np.zeros(1), difference=0.0, n_bootstrap=10, seed=0)
    reference = stats(draw(0, 50))
    with pytest.raises(DimoError, match="dimension 7; expected 8"):
        frechet_contributions(generated=draw(1, 50)[:, :7], reference=reference)
    with pytest.raises(DimoError, match="at least 3 samples"):
        frechet_contributions(generated=draw(1, 2), reference=reference)
    with pytest.raises(DimoError, match="splits is 6 for 5 images"):
        inception_score(draw_logits(0, 5), splits=6, seed=0)
    with pytest.raises(DimoError, match="9 generated samples for subset_size = 80"):
        kernel_distance(generated=draw(0, 9), reference=draw(1, 90), **KID)
