"""`bench.metrics.mind`: a derivation in float64, closed forms, the convention, chunks."""

import tracemalloc

import numpy as np
import pytest
import torch

from bench.features.stats import compute_stats
from bench.metrics import frechet_distance, mind
from dimo.errors import DimoError


def draw(seed, count, dim=24, scale=1.0):
    return np.random.default_rng(seed).standard_normal((count, dim)) * scale + 0.3


def derived(generated, reference, projections=1000, seed=2020):
    """The definition, direction by direction, with the draws that the docstring names."""
    rng = torch.Generator().manual_seed(seed)
    sides = [np.asarray(side, dtype=np.float64) for side in (generated, reference)]
    count = min(map(len, sides))
    for i, side in enumerate(sides):
        if len(side) > count:
            sides[i] = side[torch.randperm(len(side), generator=rng)[:count].numpy()]
    dim = generated.shape[1]
    costs = []
    for direction in torch.randn(projections, dim, generator=rng).double().numpy():
        unit = direction / np.linalg.norm(direction)
        x, y = (np.sort(side @ unit) for side in sides)
        costs.append(np.mean((x - y) ** 2))
    return 3 * dim * np.mean(costs)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("sizes", [(300, 300), (400, 300), (300, 400)])
def test_equals_its_definition_in_float64(sizes, dtype):
    x, y = draw(0, sizes[0], scale=1.3).astype(dtype), draw(1, sizes[1]).astype(dtype)
    found = mind(generated=x, reference=y)
    assert found.value == pytest.approx(derived(x, y), rel=1e-6)
    tensors = {"generated": torch.from_numpy(x), "reference": torch.from_numpy(y)}
    assert mind(**tensors).value == found.value
    settings = {"projections": 30, "seed": 1}
    assert mind(generated=x, reference=y, **settings).value == pytest.approx(
        derived(x, y, **settings), rel=1e-6
    )


def test_by_hand_in_one_dimension():
    x, y = np.array([[4.0], [1.0], [2.0]]), np.array([[0.0], [1.0], [5.0]])
    found = mind(generated=x, reference=y, projections=4)
    assert found.value == pytest.approx(3 * (1 + 1 + 1) / 3, rel=1e-6)  # 1-0, 2-1, 4-5
    # phi' is 2 (x - T(x)): from 1 to 2 it is 2 and 2, from 2 to 4 it is 2 and -2
    phi = np.array([2.0, 0.0, 2.0])  # at 4, 1 and 2
    np.testing.assert_allclose(found.contributions, 3 * (phi - phi.mean()), rtol=1e-6)


def test_a_shift_costs_three_times_its_square():
    x, t = draw(0, 200, 64), draw(1, 1, 64)
    found = mind(generated=x + t, reference=x, projections=4000).value
    assert found == pytest.approx(3 * np.square(t).sum(), rel=0.1)


def test_of_scale_order_and_identity():
    x, y = draw(0, 300, scale=1.3), draw(1, 300)
    found = mind(generated=x, reference=y)
    scaled = mind(generated=100 * x[::-1], reference=100 * y)
    assert scaled.value == pytest.approx(1e4 * found.value, rel=1e-9)
    np.testing.assert_allclose(scaled.contributions[::-1], 1e4 * found.contributions, rtol=1e-6)
    same = mind(generated=x, reference=x[::-1])
    assert same.value == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(same.contributions, 0, atol=1e-12)


def test_equal_moments_do_not_fool_it():
    x = draw(0, 2000, 8)
    signs = np.sign(np.random.default_rng(1).standard_normal(x.shape))
    mean, root = x.mean(0), np.linalg.cholesky(np.cov(x.T))
    signs = np.linalg.solve(np.linalg.cholesky(np.cov(signs.T)), (signs - signs.mean(0)).T).T
    y = signs @ root.T + mean
    stats = [compute_stats(side, extractor="x") for side in (x, y)]
    assert frechet_distance(generated=stats[0], reference=stats[1]) < 1e-9
    fresh = mind(generated=draw(2, 2000, 8), reference=x).value
    assert mind(generated=y, reference=x).value > 3 * fresh


def test_the_smaller_side_is_whole():
    x, y = draw(0, 50), draw(1, 80)
    np.testing.assert_array_equal(mind(generated=x, reference=y, projections=2).rows, np.arange(50))
    swapped = mind(generated=y, reference=x, projections=2)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2020))
    np.testing.assert_array_equal(swapped.rows, order[:50].numpy())
    assert len(swapped.contributions) == 50


def test_swapped_sides_have_one_value_and_other_contributions():
    x, y = draw(0, 100, scale=1.5), draw(1, 100)
    there, back = mind(generated=x, reference=y), mind(generated=y, reference=x)
    assert there.value == pytest.approx(back.value, rel=1e-12)
    assert np.corrcoef(there.contributions, np.linalg.norm(x - 0.3, axis=1))[0, 1] > 0.8
    assert np.corrcoef(back.contributions, np.linalg.norm(y - 0.3, axis=1))[0, 1] < -0.8


@pytest.mark.parametrize("sizes", [(60, 60), (90, 60)])
def test_contributions_are_the_derivative(sizes):
    x, y = draw(0, sizes[0], 5, scale=1.3), draw(1, sizes[1], 5)
    found = mind(generated=x, reference=y, projections=40)
    assert found.contributions.mean() == pytest.approx(0, abs=1e-12)
    x, times = x[found.rows], 40
    repeated, reference = np.repeat(x, times, axis=0), np.repeat(y, times, axis=0)

    def value(weights):  # of x, at the same directions: as many draws come before them
        rng = torch.Generator().manual_seed(2020)
        if sizes[0] > sizes[1]:
            torch.randperm(sizes[0], generator=rng)
        total = 0.0
        for u in torch.randn(40, 5, generator=rng).double().numpy():
            u = u / np.linalg.norm(u)
            a = np.sort(np.repeat(x, weights, axis=0) @ u)
            total += np.mean((a - np.sort(reference @ u)) ** 2)
        return 3 * 5 * total / 40

    even = np.full(60, times)
    assert value(even) == pytest.approx(found.value, rel=1e-6)
    assert len(repeated) == len(reference)
    for i, j in ((0, 1), (5, 30), (17, 2)):
        more, less = even.copy(), even.copy()
        more[[i, j]] += [1, -1]
        less[[i, j]] += [-1, 1]
        slope = (value(more) - value(less)) / 2 * len(reference)
        expected = found.contributions[i] - found.contributions[j]
        assert slope == pytest.approx(expected, rel=0.1, abs=0.1)


def test_chunks_do_not_matter_and_bound_memory():
    x, y = (draw(seed, 20_000, 32).astype("f4") for seed in (0, 1))
    whole = mind(generated=x[:500], reference=y[:700], projections=64)
    for chunk_size in (1, 501, 20_000):
        other = mind(generated=x[:500], reference=y[:700], projections=64, chunk_size=chunk_size)
        assert other.value == pytest.approx(whole.value, rel=1e-12)
        np.testing.assert_allclose(other.contributions, whole.contributions, atol=1e-9)
    tracemalloc.start()
    mind(generated=x, reference=y, projections=64, chunk_size=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # all projections of one side take 10 MB


@pytest.mark.parametrize(
    ("sides", "settings", "message"),
    [
        ((np.eye(3), np.eye(3)), {"projections": 0}, "projections is 0, .*; allowed: 1 or more"),
        ((np.eye(3), np.eye(3)), {"seed": -1}, "seed -1"),
        ((np.eye(3), np.eye(3)), {"chunk_size": 0}, "chunk_size 0"),
        ((np.eye(3), np.eye(4)), {}, "generated features have dimension 3; expected 4"),
        ((np.eye(3), np.full((3, 3), np.inf)), {}, "reference features hold .* 9 infinite"),
        ((np.zeros((0, 3)), np.eye(3)), {}, r"generated features have shape \[0, 3\]"),
        ((np.eye(3), np.zeros(3)), {}, r"allowed: \[N, D\]"),
    ],
)
def test_refuses(sides, settings, message):
    with pytest.raises(DimoError, match=message):
        mind(generated=sides[0], reference=sides[1], **settings)
