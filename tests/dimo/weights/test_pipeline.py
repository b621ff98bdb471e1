"""Students as pipelines of diffusers: the images of `sample`, whatever form they are asked in."""

import os
import runpy
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import dimo as package
from dimo.errors import DimoError

GIVEN = {
    "digits-dimo": ({"class_labels": [3, 7]}, {"labels": [3, 7]}),
    "scenes-dimo": ({"prompt": ["a red circle"]}, {"prompts": ["a red circle"]}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def loaded(dimo, tmp_path, monkeypatch):
    """Exports a student and loads its folder, with a stand-in for diffusers, which imports long."""
    diffusers = ModuleType("diffusers")
    diffusers.DiffusionPipeline, diffusers.ImagePipelineOutput = type("", (), {}), SimpleNamespace
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)

    def load(name):
        dimo("export", name, "--format", "diffusers")
        pipe = runpy.run_path(str(tmp_path / name / "pipeline.py"))["DimoPipeline"]()
        pipe.name_or_path = name
        return pipe

    return load


@pytest.mark.parametrize("name", GIVEN)
def test_a_pipeline_draws_the_images_of_sample(loaded, tmp_path, name):
    pipe, (given, wanted) = loaded(name), GIVEN[name]
    wanted = package.load(tmp_path / name).sample(**wanted, seed=5).as_subclass(torch.Tensor)
    pictures = pipe(**given, generator=seeded(5), num_inference_steps=1).images
    assert np.array_equal(np.stack(pictures), wanted.permute(0, 2, 3, 1))
    tensors = pipe(**given, generator=seeded(5), output_type="pt").images
    assert torch.equal(tensors, wanted.float() / 255)
    (arrays,) = pipe(**given, generator=seeded(5), output_type="np", return_dict=False)
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1))


def test_one_condition_a_setting_and_a_seed_of_the_global_generator(loaded):
    pipe = loaded("digits-dimo")
    student = package.load("digits-dimo")
    (image,) = pipe(class_labels=3, generator=seeded(), output_type="pt", temperature=2.0).images
    assert torch.equal(image, student.sample([3], seed=0, temperature=2.0)[0] / 255)
    first, again, other = (
        [torch.manual_seed(seed), pipe(class_labels=range(9), output_type="pt").images][1]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_moves_by_loading_again(loaded):
    pipe = loaded("digits-dimo")
    pipe(class_labels=3)
    before = pipe._student
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.float32, silence_dtype_warnings=True)._student is before
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    pipe.to("cpu", torch.bfloat16)(class_labels=3)
    assert pipe._student.precision == "bfloat16"
    with pytest.raises(DimoError, match="'float16'; allowed: bfloat16, float32"):
        pipe.to(torch.float16)(class_labels=3)


def test_what_a_pipeline_refuses(loaded, monkeypatch, tmp_path):
    pipe = loaded("digits-dimo")
    for given, said in (
        ({"class_labels": [3], "output_type": "latent"}, "'latent' is unknown; allowed: pil, np"),
        ({"class_labels": [3], "generator": [seeded()]}, "give one torch.Generator for all"),
        ({"class_labels": [3], "guidance": 2.0}, "no setting 'guidance'; allowed: temperature"),
        ({"prompt": "a red circle"}, r"needs one condition per image; e.g. labels=\[0\]"),
        ({"class_labels": [10]}, "10"),
    ):
        with pytest.raises(DimoError, match=said) as caught:
            pipe(**given)
        assert "\n" not in str(caught.value)
    pipe = loaded("scenes-dimo")
    pipe.name_or_path = "owner/repo"
    with pytest.raises(DimoError, match=r"^no folder owner/repo; .*snapshot_download"):
        pipe(prompt="a red circle")
    monkeypatch.setitem(sys.modules, "dimo", None)
    with pytest.raises(ImportError, match="package dimo, which is not installed; install it"):
        runpy.run_path(str(tmp_path / "scenes-dimo" / "pipeline.py"))


def test_the_folder_is_the_ordinary_one_and_two_files(dimo, tmp_path):
    dimo("export", "digits-dimo", "-o", "plain")
    dimo("export", "digits-dimo", "--format", "diffusers")
    plain, folder = (
        {path.name: path.read_text("latin1") for path in (tmp_path / name).iterdir()}
        for name in ("plain", "digits-dimo")
    )
    assert folder.keys() - plain.keys() == {"model_index.json", "pipeline.py"}
    assert {name for name in plain if plain[name] != folder[name]} == {"README.md"}
    assert "diffusers" not in plain["README.md"]
    for arguments, said in (
        (("digits-dimo", "-o", "x.safetensors"), "diffusers takes a folder"),
        (("digits-dimo", "-o", "x.bin"), "diffusers takes a folder"),
        (("digits-dimo",), "digits-dimo is not empty"),
        (("digits",), "student run 'digits' does not exist"),
    ):
        error = dimo("export", *arguments, "--format", "diffusers", code=2)[1]
        assert said in error
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "digits-dimo"}


SCRIPT = """
import re
from pathlib import Path

import huggingface_hub, numpy, torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

import dimo

huggingface_hub.snapshot_download = lambda name: folder
for folder, theirs, ours in (
    ("digits-dimo", "class_labels", "labels"), ("scenes-dimo", "prompt", "prompts")
):
    names = {}
    exec(re.findall("```python\\n(.*?)```", Path(folder, "README.md").read_text(), re.S)[1], names)
    conditions = [3, 7] if theirs == "class_labels" else ["a red circle", "a blue square"]
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True
    ).to("cpu")
    assert pipe.device.type == "cpu" and type(pipe).__name__ == type(names["pipe"]).__name__
    output = pipe(
        **{theirs: conditions}, num_inference_steps=1, generator=torch.Generator().manual_seed(0)
    )
    assert isinstance(output, ImagePipelineOutput)
    wanted = dimo.load(folder).sample(**{ours: conditions}, seed=0).permute(0, 2, 3, 1).numpy()
    assert numpy.array_equal(numpy.stack(output.images), wanted)
    print(len(names["images"]), names["images"][0].size)
"""


@pytest.mark.slow  # imports diffusers, which takes longer than all else
def test_diffusers_loads_the_folder_and_the_model_card_is_right(dimo, tmp_path):
    for name in GIVEN:
        dimo("export", name, "--format", "diffusers")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4 (8, 8)\n1 (32, 32)\n"
    assert (tmp_path / "image.png").is_file()
