"""The Python API: the images of the commands, and nothing heavy before it is used."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

import dimo
from bench.rows.rows import jobs_of
from bench.rows.settings import Choice, sample_images
from dimo.models.text import TextConditioned
from dimo.zoo.students import StudentConfig


def _benched(model, settings, labels, steps, seed):
    """Images of the same seed and labels as `dimo bench` makes them."""
    (job,) = jobs_of(model, [steps], Choice(settings=settings), student_steps=[steps])
    index = torch.arange(len(labels))
    batch = sample_images(
        model, job.settings, labels=torch.tensor(labels), seed=seed, index=index, uint8="round"
    )
    return batch.images


@pytest.mark.parametrize(
    ("name", "steps", "settings"),
    [
        ("digits", 4, {}),
        ("digits", 8, {"guidance_scale": 2.0, "temperature": 1.3}),
        ("digits-dimo", 1, {}),
        ("digits-dimo", 4, {"temperature": 0.8}),
    ],
)
def test_images_are_those_of_the_benchmark(name, steps, settings):
    model = dimo.load(name, device="cpu")
    labels = [3, 1, 4, 1, 5]
    images = model.sample(labels, steps=steps, seed=7, batch_size=2, **settings)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 3, 8, 8)
    assert torch.equal(torch.Tensor(images), _benched(model, settings, labels, steps, 7))
    assert not torch.equal(images, model.sample(labels, steps=steps, seed=8, **settings))


def test_a_student_of_several_steps_is_sampled_as_in_the_benchmark():
    config = StudentConfig("digits", 1.0, 0.0, 0.7, "", "r", method="sdtt", guidance_scale=1.5)
    model = dataclasses.replace(dimo.load("digits", device="cpu"), student=config)
    images = model.sample([3, 1, 4])
    assert torch.equal(torch.Tensor(images), _benched(model, {}, [3, 1, 4], 4, 0))


def test_images_become_pictures():
    images = dimo.load("digits-dimo", device="cpu").sample([3, 1])
    picture = images.pil()[1]
    assert np.array_equal(np.asarray(picture), images[1].permute(1, 2, 0).numpy())


def test_prompts_are_given_when_sampling_or_loading():
    prompts = ["a photo of a red circle", "a photo of two blue squares"]
    given = dimo.load("scenes-dimo", device="cpu").sample(prompts=prompts)
    loaded = dimo.load("scenes-dimo", device="cpu", prompts=prompts)
    assert isinstance(loaded.model, TextConditioned)
    assert torch.equal(given, loaded.sample([0, 1]))
    with pytest.raises(dimo.DimoError, match="unknown word of a prompt"):
        loaded.sample(prompts=["a photo of a zebra"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digits", {}, r"one condition per image; e\.g\. labels=\[0\]"),
        ("digits", {"prompts": ["a"]}, "one condition per image"),
        ("digits", {"labels": [10]}, "label 10 is out of range"),
        ("digits", {"labels": [1], "sampler": "halto"}, "did you mean 'halton'"),
        ("digits", {"labels": [1], "theta": 0.3}, "no setting 'theta'; allowed: mask_schedule"),
        ("digits-dimo", {"labels": [1], "guidance_scale": 2.0}, "no setting 'guidance_scale'"),
        ("digits-dimo", {"labels": [1], "sampler": "halton"}, "is for teachers"),
    ],
)
def test_what_cannot_be_sampled_is_refused(name, arguments, message):
    model = dimo.load(name, device="cpu")
    with pytest.raises(dimo.DimoError, match=message):
        model.sample(**arguments)


def test_distilling_returns_the_student_and_touches_no_global_state(tmp_path):
    before = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), sys.argv
    student = dimo.distill(
        "digits", out=tmp_path / "run", settings=["steps=2", "batch_size=4"], device="cpu"
    )
    assert before == (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        sys.argv,
    )
    assert student.student.recipe == "digits"
    again = dimo.load(tmp_path / "run", device="cpu")
    assert torch.equal(student.sample([3]), again.sample([3]))


def test_importing_the_package_imports_no_torch():
    code = "import dimo, sys; dir(dimo); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        dimo.loads  # noqa: B018
