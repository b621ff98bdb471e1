"""The di4c student against the official one."""

import pytest
import torch

from dimo.errors import DimoError
from dimo.methods.di4c.network import Di4CStudent, latent_features
from dimo.models.maskgit import MaskGIT

CASE = "di4c_student_transformer"
FILE = f"{CASE}.weights.safetensors"


@pytest.fixture(scope="module")
def config(golden_constructor):
    return {k: v for k, v in golden_constructor[CASE].items() if k != "is_student"}


@pytest.fixture(scope="module")
def model(golden_file, config):
    return Di4CStudent.from_official(golden_file(FILE), **config)


@torch.inference_mode()
def test_logits_equal_the_official_network(model, golden_arrays, assert_relative):
    data = golden_arrays(CASE)
    tokens, labels = data["tokens"].flatten(1), data["labels"]
    drop, z = data["drop_label"], data["z"]
    everyone = torch.ones_like(drop)
    assert_relative(model(tokens, labels, drop=drop, z=z), data["logits_z"])
    assert_relative(model(tokens, labels, drop=drop, z=z[:, 0]), data["logits_z"])
    assert_relative(model(tokens, labels, drop=drop), data["logits_z_none"])
    assert_relative(model(tokens, labels, z=z), data["logits_z_no_drop"])
    # the official network takes "no drop given" for "drop every label"
    assert_relative(model(tokens, labels, drop=everyone, z=z), data["logits_drop_none"])


def test_latent_features_equal_the_official_ones(golden_arrays, assert_relative):
    data = golden_arrays(CASE)
    assert_relative(latent_features(data["z"]), data["z_embedding"])


def test_full_size_is_the_teacher_and_the_latent_projection():
    with torch.device("meta"):
        teacher, student = MaskGIT().state_dict(), Di4CStudent().state_dict()
    extra = {key: tuple(student[key].shape) for key in student.keys() - teacher.keys()}
    assert extra == {
        "latent_projection.0.weight": (512, 128),
        "latent_projection.0.bias": (512,),
        "latent_projection.2.weight": (768, 512),
        "latent_projection.2.bias": (768,),
    }
    assert all(student[key].shape == value.shape for key, value in teacher.items())


def test_student_and_teacher_files_are_told_apart(golden_file, config, golden, tiny_network):
    with pytest.raises(DimoError, match=r"those of a di4c student, but a MaskGIT v1\.0"):
        MaskGIT.from_official(golden_file(FILE), **config)
    teacher = golden / "maskgit_v1_transformer.official.pth"
    with pytest.raises(DimoError, match=r"MaskGIT v1\.0 transformer, but a di4c student"):
        Di4CStudent.from_official(teacher, **tiny_network)
