"""Edits: known tokens stay through every sampler, and the rest is sampled as a grid of its own."""

import dataclasses

import pytest
import torch

import dimo
from dimo.errors import DimoError
from dimo.models import digits
from dimo.rng import ImageNoise
from dimo.samplers import teacher_samplers
from dimo.samplers.inpainting import KnownTokens, known_tokens
from dimo.samplers.ordered import halton_order, masked_halton_order
from dimo.zoo.students import StudentConfig

LOWER = torch.arange(8)[:, None].expand(8, 8) >= 4  # half of the 16 tokens
SETTINGS = {"halton": {"random_start": True, "final_temperature": 0.8}}


@pytest.fixture(scope="module")
def image():
    return digits.load()[0][3]


@pytest.fixture(scope="module")
def teacher():
    return dimo.load("digits", device="cpu")


@torch.inference_mode()
def _tokens(model, sampler, *, seed=0, size=20):
    """Twenty images under labels 0, 1, 2, ..., in batches."""
    settings = {"num_steps": 4, "guidance_scale": 2.0, **SETTINGS.get(sampler, {})}
    parts = [
        model.sample_tokens(sampler, index % 10, ImageNoise(seed, index), **settings).tokens
        for index in torch.arange(20).split(size)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("sampler", teacher_samplers())
def test_known_tokens_are_kept_and_the_others_sampled(teacher, image, sampler):
    model = teacher.editing(image, LOWER)
    known = model.tokenizer.encode(image[None])[0]
    tokens = _tokens(model, sampler)
    assert (tokens[:, :8] == known[:8]).all()
    assert int(tokens.max()) < model.model.codebook_size
    assert len(tokens[::10, 8:].unique(dim=0)) == 2  # of one label
    other = _tokens(model, sampler, seed=1)
    assert (other[:, :8] == known[:8]).all()
    assert (tokens != other).any(1).all()
    assert torch.equal(_tokens(model, sampler, size=3), tokens)


@pytest.mark.parametrize("sampler", teacher_samplers())
def test_with_everything_masked_it_is_plain_sampling(teacher, image, sampler):
    edited = teacher.editing(image, torch.ones(8, 8).bool())
    assert torch.equal(_tokens(edited, sampler), _tokens(teacher, sampler))


def test_the_images_of_the_api_keep_what_the_tokenizer_makes_of_the_known_patches(teacher, image):
    found = teacher.sample([3, 3, 8], image=image, mask=LOWER, seed=1)
    known = teacher.tokenizer.decode(teacher.tokenizer.encode(image[None]))
    levels = ((known + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(torch.Tensor(found[:, :, :4]), levels[:, :, :4].repeat(3, 1, 1, 1).float())
    assert not torch.equal(found[0], found[1])


def test_a_token_is_masked_if_any_pixel_of_its_patch_is(teacher, image):
    mask = torch.zeros(8, 8).bool()
    mask[1, 2] = mask[7, 7] = True
    known = known_tokens(image, mask, teacher.tokenizer, 8)
    assert known.mask.nonzero().flatten().tolist() == [1, 15]


def test_steps_are_at_most_the_masked_tokens(teacher, image):
    model, index = teacher.editing(image, LOWER), torch.arange(2)
    for sampler, steps in (("confidence", 8), ("tau_leaping", 16)):
        with torch.inference_mode():
            found = model.sample_tokens(sampler, index, ImageNoise(0, index), num_steps=16)
        assert found.nfe == steps
        assert sum(found.token_counts) == 8


def test_the_halton_order_leaves_known_cells_out():
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1]).bool()
    order = mask.nonzero().flatten()[masked_halton_order(mask)]
    assert order.tolist() == [cell for cell in halton_order(3).tolist() if mask[cell]]


def test_the_hash_is_of_what_is_known():
    tokens, mask = torch.arange(4), torch.tensor([True, False, False, True])
    known, same = KnownTokens(tokens, mask), KnownTokens(tokens + 5 * mask, mask)
    assert known.sha256 == same.sha256
    assert known.sha256 != KnownTokens(tokens + 1, mask).sha256
    assert known.sha256 != KnownTokens(tokens, ~mask).sha256


class _Decoder:
    """A tokenizer of images that are never read."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"an edit takes image= and mask=; give both"),
        ({"image": None}, r"an edit takes image= and mask=; give both"),
        (
            {"image": torch.zeros(3, 9, 8).byte()},
            r"\[3, 9, 8\]; allowed: uint8 \[3, 8, 8\]",
        ),
        ({"image": torch.zeros(3, 8, 8)}, "float32"),
        ({"mask": torch.ones(4, 4).bool()}, r"\[4, 4\]; allowed: bool \[8, 8\], .* resize it"),
        ({"mask": torch.zeros(8, 8).bool()}, "mask is empty, so nothing is to be painted"),
    ],
)
def test_what_cannot_be_edited_is_refused(teacher, image, change, message):
    with pytest.raises(DimoError, match=message):
        teacher.sample([3], **{"image": image, "mask": LOWER, **change})


def test_a_tokenizer_without_an_encoder_is_refused(image):
    with pytest.raises(DimoError, match="_Decoder has no encoder"):
        known_tokens(image, LOWER, _Decoder(), 8)


def test_a_one_step_student_is_refused(image):
    with pytest.raises(DimoError, match=r"not to continue known ones; use its teacher, digits"):
        dimo.load("digits-dimo", device="cpu").sample([3], image=image, mask=LOWER)


def test_a_student_of_several_steps_edits_as_teachers_do(teacher, image):
    config = StudentConfig("digits", 1.0, 0.0, 1.0, "", "r", method="sdtt")
    student = dataclasses.replace(teacher, student=config)
    arguments = {"labels": [3, 8], "image": image, "mask": LOWER, "steps": 4}
    assert torch.equal(student.sample(**arguments), teacher.sample(**arguments))
