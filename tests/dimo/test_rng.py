"""Random streams: fixed by (seed, index, stream), uniform, independent."""

import hashlib
import math

import pytest
import torch

from bench.rows.rows import jobs_of
from bench.rows.settings import sample_tokens
from dimo import rng
from dimo.zoo.loading import load_student, load_teacher

PINNED = [
    0.3710369728037045,
    0.14860144928787034,
    0.6896675973970089,
    0.15611106128057795,
]


def test_a_draw_depends_on_seed_index_and_stream_only():
    index = torch.arange(100)
    whole = rng.uniform(7, index, "tokens/3", (4, 5))
    assert torch.equal(whole[40:47], rng.uniform(7, index[40:47], "tokens/3", (4, 5)))
    assert torch.equal(whole, rng.uniform(7, index.flip(0), "tokens/3", (4, 5)).flip(0))
    for other in (
        rng.uniform(8, index, "tokens/3", (4, 5)),
        rng.uniform(7, index + 100, "tokens/3", (4, 5)),
        rng.uniform(7, index, "tokens/4", (4, 5)),
    ):
        assert not (whole == other).any()


def test_image_noise_draws_the_same_numbers():
    index = torch.arange(5)
    noise = rng.ImageNoise(7, index)
    for kind in ("uniform", "gumbel", "normal"):
        expected = getattr(rng, kind)(7, index, "x", (3, 2))
        assert torch.equal(getattr(noise, kind)("x", (3, 2)), expected)
    assert torch.equal(noise.integers("x", (3,), 9), rng.integers(7, index, "x", (3,), 9))
    assert torch.equal(noise.random_ranks("x", 9), rng.random_ranks(7, index, "x", 9))


def test_the_generator_is_splitmix64():
    """The published output function at the counters 1, 2, 3 from key 0 (Vigna's reference code)."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    counter = torch.tensor([1, 2, 3]) * rng._signed(rng._GAMMA)
    assert [value & (2**64 - 1) for value in rng._mix(counter).tolist()] == expected


def test_draws_are_pinned():
    """A change of these numbers changes every benchmark's images."""
    found = rng.uniform(0, torch.tensor([0, 1]), "sample/tokens", (2,))
    assert found.flatten().tolist() == PINNED


def test_uniform_moments_and_independence():
    u = rng.uniform(1, torch.arange(4000), "a", (50,))
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    n = u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    histogram = torch.histc(u, 20, 0, 1)
    chi_squared = float(((histogram - n / 20) ** 2 / (n / 20)).sum())
    assert chi_squared < 45  # 19 degrees of freedom, p about 7e-4
    correlation = torch.corrcoef(u.T) - torch.eye(50)
    assert float(correlation.abs().max()) < 5 / math.sqrt(4000)
    neighbours = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 5 / math.sqrt(n)


def test_normal_and_gumbel_have_their_moments():
    index = torch.arange(4000)
    normal = rng.normal(2, index, "n", (51,)).double()
    n = normal.numel()
    assert normal.shape == (4000, 51)
    assert abs(float(normal.mean())) < 5 / math.sqrt(n)
    assert abs(float(normal.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((normal**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    gumbel = rng.gumbel(2, index, "g", (50,))
    assert abs(float(gumbel.mean()) - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)


def test_gumbel_max_samples_the_softmax():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    noise = rng.gumbel(3, torch.arange(20_000), "s", (4,))
    counts = torch.bincount((probabilities.log() + noise).argmax(-1), minlength=4) / 20_000
    sigma = (probabilities * (1 - probabilities) / 20_000).sqrt()
    assert ((counts - probabilities).abs() < 5 * sigma).all()


def test_ranks_are_permutations_and_integers_stay_in_range():
    ranks = rng.random_ranks(0, torch.arange(200), "r", 16)
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(16).expand(200, 16))
    values = rng.integers(0, torch.arange(200), "i", (30,), 7)
    assert sorted(values.unique().tolist()) == list(range(7))


@pytest.mark.gpu
def test_the_same_numbers_on_a_gpu():
    index = torch.arange(100)
    here = rng.uniform(5, index, "x", (64,))
    assert torch.equal(here, rng.uniform(5, index.cuda(), "x", (64,)).cpu())


STUDENT_TOKENS = "b1913e510596cdbb379db34f94d0e73c0f4df17cc3dfe95076fbf059e2728fda"
TEACHER_TOKENS = "167c1bcf547469dfc70483674e301ea42da326ca946dfed29790caf0c02fe5b2"
EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 0xFFFFFFFF, -(2**32), 2**24 - 1, -(2**40)]


def test_extreme_bits_stay_inside_the_open_interval(monkeypatch):
    """The float32 draw of all ones was exactly 1, which made a Gumbel draw infinite."""
    bits = torch.tensor([EXTREMES])
    monkeypatch.setattr(
        rng, "_bits", lambda seed, index, stream, number: bits[:, : number.shape[-1]].clone()
    )
    index, count = torch.tensor([0]), len(EXTREMES)
    single = rng._uniform32(0, index, "x", 2 * count)
    for u in (rng.uniform(0, index, "x", (count,)), single):
        assert float(u.min()) > 0
        assert float(u.max()) < 1
    assert float(single.max()) == 1 - 2**-24
    for draws in (
        rng.gumbel(0, index, "x", (count,)),
        rng.gumbel(0, index, "x", (2 * count,), torch.float32),
        rng.gumbel_at(0, index, "x", torch.tensor([[0]]), count),
        rng.normal(0, index, "x", (2 * count,)),
    ):
        assert draws.isfinite().all()
    for high in (1, 2, 3, 1000, 1024, 8192):
        draws = rng.integers(0, index, "x", (count,), high)
        assert (int(draws.min()), int(draws.max())) == (0, high - 1)
    assert sorted(rng.random_ranks(0, index, "x", count)[0].tolist()) == list(range(count))


@pytest.mark.parametrize(
    ("load", "name", "sha256"),
    [
        (load_student, "digits-dimo", STUDENT_TOKENS),
        (load_teacher, "digits", TEACHER_TOKENS),
    ],
)
def test_shipped_models_sample_the_images_of_earlier_versions(load, name, sha256):
    """Tokens of 64 images, at one step of the student and four of the teacher."""
    loaded, index = load(name, device=torch.device("cpu")), torch.arange(64)
    job = jobs_of(loaded, [4], student_steps=(1,))[0]
    tokens = sample_tokens(loaded, job.settings, labels=index % 10, seed=0, index=index).tokens
    assert hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest() == sha256
