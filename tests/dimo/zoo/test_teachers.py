"""The tables of teachers and published students, and how their files are found and loaded."""

import dataclasses
from functools import partial

import pytest
import torch

from bench.rows.rows import jobs_of
from bench.rows.settings import SamplerSettings, sample_tokens
from dimo.engine.distributed import Runtime
from dimo.engine.runs import distill
from dimo.errors import DimoError
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.models.vqgan import LlamaGenVQ
from dimo.weights.catalog import ASSETS, OFFICIAL
from dimo.zoo.loading import load, load_student, load_teacher, make_network
from dimo.zoo.students import PUBLISHED_STUDENTS, StudentConfig, find_student, save_student
from dimo.zoo.teachers import TEACHERS, get_teacher

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_row_agrees_with_its_network(name):
    row = TEACHERS[name]
    assert row.name == name
    with torch.device("meta"):
        network = make_network(row)
    assert network.num_tokens == row.num_tokens
    assert row.num_classes == (0 if row.text else network.num_classes)
    for weights in row.weights.values():
        assert (weights in OFFICIAL) == (row.bundled is None)
        assert row.bundled is None or (ASSETS / weights).is_file()
    own = row.defaults
    SamplerSettings(
        own.sampler,
        mask_schedule=own.mask_schedule,
        guidance_scale=own.guidance_scale,
        choice_temperature=own.choice_temperature,
        final_temperature=own.final_temperature,
        random_start=own.random_start,
    )


def test_the_settings_of_the_sources():
    """Guidance in papers' w-form is one less than the scale."""
    scales = {name: row.defaults.guidance_scale for name, row in TEACHERS.items()}
    assert scales == {
        "digits": 1.0,
        "scenes": 3.0,
        "maskgit": 4.0,
        "maskgit-512": 3.8,
        "halton-tiny": 2.5,
        "halton-small": 2.0,
        "halton-base": 1.7,
        "halton-large": 1.5,
        "meissonic": 9.0,
    }
    maskgit, halton = TEACHERS["maskgit"], TEACHERS["halton-base"]
    assert (maskgit.label_smoothing, halton.label_smoothing) == (0.1, 0.0)
    assert 1 / halton.defaults.final_temperature == pytest.approx(1.2)
    assert (maskgit.title, halton.title) == ("MaskGIT", "Halton-MaskGIT-base")


def test_classes_have_names():
    assert get_teacher("digits").class_names[7] == "7"
    names = get_teacher("maskgit").class_names
    assert len(names) == 1000
    assert (names[1], names[207]) == ("goldfish", "golden retriever")


def test_official_files_make_a_teacher(small_maskgit):
    loaded = load("maskgit", device=CPU, weights=small_maskgit)
    tokens = torch.full((2, 16), loaded.model.mask_token_id)
    with torch.inference_mode():
        assert loaded.model(tokens, torch.tensor([0, 4])).shape == (2, 16, 21)
        assert loaded.tokenizer.decode(tokens - 20).shape == (2, 3, 64, 64)
    assert (loaded.name, loaded.student, loaded.precision) == ("MaskGIT", None, "float32")


def test_the_published_student(small_maskgit):
    loaded = load("dimo-maskgit", device=CPU, weights=small_maskgit)
    assert loaded.name == "Di[M]O (dimo-maskgit)"
    student = loaded.student
    assert student is PUBLISHED_STUDENTS["dimo-maskgit"]
    assert (student.init_mask_ratio, student.embedding_noise) == (0.6, 0.1)
    assert student.temperature == 7
    assert student.training_seconds is student.images_seen is student.teacher_sha256 is None


@pytest.mark.parametrize("name", ["maskgit", "maskgit-512", "halton-tiny", "dimo-maskgit"])
def test_missing_official_files_are_named(name, tmp_path):
    with pytest.raises(DimoError, match=r"no .*\.(pth|bin|ckpt|pt) .*--weights"):
        load(name, device=CPU, weights=tmp_path)


def test_files_are_looked_for_where_they_are_fetched_to(small_maskgit, monkeypatch):
    monkeypatch.setenv("DIMO_WEIGHTS", str(small_maskgit))
    assert load("maskgit", device=CPU).teacher.name == "maskgit"


def test_an_unknown_precision_is_refused():
    with pytest.raises(DimoError, match="unknown precision 'float8'; allowed: bfloat16, float32"):
        load_teacher("digits", device=CPU, precision="float8")


def test_a_students_config_survives_its_file(tmp_path):
    config = StudentConfig("digits", 0.6, 0.1, 1.0, "default", "mine")
    save_student(tmp_path, load_teacher("digits", device=CPU).model.state_dict(), config)
    assert find_student(tmp_path).config == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ('{"teacher": "digits"}', "missing key 'init_mask_ratio'"),
        ('{"teachr": "digits"}', "did you mean 'teacher'"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path, text, said):
    (tmp_path / "student.safetensors").touch()
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DimoError, match="distil the run again") as caught:
        load_student(tmp_path, device=CPU)
    assert said in str(caught.value)


def test_a_teacher_of_the_other_architecture_is_distilled_and_sampled(
    golden, golden_file, golden_constructor, tmp_path, monkeypatch
):
    network = golden_constructor["halton_transformer"]
    tokenizer = golden_constructor["halton_llamagen_vq"]
    small = dataclasses.replace(
        TEACHERS["halton-tiny"],
        network=network,
        tokenizer=partial(LlamaGenVQ.from_official, **tokenizer),
        image_size=64,
        num_tokens=network["input_size"] ** 2,
        num_classes=network["nclass"],
    )
    monkeypatch.setitem(TEACHERS, "halton-tiny", small)
    weights = tmp_path / "weights"
    weights.mkdir()
    for name, source in (
        ("ImageNet_256_tiny", golden / "halton_transformer.weights.safetensors"),
        ("vq_ds16_c2i", golden_file("halton_llamagen_vq.weights.safetensors")),
    ):
        (weights / f"{name}.safetensors").write_bytes(source.read_bytes())
    recipe = DiMORecipe(
        teacher="halton-tiny",
        steps=2,
        batch_size=4,
        learning_rate=1e-4,
        auxiliary_learning_rate=1e-4,
    )
    distill(recipe, tmp_path / "run", recipe_name="mine", runtime=Runtime(CPU), weights=weights)
    teacher = load("halton-tiny", device=CPU, weights=weights)
    student = load(str(tmp_path / "run"), device=CPU, weights=weights)
    assert student.student.teacher_sha256 == teacher.weights_sha256
    index = torch.arange(3)
    for job in jobs_of(teacher, [4]) + jobs_of(student, [], student_steps=[1, 4]):
        found = sample_tokens(job.loaded, job.settings, labels=index, seed=0, index=index)
        assert found.nfe == {"halton": 8, "one_step": 1, "few_step": 4}[job.settings.sampler]
        assert found.tokens.max() < network["codebook_size"]
