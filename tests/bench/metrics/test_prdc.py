"""bench.metrics.prdc: the convention, ties, chunks, memory, agreement with two other packages."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import prdc as peer
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from bench.metrics import authpct, coverage_ceiling, manifold_membership, prdc
from bench.metrics import neighbours as distances
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


def squared(a, b):
    """Canonical squared distances, pair by pair."""
    return np.array([((x - b) ** 2).sum(1) for x in a.astype("f8")])


def brute_force(generated, reference, k, closed=False):
    """The definition, pair by pair, on the direct float64 differences."""
    own = squared(reference, reference), squared(generated, generated)
    for matrix in own:
        np.fill_diagonal(matrix, np.inf)
    ref_radius, gen_radius = (np.sort(matrix, axis=1)[:, k - 1] for matrix in own)
    cross = squared(reference, generated)
    inside = np.less_equal if closed else np.less
    in_ref, in_gen = inside(cross, ref_radius[:, None]), inside(cross, gen_radius)
    return in_ref.any(0), in_gen.any(1), in_ref.sum(0) / k, in_ref.any(1)


def assert_equals_brute_force(generated, reference, k, **settings):
    result = manifold_membership(generated=generated, reference=reference, k=k, **settings)
    expected = brute_force(generated.astype("f8"), reference.astype("f8"), k)
    for name, values in zip(NAMES, expected, strict=True):
        np.testing.assert_array_equal(getattr(result, name), values, err_msg=name)
    return result


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The sets are so small that threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["float32", "float64", "thinned"])
def path(request, monkeypatch):
    """Both types of products and the thinning of candidates, on sets too small to need them."""
    module = sys.modules[prdc.__module__]  # The package's attribute of this name is the function.
    if request.param == "float64":
        monkeypatch.setattr(module, "_CROWDED", 0)  # Any doubt calls for the wider type.
    if request.param == "thinned":
        monkeypatch.setattr(module, "_PENDING", 0)  # Candidates are settled after every tile.


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


@pytest.mark.parametrize(
    ("case", "k"), [(case, (1, 3)[index % 2]) for index, case in enumerate(CASES)]
)
def test_equals_the_prdc_package(case, k):
    generated, reference = CASES[case]
    result = prdc(generated=generated, reference=reference, k=k)
    expected = peer.compute_prdc(reference, generated, k)
    for name in NAMES:
        assert getattr(result, name) == pytest.approx(float(expected[name]), abs=1e-12), name


@pytest.mark.parametrize(
    ("case", "k", "chunk_size"),
    [
        (case, (1, 3, 4)[index % 3], (64, 130, 7, 10**6)[index % 4])
        for index, case in enumerate(CASES)
    ],
)
def test_equals_brute_force_sample_by_sample(case, k, chunk_size):
    count = 60 if chunk_size == 7 else 400
    generated, reference = (features[:count] for features in CASES[case])
    assert_equals_brute_force(generated, reference, k, chunk_size=chunk_size)


@pytest.mark.parametrize("case", ["offset", "k copies", "lattice", "collapsed to a few images"])
def test_equals_brute_force_on_each_path(case, path):
    assert_equals_brute_force(*CASES[case], 3, chunk_size=130)


def test_no_bit_depends_on_the_chunk_size():
    generated, reference = (features[:12] for features in CASES["float32"])
    expected = prdc(generated=generated, reference=reference, k=3, chunk_size=100)
    assert prdc(generated=generated, reference=reference, k=3, chunk_size=1) == expected


@pytest.mark.parametrize("case", ["float32", "copies inside a set", "small integers"])
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


@pytest.mark.parametrize("scale", [1e-3, 1e-10])
def test_near_copies_are_told_apart(scale, path):
    """A collapsed generator with noise far below what a matrix product resolves."""
    generated = with_copies(normal(5, 40), 30) + normal(150, 40, scale, seed=2)
    reference = normal(5, 40).repeat(30, axis=0) + normal(150, 40, scale, seed=3)
    result = assert_equals_brute_force(generated, reference, 3, chunk_size=64)
    assert 0.1 < result.precision.mean() < 1  # not the answer of a broken tie


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e20, "f4"), (3e37, "f4"), (1e-20, "f4"), (1e-39, "f4"), (1e200, "f8"), (1e-200, "f8")],
)
def test_size_of_the_features_does_not_matter(scale, dtype):
    """Their squares are beyond float32 or float64, and the smallest features are subnormal."""
    generated, reference = normal(120, 20), normal(90, 20, seed=1)
    power = 2.0 ** np.round(np.log2(scale))  # exact, so the answer is the same
    expected = prdc(
        generated=(generated.astype(dtype) * power).astype(dtype) / power,
        reference=(reference.astype(dtype) * power).astype(dtype) / power,
        k=3,
    )
    scaled = [(side.astype(dtype) * power).astype(dtype) for side in (generated, reference)]
    assert prdc(generated=scaled[0], reference=scaled[1], k=3) == expected
    assert 0.1 < expected.precision < 0.99


@pytest.mark.parametrize("kind", distances.PRECISIONS)
@pytest.mark.parametrize(
    ("dim", "scale", "shift"), [(3, 1, 0), (700, 1, 0), (2048, 1e-15, 0), (40, 1, 1e4)]
)
def test_tile_bounds_hold_and_are_tight(kind, dim, scale, shift):
    rng = np.random.default_rng(0)
    left = (rng.standard_normal((60, dim)) * rng.lognormal(0, 2, (60, 1)) + shift) * scale
    right = (rng.standard_normal((50, dim)) * rng.lognormal(0, 2, (50, 1)) + shift) * scale
    right[:20] = left[:20] * (1 + 1e-6 * rng.standard_normal((20, dim)))  # close pairs
    sides = [distances.Distinct(side.astype("f4")) for side in (left, right)]
    points = distances.points_of(*sides, device=torch.device("cpu"))
    tile = distances.Tile(points[0], slice(0, 60), points[1], slice(0, 50), kind)
    everything = np.full(60, np.inf), np.full(50, np.inf)
    pairs = tile.pairs(tile.within(*everything))
    true = squared(*(side.features.astype("f8") for side in sides)).ravel()
    assert pairs.row.size == true.size
    assert (pairs.lower <= true).all()
    assert (true <= pairs.upper).all()
    center = (sides[0].features.mean(0, dtype="f8") + sides[1].features.mean(0, dtype="f8")) / 2
    norms = [((side.features - center) ** 2).sum(1) for side in sides]
    size = (norms[0][:, None] + norms[1]).ravel()
    unit = 2.0**-23 if kind == torch.float32 else 2.0**-52
    assert ((pairs.upper - pairs.lower) <= 12 * (dim + 11) * unit * size).all()


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


@pytest.mark.parametrize(
    ("seed", "k", "kind"),
    [
        (0, 3, "relu"),
        (1, 5, "relu"),
        (0, 5, "copies"),
        (1, 3, "copies"),
        (2, 3, "constant columns"),
        (0, 5, "constant"),
    ],
)
def test_equals_the_prdc_package_on_features(seed, k, kind):
    generated, reference = normal(400, 96, 1.05, "f4", seed), normal(250, 96, 1, "f4", seed + 10)
    generated, reference = np.maximum(generated, 0), np.maximum(reference, 0)  # like pooled ReLU
    if kind == "copies":
        generated = with_copies(generated[:150], 2)
        reference = with_copies(reference[:60], k + 1)
    elif kind == "constant columns":
        generated[:, 40:], reference[:, 40:] = 0.25, 0.25
    elif kind == "constant":
        generated, reference = np.full_like(generated, 0.5), np.full_like(reference, 0.5)
    result = prdc(generated=generated, reference=reference, k=k)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = peer.compute_prdc(reference, generated, k)
    assert scores(result) == pytest.approx([float(expected[name]) for name in NAMES], abs=1e-9)


def torch_fidelity(generated, reference, *, neighbours=3):
    """Precision and recall of that package's metric function."""
    found = prc_features_to_metric(
        torch.from_numpy(generated.astype("f4")),
        torch.from_numpy(reference.astype("f4")),
        prc_neighborhood=neighbours,
        prc_batch_size=100,
        save_cpu_ram=False,
        verbose=False,
    )
    return found["precision"], found["recall"]


@pytest.mark.parametrize("case", ["float32", "plain", "high dimension"])
def test_torch_fidelity_agrees_where_nothing_ties(case):
    generated, reference = (features.astype("f4") for features in CASES[case])
    result = prdc(generated=generated, reference=reference, k=3)
    expected = torch_fidelity(generated, reference)
    assert (result.precision, result.recall) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", ["lattice", "small integers", "both constant"])
def test_torch_fidelity_is_the_closed_convention(case):
    """Integers and copies, whose float32 distances are exact: every tie counts."""
    generated, reference = (np.round(features) for features in CASES[case])
    expected = pytest.approx(torch_fidelity(generated, reference), abs=1e-6)
    closed = brute_force(generated, reference, 3, closed=True)
    assert (closed[0].mean(), closed[1].mean()) == expected
    opened = prdc(generated=generated, reference=reference, k=3)
    assert (opened.precision, opened.recall) != expected


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["float32", "offset", "lattice", "collapsed to a few images"])
def test_no_bit_depends_on_the_device(case):
    assert_equals_brute_force(*CASES[case], 3, device="cuda")


def test_settling_in_parts_and_threads_changes_no_bit():
    left, right = normal(200, 3000, dtype="f4"), normal(4, 3000, dtype="f4", seed=1)
    row, col = np.divmod(np.arange(800), 4)
    torch.set_num_threads(2)
    try:
        settled = distances._canonical(left, row, right, col)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(settled, squared(left, right.astype("f8")).ravel())
    swapped = distances._canonical(right, col[::-1], left, row[::-1])
    np.testing.assert_array_equal(swapped[::-1], settled)


def test_near_copies_are_sorted_out_by_wider_products(monkeypatch):
    """A mode collapse, in doubt throughout in float32, is not settled pair by pair."""
    settled, tiles = [], []
    canonical, tile = distances._canonical, distances.Tile.__init__
    monkeypatch.setattr(
        distances, "_canonical", lambda *pairs: settled.append(len(pairs[1])) or canonical(*pairs)
    )
    monkeypatch.setattr(
        distances.Tile, "__init__", lambda *given: tiles.append(given[-1]) or tile(*given)
    )
    modes = normal(4, 64, dtype="f4").repeat(100, axis=0)
    generated = modes + normal(400, 64, 1e-3, "f4", seed=1)
    reference = modes + normal(400, 64, 1e-3, "f4", seed=2)
    result = prdc(generated=generated, reference=reference, k=3, chunk_size=200)
    assert 0.5 < result.precision < 1
    assert set(tiles) == {torch.float32, torch.float64}
    assert sum(settled) < 6 * 400  # 80,000 pairs are of one mode


def test_float32_products_stay_float32_where_less_is_allowed(monkeypatch):
    seen = []
    tile = distances.Tile.__init__
    monkeypatch.setattr(
        distances.Tile,
        "__init__",
        lambda *given: seen.append(torch.get_float32_matmul_precision()) or tile(*given),
    )
    torch.set_float32_matmul_precision("medium")
    try:
        prdc(generated=normal(9, 3), reference=normal(9, 3), k=1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_read_only_and_strided_features():
    generated, reference = CASES["float32"]
    expected = prdc(generated=generated, reference=reference, k=3)
    generated = np.asfortranarray(generated)
    generated.flags.writeable = False
    assert prdc(generated=generated, reference=reference[::-1], k=3) == expected


def test_takes_tensors():
    generated, reference = CASES["float32"]
    assert prdc(
        generated=torch.from_numpy(generated), reference=torch.from_numpy(reference), k=3
    ) == prdc(generated=generated, reference=reference, k=3)


@pytest.mark.parametrize(
    ("n", "m", "k", "ceiling"),
    [(50_000, 10_000, 3, 0.9954), (10_000, 10_000, 3, 0.8750), (10_000, 10_000, 5, 0.9688)],
)
def test_coverage_ceiling_of_published_setups(n, m, k, ceiling):
    assert coverage_ceiling(n, m, k) == pytest.approx(ceiling, abs=5e-5)


def test_coverage_ceiling_is_what_one_distribution_gets():
    results = [
        prdc(generated=normal(100, 3, seed=2 * i), reference=normal(150, 3, seed=2 * i + 1), k=2)
        for i in range(150)
    ]
    mean = np.mean([result.coverage for result in results])
    assert mean == pytest.approx(results[0].coverage_ceiling, abs=0.012)


def _peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_square_of_the_samples():
    features = normal(16_000, 4, dtype="f4")
    prdc(generated=features[:500], reference=features[500:1000], k=3, chunk_size=512)  # warm up
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
    before = _peak_bytes()
    prdc(generated=features[:8000], reference=features[8000:], k=3, chunk_size=512)
    assert _peak_bytes() - before < 64e6  # one 8000 x 8000 matrix is 256e6 in float32


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


# --- AuthPct --------------------------------------------------------------------------------------


def brute_authpct(generated, reference):
    """The definition, pair by pair, on the direct float64 differences."""
    own, cross = squared(reference, reference), squared(generated, reference)
    np.fill_diagonal(own, np.inf)
    nearest = cross == cross.min(axis=1, keepdims=True)
    radius = np.where(nearest, own.min(axis=1), 0).max(axis=1)
    return 100 * (cross.min(axis=1) > radius).mean()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["float32", "float64"], indirect=True)
def test_authpct_is_its_definition(case, path):
    generated, reference = CASES[case]
    expected = brute_authpct(np.asarray(generated, "f8"), np.asarray(reference, "f8"))
    for chunk_size in (64, 2048):
        found = authpct(generated=generated, reference=reference, chunk_size=chunk_size)
        assert found == pytest.approx(expected, abs=1e-6), chunk_size


def test_a_copy_is_not_authentic_even_of_a_duplicate():
    training = np.array([[0.0], [10.0], [10.0], [30.0]])
    for generated, expected in (
        ([[0.0], [10.0], [30.0]], 0),  # copies
        ([[-9.0], [-11.0]], 50),  # 0 is 10 from its nearest
        ([[10.5], [9.5]], 100),  # 10 has its nearest at distance 0
    ):
        assert authpct(generated=np.array(generated), reference=training) == expected


def test_authpct_of_fresh_data_on_a_line_is_a_third():
    """Mutual nearest neighbours are two thirds of a Poisson process's pairs in one dimension."""
    drawn = np.random.default_rng(3).random((8000, 1))
    found = authpct(generated=drawn[:4000], reference=drawn[4000:])
    assert found == pytest.approx(100 / 3, abs=2.5)


def test_authpct_of_one_training_image_is_refused():
    with pytest.raises(DimoError, match="at least 2 samples"):
        authpct(generated=normal(5, 3), reference=normal(1, 3))
