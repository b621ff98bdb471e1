"""x_init: what it is made of, and how r and sigma depend on the training step."""

import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.initialization import (
    EMBEDDING_NOISE_WARMUPS,
    embedding_noise_at,
    init_mask_ratio_at,
    initial_state,
)
from dimo.models.maskgit import MaskGIT
from dimo.rng import ImageNoise
from dimo.samplers.student import sample_few_step, sample_one_step


@pytest.fixture(scope="module")
def student(tiny_network):
    torch.manual_seed(0)
    return MaskGIT(**tiny_network).eval()


def _initial(student, kind="mixed", r=0.6, sigma=0.0):
    return initial_state(
        student,
        ImageNoise(2, torch.arange(200)),
        "student",
        init_mask_ratio=r,
        embedding_noise=sigma,
        token_initialization=kind,
    )


def test_what_x_init_is_made_of(student):
    mask, codebook = student.mask_token_id, student.codebook_size
    mixed, masked, random, fixed = (
        _initial(student, kind).tokens for kind in ("mixed", "masked", "random", "fixed")
    )
    assert ((mixed == mask).sum(1) == 10).all()
    assert (masked == mask).all()
    assert set(random.unique().tolist()) == set(range(codebook))
    assert torch.equal(mixed, random.masked_fill(mixed == mask, mask))
    assert torch.equal(fixed == mask, mixed == mask)
    assert set(fixed.unique().tolist()) == {0, mask}
    with pytest.raises(DimoError, match="did you mean 'mixed'"):
        _initial(student, "mixd")


def test_the_embedding_noise_is_drawn_where_it_is_needed(student):
    assert _initial(student).noise is None
    assert _initial(student, sigma=0.1).noise.shape == (200, 16, 32)


def test_r_of_a_range_is_one_for_each_step():
    bounds = (0.1, 0.9)
    drawn = [init_mask_ratio_at(3, step, init_mask_ratio=0.6, bounds=bounds) for step in range(500)]
    assert drawn == [
        init_mask_ratio_at(3, step, init_mask_ratio=0.2, bounds=bounds) for step in range(500)
    ]
    assert len(set(drawn)) == 500
    assert 0.1 < min(drawn) < 0.11
    assert 0.89 < max(drawn) < 0.9
    assert sum(drawn) / 500 == pytest.approx(0.5, abs=0.03)
    assert init_mask_ratio_at(3, 7, init_mask_ratio=0.6, bounds=None) == 0.6


def test_sigma_rises_as_the_official_ramps_to_its_own_end():
    """The official ramps end at 1, whatever sigma; ours is that ramp times sigma."""
    official = {
        "linear": lambda s: min(1, s / 40),
        "cos": lambda s: 1 - (1 + math.cos(math.pi * min(1, s / 40))) / 2,
        "exp": lambda s: 1 - math.exp(-s / 40),
    }
    for warmup, ramp in official.items():
        for step in range(0, 100, 7):
            for final in (1.0, 0.3):
                found = embedding_noise_at(step, final=final, warmup=warmup, warmup_steps=40)
                assert found == pytest.approx(final * ramp(step), abs=1e-12)
    assert embedding_noise_at(0, final=0.1, warmup="none", warmup_steps=0) == 0.1
    assert set(EMBEDDING_NOISE_WARMUPS) == {"none", *official}
    with pytest.raises(DimoError, match="did you mean 'cos'"):
        embedding_noise_at(0, final=0.1, warmup="cosine", warmup_steps=5)


@pytest.mark.parametrize("sample", [sample_one_step, sample_few_step])
@pytest.mark.parametrize("kind", ["mixed", "masked", "random", "fixed"])
def test_a_student_is_sampled_from_the_initialization_of_its_training(student, sample, kind):
    seen = []

    class Watched:
        """The student, noting what it is given."""

        def __getattr__(self, name):
            return getattr(student, name)

        def __call__(self, tokens, labels, **inputs):
            seen.append((tokens, inputs["embedding_noise"]))
            return student(tokens, labels, **inputs)

    noise = ImageNoise(2, torch.arange(6))
    settings = {} if sample is sample_one_step else {"num_steps": 2}
    sample(
        Watched(),
        torch.arange(6) % 5,
        noise,
        init_mask_ratio=0.5,
        embedding_noise=0.2,
        token_initialization=kind,
        **settings,
    )
    expected = initial_state(
        student,
        noise,
        "sample",
        init_mask_ratio=0.5,
        embedding_noise=0.2,
        token_initialization=kind,
    )
    tokens, sigma = seen[0]
    assert torch.equal(tokens, expected.tokens)
    assert sigma == 0.2
