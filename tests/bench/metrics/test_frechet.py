"""bench.metrics.frechet: closed forms, few samples, agreement with two other packages."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from bench.features.stats import FeatureStats, compute_stats
from bench.metrics import frechet_distance
from bench.metrics.frechet import covariance_root
from dimo.errors import DimoError


def gaussian(mu, sigma, count=10**6):
    return FeatureStats("x", count, np.asarray(mu, dtype=float), np.asarray(sigma, dtype=float))


def draw(seed, count, dim, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((dim, dim)) / dim**0.5
    return np.maximum(rng.standard_normal((count, dim)) @ mix + shift, 0)  # like pooled ReLU


def distance(generated, reference):
    return frechet_distance(
        generated=compute_stats(generated, extractor="x"),
        reference=compute_stats(reference, extractor="x"),
    )


def exact(generated, reference):
    """The distance without a covariance: the last trace is a nuclear norm of the centred rows."""
    a, b = generated - generated.mean(0), reference - reference.mean(0)
    n, m = len(a) - 1, len(b) - 1
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum() / (n * m) ** 0.5
    shift = generated.mean(0) - reference.mean(0)
    return shift @ shift + (a**2).sum() / n + (b**2).sum() / m - 2 * nuclear


def test_equal_covariances_leave_the_shift():
    mu = np.array([3.0, -4.0, 0.0])
    value = frechet_distance(
        generated=gaussian(mu, np.eye(3)), reference=gaussian(mu * 0, np.eye(3))
    )
    assert value == pytest.approx(25, abs=1e-12)


def test_one_dimension():
    value = frechet_distance(generated=gaussian([1], [[4]]), reference=gaussian([0], [[25]]))
    assert value == pytest.approx(1 + (2 - 5) ** 2, abs=1e-12)


def test_commuting_covariances():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    a, b = rng.uniform(0.01, 9, 20), rng.uniform(0.01, 9, 20)
    value = frechet_distance(
        generated=gaussian(np.zeros(20), basis * a @ basis.T),
        reference=gaussian(np.zeros(20), basis * b @ basis.T),
    )
    assert value == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-11)


def test_two_by_two():
    # Tr (A B)^(1/2) = sqrt(Tr AB + 2 sqrt(det AB)) for 2 x 2 matrices that do not commute.
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    value = frechet_distance(generated=gaussian([0, 0], a), reference=gaussian([0, 0], b))
    assert value == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, abs=1e-12)


def test_no_variance_leaves_the_shift():
    point = compute_stats(np.ones((5, 4)), extractor="x")
    other = compute_stats(np.zeros((9, 4)), extractor="x")
    assert frechet_distance(generated=point, reference=other) == 4.0
    wide = gaussian(np.zeros(4), np.eye(4))
    assert frechet_distance(generated=point, reference=wide) == pytest.approx(8, abs=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(500, 64), (40, 64), (2, 64), (64, 64), (65, 64)])
def test_same_set_is_zero(count, dim):
    features = draw(0, count, dim)
    assert distance(features, features) == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize(
    ("n", "m"), [(30, 40), (40, 30), (300, 40), (2, 3), (100, 100), (101, 101), (3000, 300)]
)
def test_few_samples_stay_exact(n, m):
    generated, reference = draw(1, n, 100, shift=0.1), draw(2, m, 100)
    assert distance(generated, reference) == pytest.approx(exact(generated, reference), rel=1e-10)


def test_constant_and_repeated_features():
    generated, reference = draw(1, 300, 30), draw(2, 300, 30)
    generated[:, 10:] = generated[:, :20]  # rank 10
    reference[:, 3] = 7.0  # never varies
    assert distance(generated, reference) == pytest.approx(exact(generated, reference), rel=1e-10)


def test_symmetric_and_order_free():
    generated, reference = draw(1, 400, 32, shift=0.2), draw(2, 50, 32)
    value = distance(generated, reference)
    assert distance(reference, generated) == pytest.approx(value, rel=1e-12)
    assert distance(generated[::-1], reference) == pytest.approx(value, rel=1e-12)


def test_each_term_counts():
    base = draw(1, 400, 8)
    value = distance(base, base * 1.5)
    assert value > 0.01
    assert distance(base + 1, base * 1.5) != pytest.approx(value, rel=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # scipy.linalg.sqrtm(disp=)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_equals_clean_fid_and_torch_fidelity(dtype):
    from cleanfid.fid import frechet_distance as clean_fid

    generated = draw(1, 2000, 128, shift=0.05).astype(dtype)
    reference = draw(2, 1500, 128).astype(dtype)
    value = distance(generated, reference)
    # They hold float32 features' means in float32.
    sides = [(x.mean(0), np.cov(x, rowvar=False)) for x in (generated, reference)]
    assert value == pytest.approx(clean_fid(*sides[0], *sides[1]), rel=1e-5)
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (generated, reference)]
    peer = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert value == pytest.approx(peer, rel=1e-5)
    if dtype == "f8":
        assert value == pytest.approx(peer, abs=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # scipy.linalg.sqrtm(disp=)
def test_full_rank_equals_clean_fid_to_eight_digits():
    from cleanfid.fid import frechet_distance as clean_fid

    for seed in range(3):
        generated = compute_stats(draw(seed, 3000, 200, shift=0.05), extractor="x")
        reference = compute_stats(draw(seed + 10, 2500, 200), extractor="x")
        peer = clean_fid(generated.mu, generated.sigma, reference.mu, reference.sigma)
        value = frechet_distance(generated=generated, reference=reference)
        assert value == pytest.approx(peer, rel=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # scipy.linalg.sqrtm(disp=)
@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_few_samples_are_exact_where_a_matrix_square_root_is_not():
    from cleanfid.fid import frechet_distance as clean_fid

    generated, reference = draw(1, 100, 256, shift=0.1), draw(2, 100, 256)
    sides = [compute_stats(features, extractor="x") for features in (generated, reference)]
    true = exact(generated, reference)
    peer = clean_fid(sides[0].mu, sides[0].sigma, sides[1].mu, sides[1].sigma)
    assert distance(generated, reference) == pytest.approx(true, rel=1e-12)
    assert 1e-9 < abs(peer / true - 1) < 1e-3  # so the two routes can be told apart


def with_spectrum(values, seed):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((values.size, values.size)))[0]
    sigma = basis * values @ basis.T
    return gaussian(np.zeros(values.size), (sigma + sigma.T) / 2)


@pytest.mark.parametrize(
    "spreads", [(1e2, 1e2), (1e5, 1e5), (1e8, 1e8), (2, 1e11), (1e11, 2)], ids=str
)
def test_small_eigenvalues_keep_their_digits(spreads):
    """Against singular values, which no squaring has touched."""
    values = [np.geomspace(10, 10 / spread, 150) for spread in spreads]
    one, other = with_spectrum(values[0], 1), with_spectrum(values[1], 2)
    roots = [covariance_root(side) for side in (one, other)]
    nuclear = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    expected = values[0].sum() + values[1].sum() - 2 * nuclear
    for pair in ((one, other), (other, one)):
        value = frechet_distance(generated=pair[0], reference=pair[1])
        assert value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("shared", [0, 1, 10])
def test_directions_that_only_one_side_varies_in(shared):
    """The product of their roots has exact zeros, and no noise comes from them."""
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    ours, theirs = np.zeros(40), np.zeros(40)
    ours[:20], theirs[20 - shared : 40 - shared] = rng.uniform(1, 2, 20), rng.uniform(1, 2, 20)
    sigmas = [basis * values @ basis.T for values in (ours, theirs)]
    value = frechet_distance(
        generated=gaussian(np.zeros(40), (sigmas[0] + sigmas[0].T) / 2),
        reference=gaussian(np.zeros(40), (sigmas[1] + sigmas[1].T) / 2),
    )
    assert value == pytest.approx(((ours**0.5 - theirs**0.5) ** 2).sum(), abs=1e-12)


@pytest.mark.parametrize("count", [30, 500])
def test_statistics_that_were_rounded_to_float32(count):
    """Files of other tools: rounding gives a covariance of few samples eigenvalues below 0."""
    generated, reference = draw(1, count, 60, shift=0.3), draw(2, 400, 60)
    sides = [compute_stats(features, extractor="x") for features in (generated, reference)]
    rounded = [
        FeatureStats("x", side.count, side.mu.astype("f4"), side.sigma.astype("f4"))
        for side in sides
    ]
    root = covariance_root(rounded[0])
    np.testing.assert_allclose(root @ root.T, sides[0].sigma, atol=1e-7)
    value = frechet_distance(generated=rounded[0], reference=rounded[1])
    assert value == pytest.approx(exact(generated, reference), rel=1e-4)


def test_root_drops_the_rank_that_samples_cannot_have():
    stats = compute_stats(draw(0, 10, 40), extractor="x")
    root = covariance_root(stats)
    assert root.shape == (40, 9)
    np.testing.assert_allclose(root @ root.T, stats.sigma, atol=1e-13)


def test_refuses_two_extractors_or_dimensions():
    with pytest.raises(DimoError, match="extractor 'x', reference ones of 'y'"):
        frechet_distance(
            generated=gaussian([0], [[1]]),
            reference=FeatureStats("y", 9, np.zeros(1), np.eye(1)),
        )
    with pytest.raises(DimoError, match="dimension 1, reference ones 2"):
        frechet_distance(generated=gaussian([0], [[1]]), reference=gaussian([0, 0], np.eye(2)))


def test_refuses_a_matrix_that_is_no_covariance():
    with pytest.raises(DimoError, match=r"eigenvalue -1 \(largest 3\)"):
        frechet_distance(
            generated=gaussian([0, 0], [[1, 2], [2, 1]]), reference=gaussian([0, 0], np.eye(2))
        )
    with pytest.raises(DimoError, match=r"eigenvalue -1 \(largest 1\)"):  # and no variance to see
        frechet_distance(
            generated=gaussian([0, 0], [[0, 1], [1, 0]]), reference=gaussian([0, 0], np.eye(2))
        )
