"""bench.metrics.kernel: closed forms, the convention, chunks, agreement with torch-fidelity."""

import inspect
import tracemalloc

import numpy as np
import pytest
import torch
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_kid import kid_features_to_metric, mmd2

from bench.metrics import cmmd, kernel_distance
from dimo.errors import DimoError


def draw(seed, count, dim=24, scale=1.0):
    noise = np.random.default_rng(seed).standard_normal((count, dim))
    return np.maximum(noise * scale + 0.3, 0.0)


def peer(generated, reference, subsets, subset_size, seed, degree=3, coef0=1, gamma=None):
    found = kid_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(reference),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=degree,
        kid_kernel_poly_gamma=gamma,
        kid_kernel_poly_coef0=coef0,
        rng_seed=seed,
        verbose=False,
    )
    return [found[f"kernel_inception_distance_{name}"] for name in ("mean", "std")]


def gaussian(left, right, sigma=10.0):
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    return np.exp(-squares / (2 * sigma**2))


def unit(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


# KID


@pytest.mark.parametrize(
    "settings",
    [
        {"subsets": 20, "subset_size": 100, "seed": 2020},
        {"subsets": 7, "subset_size": 250, "seed": 0},
        {"subsets": 1, "subset_size": 300, "seed": 1},
        {"subsets": 5, "subset_size": 2, "seed": 2},
        {"subsets": 9, "subset_size": 50, "seed": 3, "degree": 2, "coef0": 0.5, "gamma": 0.1},
        {"subsets": 9, "subset_size": 50, "seed": 3, "degree": 1},
    ],
    ids=str,
)
def test_equals_torch_fidelity(settings):
    generated, reference = draw(0, 400, scale=1.3), draw(1, 300)
    found = kernel_distance(generated=generated, reference=reference, **settings)
    mean, std = peer(generated, reference, **settings)
    assert found.value == pytest.approx(mean, rel=1e-9)
    assert found.extra["std"] == pytest.approx(std, rel=1e-9, abs=1e-15)
    swapped = kernel_distance(generated=reference, reference=generated, **settings)
    if settings["subset_size"] < 300:  # other draws
        assert swapped.value != pytest.approx(mean, rel=1e-6)


def test_float32_features_equal_torch_fidelity():
    generated, reference = draw(0, 1200, 64, scale=1.3).astype("f4"), draw(1, 1000, 64).astype("f4")
    mean, std = peer(generated, reference, 10, 1000, 2020)
    for sides in ((generated, reference), map(torch.from_numpy, (generated, reference))):
        named = dict(zip(("generated", "reference"), sides, strict=True))
        found = kernel_distance(**named, subsets=10)
        assert found.value == pytest.approx(mean, rel=1e-6)
        assert found.extra["std"] == pytest.approx(std, rel=1e-4)  # of the peer's float32 sums


def test_defaults_are_torch_fidelitys():
    parameters = inspect.signature(kernel_distance).parameters
    ours = {name: parameters[name].default for name in ("subsets", "subset_size", "seed")}
    ours |= {name: parameters[name].default for name in ("degree", "coef0", "gamma")}
    theirs = [DEFAULTS[f"kid_{name}"] for name in ("subsets", "subset_size")]
    theirs += [DEFAULTS["rng_seed"]]
    theirs += [DEFAULTS[f"kid_kernel_poly_{name}"] for name in ("degree", "coef0", "gamma")]
    assert list(ours.values()) == theirs


def test_by_hand():
    sides = {"generated": np.array([[1.0], [2.0]]), "reference": np.array([[0.0], [3.0]])}
    # k = (x y + 1)^3: within 27 and 1, across 1, 64, 1 and 343
    found = kernel_distance(**sides, subsets=3, subset_size=2)
    assert (found.value, found.extra["std"]) == (27 + 1 - 2 * 409 / 4, 0.0)


def test_same_distribution_gives_zero_on_average():
    found = kernel_distance(
        generated=draw(0, 8000), reference=draw(1, 8000), subsets=100, subset_size=80
    )
    assert abs(found.value) < 4 * found.extra["std"] / 100**0.5
    assert found.extra["std"] > 0


def test_kid_witness_is_the_derivative_of_the_estimate():
    generated, reference = draw(0, 60, scale=1.3), draw(1, 50)
    settings = {"subsets": 6, "subset_size": 40, "seed": 5}
    found = kernel_distance(generated=generated, reference=reference, **settings)
    witness = found.contributions
    assert witness.sum() == pytest.approx(0, abs=1e-10)
    rng, held = np.random.RandomState(5), np.zeros((60, 6), dtype=bool)
    by_hand = np.zeros(60)
    for subset in range(6):
        rows, others = rng.choice(60, 40, replace=False), rng.choice(50, 40, replace=False)
        held[rows, subset] = True
        w = np.zeros(60)
        for i in rows:
            same = [(generated[i] @ generated[j] / 24 + 1) ** 3 for j in rows if j != i]
            w[i] = 2 * np.mean(same) - 2 * np.mean((reference[others] @ generated[i] / 24 + 1) ** 3)
        by_hand[rows] += w[rows] - w[rows].mean()
    np.testing.assert_allclose(witness, by_hand * 60 / 240, rtol=1e-10, atol=1e-12)
    single = {"subsets": 1, "subset_size": 40, "seed": 5}
    alone = kernel_distance(generated=generated, reference=reference, **single).contributions
    np.testing.assert_array_equal(alone != 0, held[:, 0])


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ((9, 20), {"subset_size": 10}, "9 generated samples for subset_size = 10; .*at least 10"),
        ((20, 9), {"subset_size": 10}, "9 reference .* lower subset_size in the protocol"),
        ((20, 20), {}, "20 generated samples for subset_size = 1000"),
        ((20, 20), {"subset_size": 1}, "subset_size 1; allowed"),
        ((20, 20), {"subsets": 0, "subset_size": 9}, "subsets is 0"),
        ((20, 20), {"degree": 0, "subset_size": 9}, "degree is 0"),
    ],
)
def test_kid_refuses(counts, settings, message):
    with pytest.raises(DimoError, match=message):
        kernel_distance(generated=draw(0, counts[0]), reference=draw(1, counts[1]), **settings)


# CMMD


def test_one_direction_each():
    a, b = np.array([[3.0, 0.0]]), np.array([[0.0, 0.5], [0.0, 2.0]])
    expected = 1000 * (2 - 2 * np.exp(-2 / 200))
    assert cmmd(generated=a, reference=b).value == pytest.approx(expected, rel=1e-12)
    assert cmmd(generated=a, reference=-a, sigma=1, scale=1).value == pytest.approx(
        2 - 2 * np.exp(-2)
    )


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_equals_the_biased_estimate_of_torch_fidelity(dtype):
    x, y = draw(0, 300, scale=1.3).astype(dtype), draw(1, 300).astype(dtype)
    a, b = unit(x.astype("f8")), unit(y.astype("f8"))
    kernels = gaussian(a, a), gaussian(a, b), gaussian(b, b)
    expected = 1000 * mmd2(*kernels, mmd_est="biased")
    assert cmmd(generated=x, reference=y).value == pytest.approx(expected, rel=1e-9)
    tensors = {"generated": torch.from_numpy(x), "reference": torch.from_numpy(y)}
    assert cmmd(**tensors).value == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_sets_of_other_sizes():
    x, y = draw(0, 130, scale=1.3), draw(1, 70)
    a, b = unit(x), unit(y)
    expected = gaussian(a, a).mean() + gaussian(b, b).mean() - 2 * gaussian(a, b).mean()
    assert cmmd(generated=x, reference=y, scale=1.0).value == pytest.approx(expected, rel=1e-9)


def test_cmmd_is_of_directions_and_free_of_order_and_chunks():
    x, y = draw(0, 301, scale=1.3), draw(1, 200)
    value = cmmd(generated=x, reference=y).value
    lengths = np.random.default_rng(2).uniform(1e-3, 1e3, (301, 1))
    assert cmmd(generated=(x * lengths)[::-1], reference=y).value == pytest.approx(value, rel=1e-12)
    for chunk_size in (1, 7, 150, 301):
        other = cmmd(generated=x, reference=y, chunk_size=chunk_size).value
        assert other == pytest.approx(value, rel=1e-12)
    assert cmmd(generated=x, reference=x).value == 0.0
    assert cmmd(generated=x, reference=x[::-1]).value == pytest.approx(0, abs=1e-12)


def test_cmmd_witness_is_the_derivative_of_cmmd():
    x, y = draw(0, 6, scale=1.3), draw(1, 9)
    witness = cmmd(generated=x, reference=y, chunk_size=4).contributions
    times = 500
    repeated = np.repeat(x, times, axis=0)
    value = cmmd(generated=x, reference=y).value
    for i in range(6):
        more = cmmd(generated=np.concatenate([repeated, x[i : i + 1]]), reference=y).value
        slope = (more - value) * (6 * times + 1)
        assert slope == pytest.approx(witness[i] - witness.mean(), rel=1e-2, abs=1e-3)


def test_cmmd_holds_one_tile():
    x, y = (draw(seed, 6000, 128).astype("f4") for seed in (0, 1))
    tracemalloc.start()
    cmmd(generated=x, reference=y, chunk_size=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5e6  # the matrices take 288 MB each, a float64 copy of x 6 MB


@pytest.mark.parametrize(
    ("sides", "settings", "message"),
    [
        ((np.eye(3), np.zeros((2, 3))), {}, "reference features hold 2 zero rows"),
        ((np.zeros((2, 3)), np.eye(3)), {}, "generated features hold 2 zero rows, .* row 0"),
        ((np.eye(3), np.eye(3)), {"sigma": 0.0}, "sigma is 0.0"),
        ((np.eye(3), np.eye(3)), {"chunk_size": 0}, "chunk_size 0"),
        ((np.eye(3), np.eye(4)), {}, "dimension 3; expected 4"),
        ((np.eye(3) * np.nan, np.eye(3)), {}, "generated features hold 9 NaN"),
    ],
)
def test_cmmd_refuses(sides, settings, message):
    with pytest.raises(DimoError, match=message):
        cmmd(generated=sides[0], reference=sides[1], **settings)
