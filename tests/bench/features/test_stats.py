"""bench.features.stats: float64 statistics by one pass, their checks and their files."""

import numpy as np
import pytest
import torch

from bench.features.stats import FeatureStats, StreamingStats, compute_stats, load_stats, save_stats
from dimo.errors import DimoError


def draw(seed, count=1000, dim=12):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) + 3).astype("f4")


def stream(features, sizes):
    stats = StreamingStats("x", features.shape[1])
    for part in np.split(features, np.cumsum(sizes)):
        if len(part):
            stats.update(part)
    return stats


def assert_same(actual, expected, rtol=1e-12):
    assert actual.count == expected.count
    np.testing.assert_allclose(actual.mu, expected.mu, rtol=rtol)
    np.testing.assert_allclose(actual.sigma, expected.sigma, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dim", [1, 2, 12, 300])
def test_equals_numpy(dim):
    features = draw(0, count=100, dim=dim)
    stats = compute_stats(features, extractor="x")
    assert (stats.extractor, stats.count) == ("x", 100)
    assert stats.mu.dtype == stats.sigma.dtype == np.float64
    np.testing.assert_allclose(stats.mu, features.astype("f8").mean(0), rtol=1e-12)
    expected = np.cov(features.astype("f8"), rowvar=False).reshape(dim, dim)
    np.testing.assert_allclose(stats.sigma, expected, rtol=1e-11, atol=1e-11)


def test_closed_form():
    stats = compute_stats(np.array([[0, 0], [2, 4]]), extractor="x")  # integers are fine
    np.testing.assert_array_equal(stats.mu, [1, 2])
    np.testing.assert_array_equal(stats.sigma, [[2, 4], [4, 8]])


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [7] * 100, [999], [500, 1]])
def test_any_split_into_batches(sizes):
    features = draw(1)
    assert_same(stream(features, sizes).finalize(), compute_stats(features, extractor="x"))


def test_more_rows_than_one_block():
    features = draw(2, count=9001, dim=3)
    expected = np.cov(features.astype("f8"), rowvar=False)
    stats = compute_stats(features, extractor="x")
    np.testing.assert_allclose(stats.sigma, expected, rtol=1e-12, atol=1e-12)


def test_merge_is_update_of_both_and_leaves_the_other_alone():
    features = draw(3)
    left, right = stream(features[:300], []), stream(features[300:], [])
    before = right.finalize()
    left.merge(right)
    left.merge(StreamingStats("x", 12))  # a rank that saw nothing
    assert_same(left.finalize(), compute_stats(features, extractor="x"))
    assert_same(right.finalize(), before, rtol=0)
    empty = StreamingStats("x", 12)
    empty.merge(right)
    assert_same(empty.finalize(), before, rtol=0)


def test_finalize_is_a_snapshot():
    stats = stream(draw(4), [])
    first = stats.finalize()
    mu, sigma = first.mu.copy(), first.sigma.copy()
    stats.update(draw(5))
    np.testing.assert_array_equal(first.mu, mu)
    np.testing.assert_array_equal(first.sigma, sigma)


def test_a_large_offset_costs_no_digits():
    features = np.random.default_rng(0).standard_normal((500, 4))
    shifted = compute_stats(features + 2.0**20, extractor="x")
    plain = compute_stats((features + 2.0**20) - 2.0**20, extractor="x")
    np.testing.assert_allclose(shifted.sigma, plain.sigma, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_tensors(dtype):
    tensor = torch.from_numpy(draw(6)).to(dtype).requires_grad_()
    assert_same(
        compute_stats(tensor, extractor="x"),
        compute_stats(tensor.detach().double().numpy(), extractor="x"),
    )


def test_non_finite_values_are_counted_and_nothing_is_added():
    features = draw(7, count=5000)
    features[4500, 3] = np.nan
    features[10, 0] = np.inf
    features[10, 1] = np.nan
    stats = StreamingStats("x", 12)
    message = "2 NaN and 1 infinite values in 2 of 5000 rows, the first in row 10;"
    with pytest.raises(DimoError, match=message):
        stats.update(features)
    assert stats.count == 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((0, 12)), r"shape \[0, 12\]; allowed: at least 1"),
        (np.zeros((4, 3)), "dimension 3; expected 12"),
        (np.zeros(12), r"shape \[12\]; allowed: \[N, D\]"),
        (np.zeros((2, 12), dtype=complex), "dtype complex128"),
        (np.full((2, 12), "a"), "dtype <U1"),
    ],
)
def test_update_refuses(features, message):
    with pytest.raises(DimoError, match=message):
        StreamingStats("x", 12).update(features)


def test_too_few_samples():
    one = StreamingStats("x", 3)
    with pytest.raises(DimoError, match=r"count 0; .* at least 2"):
        one.finalize()
    one.update(np.zeros((1, 3)))
    with pytest.raises(DimoError, match=r"count 1; .* at least 2"):
        one.finalize()
    with pytest.raises(DimoError, match="at least 2 samples"):
        compute_stats(np.zeros((1, 3)), extractor="x")
    with pytest.raises(DimoError, match="dimension 1 or more"):
        compute_stats(np.zeros((5, 0)), extractor="x")


def test_merge_refuses_another_extractor_or_dimension():
    for other in (StreamingStats("y", 3), StreamingStats("x", 4)):
        with pytest.raises(DimoError, match="cannot merge"):
            StreamingStats("x", 3).merge(other)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(2), np.eye(3), r"mu \[2\] and sigma \[3, 3\]"),
        (np.zeros((2, 2)), np.eye(2), r"mu \[2, 2\]"),
        (np.array([0, np.nan]), np.eye(2), "1 non-finite values in mu and 0 in sigma"),
        (np.zeros(2), np.full((2, 2), np.inf), "0 non-finite values in mu and 4 in sigma"),
        (np.zeros(2), np.array([[1.0, 0.5], [0, 1]]), "no covariance"),
        (np.zeros(2), -np.eye(2), "no covariance"),
    ],
)
def test_feature_stats_refuses(mu, sigma, message):
    with pytest.raises(DimoError, match=message):
        FeatureStats("x", 5, mu, sigma)


def test_feature_stats_takes_float32():
    sigma = np.cov(draw(8), rowvar=False).astype("f4")
    sigma[0, 1] *= 1 + 1e-6
    stats = FeatureStats("x", 1000, np.zeros(12, dtype="f4"), sigma)
    assert stats.mu.dtype == stats.sigma.dtype == np.float64
    np.testing.assert_array_equal(stats.sigma, stats.sigma.T)


def test_file_round_trip(tmp_path):
    stats = compute_stats(draw(9), extractor="x")
    save_stats(tmp_path / "a.npz", {"features": stats})
    save_stats(tmp_path / "b.npz", {"features": stats})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = load_stats(tmp_path / "a.npz", extractor="x")["features"]
    assert (loaded.extractor, loaded.count) == ("x", 1000)
    np.testing.assert_array_equal(loaded.mu, stats.mu)
    np.testing.assert_array_equal(loaded.sigma, stats.sigma)
    with np.load(tmp_path / "a.npz") as file:  # the keys other tools read
        assert set(file.files) == {"mu", "sigma", "n", "extractor"}


def test_load_takes_a_file_that_names_no_extractor(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2, "f4"), sigma=np.eye(2), n=7)
    assert load_stats(tmp_path / "a.npz", extractor="x")["features"].count == 7


def test_load_takes_the_keys_of_adm(tmp_path):
    """No count, spatial statistics beside the others, and images that are not touched."""
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 4, 4, 3), "u1"),
        mu=np.zeros(2, "f4"),
        sigma=np.eye(2),
        mu_s=np.ones(3),
        sigma_s=np.eye(3, dtype="f4"),
    )
    found = load_stats(
        tmp_path / "adm.npz", extractor="x", count=50, outputs=("features", "spatial")
    )
    assert [found[k].count for k in ("features", "spatial")] == [50, 50]
    np.testing.assert_array_equal(found["spatial"].mu, np.ones(3))
    assert found["spatial"].sigma.dtype == np.float64


def test_file_with_features_and_provenance(tmp_path):
    stats = compute_stats(draw(9), extractor="x")
    path = tmp_path / "a.npz"
    save_stats(path, {"features": stats, "spatial": stats}, features=draw(9), provenance="{}")
    with np.load(path) as file:
        assert {"mu_s", "sigma_s", "features", "provenance"} < set(file.files)
    assert load_stats(path, extractor="x", outputs=("spatial",))["spatial"].count == 1000


def test_load_refuses(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DimoError, match=r"cannot read statistics from .*a\.npz"):
        load_stats(path, extractor="x")
    path.write_bytes(b"not an npz")
    with pytest.raises(DimoError, match="cannot read"):
        load_stats(path, extractor="x")
    path.write_bytes(b"")
    with pytest.raises(DimoError, match="cannot read"):
        load_stats(path, extractor="x")
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(DimoError, match="cannot read"):
        load_stats(tmp_path / "b.npy", extractor="x")
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(DimoError, match=r"does not say of how many images"):
        load_stats(path, extractor="x")
    with pytest.raises(DimoError, match=r"lacks mu_s, sigma_s \(it has: mu, sigma\)"):
        load_stats(path, extractor="x", outputs=("spatial",))
    np.savez(path, mu=np.zeros(2), sigma=np.eye(3), n=5)
    with pytest.raises(DimoError, match=r"a\.npz: .*mu \[2\] and sigma \[3, 3\]"):
        load_stats(path, extractor="x")
    np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(1), n=5)  # a pickle
    with pytest.raises(DimoError, match="cannot read"):
        load_stats(path, extractor="x")
    save_stats(path, {"features": compute_stats(draw(0), extractor="inception")})
    with pytest.raises(DimoError, match="extractor 'inception'; the protocol needs 'x'"):
        load_stats(path, extractor="x")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DimoError, match="cannot read"):
        load_stats(path, extractor="inception")
