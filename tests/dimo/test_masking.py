"""Mask schedules against the official ones; exact counts."""

import json

import pytest
import torch

from dimo.errors import DimoError
from dimo.masking import (
    DECODING_SCHEDULES,
    initialize_tokens,
    mask_count,
    mask_ratio,
    random_mask,
    tokens_per_step,
)


@pytest.fixture(scope="module")
def schedules(golden):
    return json.loads((golden / "schedules.data.json").read_text())


@pytest.mark.parametrize(
    ("trainer", "bounds"), [("dimo_maskgit", (0.0, 1.0)), ("dimo_meissonic", (0.02, 0.98))]
)
@pytest.mark.parametrize("schedule", ["arccos", "cosine", "linear", "square", "mage"])
def test_ratio_and_count_equal_the_official_ones(schedules, schedule, trainer, bounds):
    official = schedules[f"get_mask_code/{trainer}"]
    expected = official["modes"][schedule]
    dtype = torch.float64 if schedule == "mage" else torch.float32  # as the official code computes
    u = torch.tensor(schedules["r_grid"], dtype=dtype)
    ratio = mask_ratio(schedule, u).clamp(*bounds)
    wanted = torch.tensor(expected["mask_ratio"], dtype=dtype)
    torch.testing.assert_close(ratio, wanted, atol=1e-6, rtol=0)
    counts = mask_count(ratio, official["patch_size"] ** 2)
    assert counts.tolist() == expected["count"]


def test_the_law_of_mage_is_a_truncated_normal():
    """Its share of masks below x is that of the normal between the bounds."""
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    found = mask_ratio("mage", u)
    normal = torch.distributions.Normal(0.55, 0.25)
    low, high = normal.cdf(torch.tensor([0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close((normal.cdf(found) - low) / (high - low), u)
    assert (float(found[0]), float(found[-1])) == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize("schedule", ["arccos", "cosine", "arccos-v1", "cosine-v1"])
def test_tokens_per_step_equal_the_official_ones(schedules, schedule):
    """Wherever the official functions give every step a token."""
    mode, _, rule = schedule.partition("-")
    prefix = "adap_sche/v1.0 (" if rule == "v1" else "adap_sche/di4c"
    (sides,) = [v for k, v in schedules.items() if k.startswith(prefix) and "patho" not in k]
    compared = 0
    for side, modes in sides.items():
        for steps, expected in modes[mode].items():
            regular = expected is not None and min(expected) >= 1
            if regular and int(steps) <= int(side) ** 2:
                assert tokens_per_step(schedule, int(steps), int(side) ** 2) == expected
                compared += 1
    assert compared > 40


def test_tokens_per_step_equal_those_of_halton_maskgit(schedules):
    for side, steps in schedules["halton_sampler_counts"].items():
        for number, expected in steps.items():
            assert tokens_per_step("arccos-halton", int(number), int(side) ** 2) == expected


def test_tokens_per_step_always_reveals_every_token():
    for length in (16, 64, 256):
        for schedule in DECODING_SCHEDULES:
            for steps in range(1, length + 1):
                counts = tokens_per_step(schedule, steps, length)
                assert sum(counts) == length
                assert min(counts) >= 1
            assert tokens_per_step(schedule, 1, length) == [length]
    assert tokens_per_step("arccos", 2, 256) == [85, 171]
    assert tokens_per_step("arccos-v1", 2, 256) == [1, 255]
    assert tokens_per_step("cosine", 2, 256) == [75, 181]


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(DimoError, match="takes 1 to 16 steps"):
        tokens_per_step("arccos", steps, 16)


def test_schedules_that_cannot_decode_are_refused():
    with pytest.raises(DimoError, match="unknown decoding schedule 'square'; allowed: arccos, "):
        tokens_per_step("square", 4, 16)
    with pytest.raises(DimoError, match="did you mean 'arccos'"):
        mask_ratio("arcos", torch.rand(2))


def test_masks_and_initialization_have_exact_counts():
    ranks = torch.rand(50, 16).argsort(dim=1)
    count = torch.arange(50) % 16 + 1
    assert torch.equal(random_mask(ranks, count).sum(1), count)
    for ratio, masked in ((0.0, 1), (0.6, 10), (1.0, 16)):
        tokens = initialize_tokens(
            torch.zeros(50, 16, dtype=torch.long), ranks, init_mask_ratio=ratio, mask_token_id=9
        )
        assert ((tokens == 9).sum(1) == masked).all()
