"""bench.metrics.inception_score and class_accuracy."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from bench.metrics import class_accuracy, class_hits, inception_score
from bench.metrics.inception_score import split_rows
from dimo.errors import DimoError


def draw(count=1003, classes=17, scale=2.0):
    return np.random.default_rng(0).standard_normal((count, classes)) * scale


def one_hot(labels, classes, scale=1000.0):
    return scale * np.eye(classes)[labels]


def test_certain_and_balanced_gives_the_number_of_classes():
    score = inception_score(one_hot(np.arange(1000) % 10, 10), splits=1, seed=0)
    assert score.value == pytest.approx(10, rel=1e-12)
    assert score.extra["std"] == 0


def test_uninformative_gives_one():
    assert inception_score(np.zeros((50, 10)), splits=5, seed=0).value == pytest.approx(1)
    same = inception_score(one_hot(np.full(50, 3), 10), splits=5, seed=0)
    assert (same.value, same.extra["std"], same.extra["one_split"]) == (1.0, 0.0, 1.0)


def test_sorted_images_keep_their_score():
    labels = np.repeat(np.arange(10), 500)
    score = inception_score(one_hot(labels, 10), splits=10, seed=2020)
    assert score.value > 9.8  # without the shuffle each split would hold one class: 1.0


def test_two_class_closed_form():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    q = p.mean(0)
    expected = np.exp((p * np.log(p / q)).sum(1).mean())
    assert inception_score(np.log(p) + 5, splits=1, seed=0).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("splits", "seed", "dtype"),
    [
        (1, 2020, "f4"),
        (2, 0, "f8"),
        (7, 2020, "f8"),
        (10, 2020, "f4"),
        (10, 0, "f8"),
        (1003, 0, "f4"),
    ],
)
def test_equals_torch_fidelity(splits, seed, dtype):
    logits = draw().astype(dtype)
    peer = isc_features_to_metric(torch.from_numpy(logits), splits, True, seed)
    for given in (logits, torch.from_numpy(logits)):
        score = inception_score(given, splits=splits, seed=seed)
        assert score.value == pytest.approx(peer["inception_score_mean"], rel=1e-12)
        assert score.extra["std"] == pytest.approx(peer["inception_score_std"], rel=1e-9, abs=1e-12)


def test_one_split_is_order_free_and_shift_free():
    logits = draw()
    value = inception_score(logits, splits=1, seed=0).value
    assert inception_score(logits[::-1], splits=1, seed=7).value == pytest.approx(value, rel=1e-12)
    shifted = logits + np.random.default_rng(1).standard_normal((len(logits), 1)) * 100
    assert inception_score(shifted, splits=1, seed=0).value == pytest.approx(value, rel=1e-12)


def test_rows_are_images():
    logits = draw(40, 40)
    value, other = (inception_score(x, splits=1, seed=0).value for x in (logits, logits.T))
    assert value != other


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, 0, -1e4], [0, 1e4, -1e4]], dtype="f4")
    assert inception_score(logits, splits=1, seed=0).value == pytest.approx(2, rel=1e-12)


def test_splits_cover_every_row_once():
    rows = split_rows(1003, 4, seed=0)
    assert [len(part) for part in rows] == [250, 251, 251, 251]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(1003))
    assert np.all(rows[0] == np.random.RandomState(0).permutation(1003)[:250])


@pytest.mark.parametrize("splits", [2, 10, 1003])
def test_one_split_is_the_score_of_all_rows_at_once(splits):
    logits = draw()
    found = inception_score(logits, splits=splits, seed=0)
    whole = isc_features_to_metric(torch.from_numpy(logits), 1, True, 2020)
    assert found.extra["one_split"] == pytest.approx(whole["inception_score_mean"], rel=1e-12)
    assert found.extra["one_split"] > found.value  # splits bias low
    again = inception_score(logits[np.argsort(logits[:, 0])], splits=splits, seed=7)
    assert again.extra["one_split"] == pytest.approx(found.extra["one_split"], rel=1e-12)


def test_sets_larger_than_a_block():
    logits = draw(9001, 5)
    peer = isc_features_to_metric(torch.from_numpy(logits), 2, True, 2020)
    score = inception_score(logits, splits=2, seed=2020)
    assert score.value == pytest.approx(peer["inception_score_mean"], rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "splits", "message"),
    [
        (np.zeros((5, 3)), 6, "splits is 6 for 5 images; allowed: 1 to 5"),
        (np.zeros((5, 3)), 0, "splits is 0"),
        (np.zeros((1, 3)), 1, "at least 2 samples"),
        (np.zeros((0, 3)), 1, r"shape \[0, 3\]"),
        (np.zeros(3), 1, r"allowed: \[N, D\]"),
        (np.array([[0, np.nan], [0, 0]]), 1, "1 NaN and 0 infinite values in 1 of 2 rows"),
    ],
)
def test_inception_score_refuses(logits, splits, message):
    with pytest.raises(DimoError, match=message):
        inception_score(logits, splits=splits, seed=0)


def test_class_accuracy():
    logits = np.array([[3, 1, 2], [0, 5, 1], [0, 0, 0], [1, 2, 3]], dtype="f4")
    labels = np.array([0, 2, 0, 2])  # right, wrong, right (the first of equals), right
    np.testing.assert_array_equal(class_hits(logits, labels), [1.0, 0.0, 1.0, 1.0])
    assert class_accuracy(logits, labels) == 0.75
    assert class_accuracy(torch.from_numpy(logits), torch.from_numpy(labels)) == 0.75
    assert class_accuracy(logits[::-1], labels[::-1]) == 0.75


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1]), r"shape \[2\] .* for 3 images"),
        (np.array([0.0, 1, 2]), "dtype float64"),
        (np.array([0, 4, -1]), "2 of 3 labels are out of range, the first is 4; allowed: 0 to 3"),
        (np.array([[0], [1], [2]]), r"shape \[3, 1\]"),
    ],
)
def test_class_accuracy_refuses(labels, message):
    with pytest.raises(DimoError, match=message):
        class_accuracy(np.zeros((3, 4)), labels)


def test_class_accuracy_refuses_bad_logits():
    with pytest.raises(DimoError, match="1 NaN"):
        class_accuracy(np.array([[0.0, np.nan]]), np.array([0]))
    with pytest.raises(DimoError, match=r"shape \[0, 4\]"):
        class_accuracy(np.zeros((0, 4)), np.zeros(0, dtype=int))
