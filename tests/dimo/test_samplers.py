"""Samplers: image i is bit-equal whatever the batch; counts and NFE are what they say."""

import pytest
import torch

from dimo.errors import DimoError
from dimo.samplers.confidence import sample_confidence
from dimo.samplers.one_step import sample_one_step
from dimo.teachers import load_student, load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits", device=CPU)


@pytest.fixture(scope="module")
def student():
    return load_student("digits-dimo", device=CPU)


@torch.inference_mode()
def _teacher_tokens(teacher, index, **settings):
    labels = index % 10
    return sample_confidence(teacher.model, labels, seed=3, index=index, **settings)


@torch.inference_mode()
def _student_tokens(student, index):
    config = student.student
    return sample_one_step(
        student.model,
        index % 10,
        seed=3,
        index=index,
        init_mask_ratio=config.init_mask_ratio,
        embedding_noise=config.embedding_noise,
    ).tokens


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_teacher_images_do_not_depend_on_the_batch(teacher, size, guidance_scale):
    settings = {"num_steps": 8, "guidance_scale": guidance_scale}
    index = torch.arange(64)
    whole = _teacher_tokens(teacher, index, **settings).tokens
    parts = [_teacher_tokens(teacher, part, **settings).tokens for part in index.split(size)]
    assert torch.equal(torch.cat(parts), whole)
    decode = teacher.tokenizer.decode
    assert torch.equal(torch.cat([decode(part) for part in parts]), decode(whole))


@pytest.mark.parametrize("size", [1, 7])
def test_student_images_do_not_depend_on_the_batch(student, size):
    index = torch.arange(64)
    whole = _student_tokens(student, index)
    parts = torch.cat([_student_tokens(student, part) for part in index.split(size)])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_each_step_reveals_its_count_and_keeps_what_it_revealed(teacher, steps, guidance_scale):
    history = []
    found = _teacher_tokens(
        teacher,
        torch.arange(32),
        num_steps=steps,
        guidance_scale=guidance_scale,
        callback=lambda step, tokens: history.append(tokens),
    )
    revealed = torch.zeros(32, 16, dtype=torch.bool)
    for count, tokens in zip(found.token_counts, history, strict=True):
        now = tokens != teacher.model.mask_token_id
        assert torch.equal((now & ~revealed).sum(1), torch.full((32,), count))
        assert (now | ~revealed).all()
        assert torch.equal(tokens[revealed], history[-1][revealed])
        revealed = now
    assert revealed.all()
    assert int(found.tokens.max()) < teacher.model.codebook_size
    # the first of several steps has no guidance yet, so it costs one forward
    guided = guidance_scale != 1
    assert found.nfe == (steps if not guided else 2 * steps - (steps > 1))


def test_nfe_counts_the_forwards(teacher):
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(teacher.model, name)

        def __call__(self, tokens, labels, **arguments):
            calls.append(len(tokens))
            return teacher.model(tokens, labels, **arguments)

    index = torch.arange(4)
    with torch.inference_mode():
        found = sample_confidence(
            Counting(), index, seed=0, index=index, num_steps=4, guidance_scale=3.0
        )
    assert sum(calls) / 4 == found.nfe


@pytest.mark.parametrize("steps", [0, 17])
def test_steps_out_of_range_are_refused(teacher, steps):
    with pytest.raises(DimoError, match="takes 1 to 16 steps"):
        _teacher_tokens(teacher, torch.arange(2), num_steps=steps)


def test_one_step_sampling_uses_its_noise(student):
    """Other indices give other digits: the generator has not collapsed onto its condition."""
    tokens = _student_tokens(student, torch.arange(0, 2000, 10))  # all of class 0
    assert len(torch.unique(tokens, dim=0)) > 100
