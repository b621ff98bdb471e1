"""bench.uncertainty: intervals around the point, of the right width, the same for a seed."""

import time

import numpy as np
import pytest
import torch

from bench.metrics import (
    class_hits,
    frechet_distance,
    inception_score,
    manifold_membership,
)
from bench.stats import FeatureStats, compute_stats
from bench.uncertainty import (
    Interval,
    bootstrap_frechet,
    bootstrap_inception_score,
    bootstrap_mean,
)
from dimo.errors import DimoError


def draw(seed, count, dim=8):
    mix = np.random.default_rng(99).standard_normal((dim, dim)) / dim**0.5
    return np.maximum(np.random.default_rng(seed).standard_normal((count, dim)) @ mix, 0)


def draw_logits(seed, count=500, classes=10):
    return np.random.default_rng(seed).standard_normal((count, classes)) * 3


REFERENCE = compute_stats(draw(0, 2000) * 1.2 + 0.1, extractor="x")


def frechet(features, reference=REFERENCE):
    return frechet_distance(generated=compute_stats(features, extractor="x"), reference=reference)


def frechet_interval(features, reference=REFERENCE, **settings):
    if "point" not in settings:
        settings["point"] = frechet(features, reference)
    settings = {"n_bootstrap": 200, "seed": 0} | settings
    return bootstrap_frechet(generated=features, reference=reference, **settings)


def score_interval(logits, splits=10, **settings):
    if "point" not in settings:
        settings["point"] = inception_score(logits, splits=splits, seed=2020).mean
    settings = {"n_bootstrap": 200, "seed": 0} | settings
    return bootstrap_inception_score(logits, splits=splits, **settings)


# Mean


def test_mean_has_the_width_of_the_normal_interval():
    values = (np.random.default_rng(0).random(2000) < 0.3).astype("f8")
    interval = bootstrap_mean(values, n_bootstrap=2000, seed=0)
    half = 1.96 * values.std() / 2000**0.5
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrower = bootstrap_mean(values, n_bootstrap=2000, seed=0, level=0.5)
    assert narrower.high - narrower.low == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.1)


def test_mean_interval_holds_the_true_mean_as_often_as_it_says():
    held = 0
    for seed in range(200):
        values = np.random.default_rng(seed).exponential(size=200)
        interval = bootstrap_mean(values, n_bootstrap=200, seed=seed)
        held += interval.low <= 1 <= interval.high
    assert 0.88 * 200 <= held <= 0.99 * 200


def test_mean_of_equal_values_has_no_width():
    interval = bootstrap_mean(np.full(7, 0.1), n_bootstrap=20, seed=0)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1), rel=1e-15)
    assert bootstrap_mean(torch.ones(1), n_bootstrap=20, seed=0) == Interval(1.0, 1.0)


# Frechet distance


@pytest.mark.parametrize("count", [1000, 60])
def test_frechet_has_the_spread_of_fresh_samples(count):
    fresh = [frechet(draw(seed, count)) for seed in range(1, 201)]
    widths = [np.subtract(*np.quantile(fresh, [0.975, 0.025]))]
    intervals = [frechet_interval(draw(seed, count)) for seed in range(1, 9)]
    widths.append(np.mean([interval.high - interval.low for interval in intervals]))
    assert widths[1] == pytest.approx(widths[0], rel=0.3)


def test_frechet_is_centred_on_the_point_not_on_the_biased_resamples():
    features = draw(1, 100)
    rng = np.random.default_rng(0)
    resampled = [frechet(features[rng.integers(100, size=100)]) for _ in range(200)]
    point = frechet(features)
    assert np.median(resampled) > point  # what a plain percentile interval would be centred on
    interval = frechet_interval(features)
    assert interval.low < point < interval.high
    moved = frechet_interval(features, point=point + 5)
    assert moved.low == pytest.approx(interval.low + 5, abs=1e-9)
    assert moved.high == pytest.approx(interval.high + 5, abs=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(50, 8), (20, 40)])
def test_frechet_resamples_are_frechet_distances(count, dim):
    features = draw(1, count, dim)
    for reference_count in (2000, 15):
        reference = compute_stats(draw(2, reference_count, dim) * 1.3, extractor="x")
        rng = np.random.RandomState(3)
        direct = [
            frechet(features[rng.randint(count, size=count, dtype=np.int64)], reference)
            for _ in range(21)
        ]
        tails = np.quantile(direct, [0.05, 0.95]) - np.median(direct) + 100
        interval = frechet_interval(
            features, reference, point=100.0, n_bootstrap=21, seed=3, level=0.9
        )
        assert (interval.low, interval.high) == pytest.approx(tuple(tails), rel=1e-8)


def test_frechet_never_goes_below_zero():
    features = draw(1, 50)
    interval = frechet_interval(features, compute_stats(features, extractor="x"))
    assert -1e-9 < interval.low <= 0 < interval.high


def test_frechet_of_constant_features():
    reference = FeatureStats("x", 9, np.zeros(3), np.zeros((3, 3)))
    interval = frechet_interval(np.ones((20, 3)), reference)
    assert (interval.low, interval.high) == pytest.approx((3, 3), abs=1e-12)


# Inception Score


@pytest.mark.parametrize("splits", [1, 10])
def test_score_has_the_spread_of_fresh_samples(splits):
    fresh = [
        inception_score(draw_logits(seed), splits=splits, seed=2020).mean for seed in range(200)
    ]
    width = np.subtract(*np.quantile(fresh, [0.975, 0.025]))
    intervals = [score_interval(draw_logits(seed), splits) for seed in range(8)]
    widths = [interval.high - interval.low for interval in intervals]
    assert np.mean(widths) == pytest.approx(width, rel=0.3)


@pytest.mark.parametrize("splits", [1, 7])
def test_score_resamples_are_inception_scores(splits):
    logits = draw_logits(0, count=100)
    point = inception_score(logits, splits=splits, seed=0).mean
    rng = np.random.RandomState(3)
    direct = []
    for _ in range(21):
        drawn = logits[rng.randint(100, size=100, dtype=np.int64)]
        unshuffle = np.empty_like(drawn)
        unshuffle[np.random.RandomState(0).permutation(100)] = drawn  # undoes the shuffle inside
        direct.append(inception_score(unshuffle, splits=splits, seed=0).mean)
    tails = np.quantile(direct, [0.05, 0.95]) - np.median(direct) + point
    interval = score_interval(logits, splits, point=point, n_bootstrap=21, seed=3, level=0.9)
    assert (interval.low, interval.high) == pytest.approx(tuple(tails), rel=1e-10)


def test_score_holds_the_point_and_never_goes_below_one():
    logits = draw_logits(0)
    point = inception_score(logits, splits=10, seed=2020).mean
    interval = score_interval(logits)
    assert interval.low < point < interval.high
    weak = score_interval(logits * 1e-3)
    assert 1 <= weak.low <= weak.high


def test_score_of_certain_logits_is_finite():
    certain = 1e4 * np.eye(10)[np.arange(200) % 10]
    interval = score_interval(certain, splits=2)
    assert 8 < interval.low <= interval.high < 11


# All


@pytest.mark.parametrize(
    "interval_of_seed",
    [
        lambda seed: bootstrap_mean(draw(1, 50)[:, 0], n_bootstrap=50, seed=seed),
        lambda seed: frechet_interval(draw(1, 50), n_bootstrap=50, seed=seed),
        lambda seed: score_interval(draw_logits(1), n_bootstrap=50, seed=seed),
    ],
)
def test_a_seed_fixes_the_interval(interval_of_seed):
    first = interval_of_seed(3)
    np.random.random(5)  # noqa: NPY002 - the global stream must not matter
    assert interval_of_seed(3) == first
    assert interval_of_seed(4) != first


def test_all_metrics_of_a_run_take_seconds():
    generated, logits = draw(1, 5000, 64), draw_logits(2, 5000)
    reference = draw(3, 1797, 64)
    stats = compute_stats(reference, extractor="x")
    membership = manifold_membership(generated=generated[:500], reference=reference[:500], k=3)
    shares = [np.resize(membership.precision, 5000), np.resize(membership.recall, 1797)]
    shares += [np.resize(membership.density, 5000), np.resize(membership.coverage, 1797)]
    shares += [class_hits(logits, np.arange(5000) % 10)]
    start = time.process_time()
    for values in shares:
        bootstrap_mean(values, n_bootstrap=200, seed=0)
    frechet_interval(generated, stats)
    score_interval(logits)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bootstrap": 0}, "n_bootstrap is 0"),
        ({"level": 1.0}, "level 1.0"),
        ({"level": 0.0}, "level 0.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(DimoError, match=message):
        bootstrap_mean(np.zeros(5), **({"n_bootstrap": 10, "seed": 0} | settings))
    with pytest.raises(DimoError, match=message):
        frechet_interval(draw(1, 50), **settings)
    with pytest.raises(DimoError, match=message):
        score_interval(draw_logits(1), **settings)


def test_refuses():
    with pytest.raises(DimoError, match=r"values have shape \[2, 2\]"):
        bootstrap_mean(np.zeros((2, 2)), n_bootstrap=10, seed=0)
    with pytest.raises(DimoError, match="at least 1 samples"):
        bootstrap_mean(np.zeros(0), n_bootstrap=10, seed=0)
    with pytest.raises(DimoError, match="values hold 1 NaN"):
        bootstrap_mean(np.array([0, np.nan]), n_bootstrap=10, seed=0)
    with pytest.raises(DimoError, match="dimension 7; expected 8"):
        frechet_interval(draw(1, 50)[:, :7], point=1.0)
    with pytest.raises(DimoError, match="at least 2 samples"):
        frechet_interval(draw(1, 1), point=1.0)
    with pytest.raises(DimoError, match="point is nan"):
        frechet_interval(draw(1, 50), point=float("nan"))
    with pytest.raises(DimoError, match="splits is 6 for 5 images"):
        score_interval(draw_logits(0, 5), 6, point=1.0)
