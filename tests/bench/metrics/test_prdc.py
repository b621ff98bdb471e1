"""bench.metrics.prdc: the convention, ties, chunks, memory, agreement with two other packages."""

import tracemalloc

import numpy as np
import prdc as peer
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from bench.metrics import manifold_membership, prdc
from dimo.errors import DimoError

NAMES = ("precision", "recall", "density", "coverage")
RNG = np.random.default_rng(0)


def normal(count, dim, scale=1.0, dtype="f8", seed=0):
    return (np.random.default_rng(seed).standard_normal((count, dim)) * scale).astype(dtype)


def with_copies(features, copies):
    return np.repeat(features, copies, axis=0)[
        np.random.default_rng(5).permutation(len(features) * copies)
    ]


def scores(result):
    return [getattr(result, name) for name in NAMES]


def brute_force(generated, reference, k):
    """The definition, pair by pair, on the direct float64 differences."""

    def squared(a, b):
        return np.array([((x - b) ** 2).sum(1) for x in a])

    own = squared(reference, reference), squared(generated, generated)
    for matrix in own:
        np.fill_diagonal(matrix, np.inf)
    ref_radius, gen_radius = (np.sort(matrix, axis=1)[:, k - 1] for matrix in own)
    cross = squared(reference, generated)
    in_ref, in_gen = cross < ref_radius[:, None], cross < gen_radius
    return in_ref.any(0), in_gen.any(1), in_ref.sum(0) / k, in_ref.any(1)


CASES = {
    "plain": (normal(300, 8), normal(200, 8, seed=1)),
    "float32": (normal(300, 64, dtype="f4"), normal(200, 64, 1.02, "f4", seed=1)),
    "high dimension": (normal(150, 500), normal(150, 500, seed=1)),
    "one dimension": (normal(300, 1), normal(200, 1, seed=1)),
    "offset": (normal(300, 8, dtype="f4") + 1000, normal(200, 8, dtype="f4", seed=1) + 1000),
    "copies inside a set": (with_copies(normal(100, 8), 2), with_copies(normal(60, 8, seed=1), 3)),
    "k copies": (with_copies(normal(50, 8), 4), with_copies(normal(50, 8, seed=1), 4)),
    "generated copies reference": (normal(200, 8), normal(200, 8)),
    "collapsed to a few images": (with_copies(normal(5, 8), 40), normal(200, 8)),
    "collapsed to one image": (np.full((60, 8), 0.3), normal(200, 8)),
    "both constant": (np.full((60, 8), 0.3), np.full((60, 8), 0.3)),
    "both constant, apart": (np.full((60, 8), 0.3), np.full((60, 8), 0.4)),
    "lattice": (np.round(normal(400, 3)), np.round(normal(300, 3, seed=1))),
    "small integers": (RNG.integers(0, 3, (200, 6)), RNG.integers(0, 3, (200, 6))),
    "some constant columns": (
        np.pad(normal(90, 4), ((0, 0), (0, 9))),
        np.pad(normal(90, 4, seed=1), ((0, 0), (0, 9))),
    ),
    "signed zeros": (
        np.round(normal(200, 2) * 0.8),
        np.abs(np.round(normal(200, 2, seed=1) * 0.8)),
    ),
    "k + 2 samples": (normal(5, 3), normal(5, 3, seed=1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_prdc_package(case, k):
    generated, reference = CASES[case]
    result = prdc(generated=generated, reference=reference, k=k)
    expected = peer.compute_prdc(reference, generated, k)
    for name in NAMES:
        assert getattr(result, name) == pytest.approx(float(expected[name]), abs=1e-12), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_equals_brute_force_sample_by_sample(case, k):
    generated, reference = CASES[case]
    result = manifold_membership(generated=generated, reference=reference, k=k, chunk_size=64)
    expected = brute_force(generated.astype("f8"), reference.astype("f8"), k)
    for name, values in zip(NAMES, expected, strict=True):
        np.testing.assert_array_equal(getattr(result, name), values, err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10**6])
def test_no_bit_depends_on_the_chunk_size(case, chunk_size):
    generated, reference = (features[:250] for features in CASES[case])
    if chunk_size < 7:
        generated, reference = generated[:30], reference[:20]
    expected = prdc(generated=generated, reference=reference, k=3, chunk_size=100)
    assert prdc(generated=generated, reference=reference, k=3, chunk_size=chunk_size) == expected


@pytest.mark.parametrize("case", CASES)
def test_order_of_rows_does_not_matter(case):
    generated, reference = CASES[case]
    result = manifold_membership(generated=generated, reference=reference, k=3, chunk_size=50)
    rng = np.random.default_rng(3)
    to_gen, to_ref = rng.permutation(len(generated)), rng.permutation(len(reference))
    shuffled = manifold_membership(
        generated=generated[to_gen], reference=reference[to_ref], k=3, chunk_size=50
    )
    np.testing.assert_array_equal(shuffled.precision, result.precision[to_gen])
    np.testing.assert_array_equal(shuffled.density, result.density[to_gen])
    np.testing.assert_array_equal(shuffled.recall, result.recall[to_ref])
    np.testing.assert_array_equal(shuffled.coverage, result.coverage[to_ref])


@pytest.mark.parametrize("scale", [1e-3, 1e-7, 1e-10, 1e-13])
def test_near_copies_are_told_apart(scale):
    """A collapsed generator with noise far below what a matrix product resolves."""
    generated = with_copies(normal(5, 40), 30) + normal(150, 40, scale, seed=2)
    reference = normal(5, 40).repeat(30, axis=0) + normal(150, 40, scale, seed=3)
    result = manifold_membership(generated=generated, reference=reference, k=3, chunk_size=64)
    expected = brute_force(generated, reference, 3)
    for name, values in zip(NAMES, expected, strict=True):
        np.testing.assert_array_equal(getattr(result, name), values, err_msg=name)
    assert 0.1 < result.precision.mean() < 1  # not the answer of a broken tie


def test_swapping_the_sides_fails():
    narrow, wide = normal(500, 4, 0.2), normal(400, 4, seed=1)
    result = prdc(generated=narrow, reference=wide, k=3)  # faithful, not diverse
    assert result.precision > 0.95
    assert result.recall < 0.2
    assert result.coverage < 0.5
    assert result.density > 1
    swapped = prdc(generated=wide, reference=narrow, k=3)
    assert (swapped.precision, swapped.recall) == (result.recall, result.precision)
    assert swapped.density != pytest.approx(result.density, rel=0.1)
    assert swapped.coverage != pytest.approx(result.coverage, rel=0.1)


def test_the_same_set_scores_one():
    result = prdc(generated=normal(200, 8), reference=normal(200, 8), k=3)
    assert scores(result) == pytest.approx([1, 1, 1, 1], abs=1e-12)


def test_disjoint_sets_score_zero():
    result = prdc(generated=normal(200, 8) + 100, reference=normal(200, 8), k=3)
    assert scores(result) == [0, 0, 0, 0]


def test_a_ball_is_open():
    line = np.arange(4.0)[:, None]  # every radius is 1 for k = 1
    result = prdc(generated=line + 1, reference=line, k=1)
    # 1, 2, 3 lie on a sample; each is inside its own ball and on the rim of the next.
    assert scores(result) == [0.75, 0.75, 0.75, 0.75]
    far = prdc(generated=line + 4, reference=line, k=1)  # 4 is on the rim of the ball of 3
    assert scores(far) == [0, 0, 0, 0]


def test_membership_averages_to_the_scores():
    generated, reference = CASES["plain"]
    result = prdc(generated=generated, reference=reference, k=3)
    membership = manifold_membership(generated=generated, reference=reference, k=3)
    lengths = {"precision": 300, "recall": 200, "density": 300, "coverage": 200}
    for name, length in lengths.items():
        values = getattr(membership, name)
        assert values.shape == (length,)
        assert values.dtype == np.float64
        assert values.mean() == getattr(result, name)


def test_torch_fidelity_agrees_where_nothing_ties():
    generated, reference = normal(300, 8, dtype="f4"), normal(200, 8, dtype="f4", seed=1)
    result = prdc(generated=generated, reference=reference, k=3)
    precision, recall = calculate_precision_recall_full(
        torch.from_numpy(generated), torch.from_numpy(reference), neighborhood=3
    )
    assert (result.precision, result.recall) == pytest.approx((precision, recall), abs=1e-6)


def test_takes_tensors():
    generated, reference = CASES["float32"]
    assert prdc(
        generated=torch.from_numpy(generated), reference=torch.from_numpy(reference), k=3
    ) == prdc(generated=generated, reference=reference, k=3)


@pytest.mark.parametrize(
    ("n", "m", "k", "ceiling"),
    [(50_000, 10_000, 3, 0.9954), (10_000, 10_000, 3, 0.8750), (10_000, 10_000, 5, 0.9688)],
)
def testcoverage_ceiling_of_published_setups(n, m, k, ceiling):
    from bench.metrics.prdc import coverage_ceiling

    assert coverage_ceiling(n, m, k) == pytest.approx(ceiling, abs=5e-5)


def testcoverage_ceiling_is_what_one_distribution_gets():
    results = [
        prdc(generated=normal(100, 3, seed=2 * i), reference=normal(150, 3, seed=2 * i + 1), k=2)
        for i in range(150)
    ]
    mean = np.mean([result.coverage for result in results])
    assert mean == pytest.approx(results[0].coverage_ceiling, abs=0.012)


def test_memory_does_not_grow_with_the_square_of_the_samples():
    features = normal(6000, 4, dtype="f4")
    tracemalloc.start()
    prdc(generated=features[:4000], reference=features[4000:], k=3, chunk_size=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # one 4000 x 4000 float64 matrix is 128e6


@pytest.mark.parametrize(
    ("generated", "reference", "k", "message"),
    [
        (normal(5, 2), normal(5, 3), 3, "generated features have dimension 2; expected 3"),
        (normal(3, 2), normal(9, 2), 3, "3 generated samples for k = 3; .* at least k \\+ 1 = 4"),
        (normal(9, 2), normal(3, 2), 3, "3 reference samples for k = 3"),
        (normal(1, 2), normal(9, 2), 1, "1 generated samples for k = 1"),
        (np.zeros((0, 2)), normal(9, 2), 1, r"generated features have shape \[0, 2\]"),
        (normal(9, 2), normal(9, 2), 0, "k is 0"),
        (normal(9, 2) * np.nan, normal(9, 2), 1, "generated features hold 18 NaN and 0 infinite"),
        (normal(9, 2), np.full((9, 2), np.inf), 1, "reference features hold 0 NaN and 18 infinite"),
        (np.zeros(9), normal(9, 1), 1, r"shape \[9\]; allowed: \[N, D\]"),
    ],
)
def test_refuses(generated, reference, k, message):
    with pytest.raises(DimoError, match=message):
        prdc(generated=generated, reference=reference, k=k)


def test_refuses_a_chunk_size_below_one():
    with pytest.raises(DimoError, match="chunk_size 0"):
        prdc(generated=normal(9, 2), reference=normal(9, 2), k=1, chunk_size=0)


def test_k_plus_one_samples_are_enough():
    result = prdc(generated=normal(4, 2), reference=normal(4, 2), k=3)
    assert scores(result) == pytest.approx(
        [1, 1, brute_force(normal(4, 2), normal(4, 2), 3)[2].mean(), 1]
    )
