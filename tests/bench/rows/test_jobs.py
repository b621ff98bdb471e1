"""From names to rows to networks: settings and files are read once, networks last."""

import shutil

import pytest
import torch

from bench.rows.rows import load_planned, plan_jobs, plan_models
from bench.rows.settings import Choice, sample_images
from dimo.errors import DimoError
from dimo.methods.di4c.network import Di4CStudent
from dimo.weights.catalog import ASSETS

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    """A run folder of one's own."""
    return shutil.copytree(ASSETS / "digits-dimo", tmp_path / "run")


def test_the_official_file_of_di4c_is_a_baseline(small_maskgit, tiny_network, tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "maskgit-di4c-d.pth"
    content = {"iter": 3, "global_epoch": 1, "optimizer_state_dict": {}}
    torch.save({**content, "model_state_dict": Di4CStudent(**tiny_network).state_dict()}, file)
    teacher, student = load_planned(
        plan_jobs("maskgit", [f"di4c-d={file}@4"], [2], weights=small_maskgit),
        device=CPU,
        weights=small_maskgit,
    )
    assert (teacher.section, teacher.settings.num_steps) == ("Teacher", 2)
    assert (student.section, student.name) == ("Distill.", "di4c-d")
    assert student.settings.num_steps == 4
    index = torch.arange(3)
    batch = sample_images(
        student.loaded, student.settings, labels=index, seed=0, index=index, uint8="round"
    )
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.nfe == 7  # guided from the second step on


def test_settings_of_a_run_are_read_once(run):
    planned = plan_jobs("digits", [f"mine={run}@1,4"], [], choice=Choice(precision="bfloat16"))
    (run / "config.json").unlink()
    jobs = load_planned(planned, device=CPU)
    assert [(job.name, job.settings.num_steps) for job in jobs] == [("mine", 1), ("mine", 4)]
    assert jobs[0].loaded is jobs[1].loaded
    assert jobs[0].loaded.precision == "bfloat16"


def test_a_plan_needs_no_weights(run):
    (run / "student.safetensors").write_bytes(b"no network")
    planned = plan_models(["digits@2", f"{run}"], [1, 4])
    assert [(entry.name, [row.num_steps for row in entry.rows]) for entry in planned] == [
        (None, [2]),
        (None, [1]),
    ]
    with pytest.raises(DimoError, match="cannot read weights"):
        load_planned(planned, device=CPU)


def test_one_step_students_have_step_counts_of_their_own(run):
    planned = plan_jobs("digits", [str(run)], [2, 8], student_steps=[1, 3])
    assert [[row.num_steps for row in entry.rows] for entry in planned] == [[2, 8], [1, 3]]
    with pytest.raises(DimoError, match=r"has no step counts; name them, e\.g\. .*run@2,4"):
        plan_jobs("digits", [str(run)], [2], student_steps=[])


def test_a_named_teacher_keeps_the_names_of_other_samplers():
    planned = plan_models(["ours=digits@2"], [1], choice=Choice(("confidence", "halton")))
    jobs = load_planned(planned, device=CPU)
    assert [(job.section, job.name) for job in jobs] == [
        ("Teacher", "ours"),
        ("Sampler", "Halton order"),
    ]
