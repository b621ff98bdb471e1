"""A teacher of a custom data set, from a folder of pictures to a table, as a user makes it."""

import json

import pytest
import torch

import dimo as package
from bench.images.codec import encode_png
from bench.protocol import load_protocol
from dimo.data.tokens import read_cache_info
from dimo.models import digits
from dimo.zoo.loading import load_tokens
from dimo.zoo.teachers import get_teacher

FEW = ("--set", "steps=20", "--set", "batch_size=16", "--set", "checkpoint_every=10")


def write_photos(root, count=200):
    """The first digits, in folders of their own names."""
    images, labels = digits.load()
    for i in range(count):
        path = root / f"digit-{int(labels[i])}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(images[i].permute(1, 2, 0).numpy()))


@pytest.fixture(scope="module")
def world(run, tmp_path_factory):
    """A protocol, a teacher and a student of a folder of pictures."""
    root = tmp_path_factory.mktemp("own")
    write_photos(root / "photos")
    extractor = ("--extractor", "digits-cnn", "--num-images", "195")
    run("protocols", "new", root / "photos", *extractor, "-o", root / "photos.toml", cwd=root)
    source = ("--data", root / "photos", "--tokenizer", "digits")
    scored = ("--protocol", root / "photos.toml", "--out", root / "teacher")
    run("train", *source, "--recipe", "tiny", *FEW, *scored, cwd=root)
    run("distill", "--teacher", root / "teacher", *FEW, "--out", root / "student", cwd=root)
    return root


def test_protocol_of_a_folder(world):
    protocol = load_protocol(world / "photos.toml")
    assert protocol.images.resolution == (8, 8)
    assert (protocol.images.num_images, protocol.images.num_classes) == (200, 10)
    assert (protocol.reference.count, protocol.reference.name) == (200, "photos.npz")
    assert protocol.reference_file == world / "photos.npz"
    assert [metric.name for metric in protocol.metrics][:2] == ["fid", "inception_score"]


def test_trained_teacher_and_its_student_sample(world):
    teacher = package.load(world / "teacher")
    assert teacher.condition_names == tuple(f"digit-{label}" for label in range(10))
    assert teacher.sample(labels=[3, 1], steps=4).shape == (2, 3, 8, 8)
    student = package.load(world / "student")
    assert student.teacher.name == str(world / "teacher")
    assert student.student.temperature_selected_by == "recipe digits, not tuned"
    assert student.sample(labels=[3, 1]).shape == (2, 3, 8, 8)


def test_training_is_watched(world):
    curve = [json.loads(line) for line in (world / "teacher/curve.jsonl").read_text().splitlines()]
    assert curve[0]["step"] == 0
    assert curve[-1]["step"] == 20
    assert curve[-1]["fid"] < curve[0]["fid"]
    assert (world / "teacher/samples/step-0000020.png").is_file()


def test_table_of_teacher_and_student(world, dimo):
    options = ("--steps", "1,4", "--results", "records", "--reference-images", world / "photos")
    dimo("bench", "--teacher", world / "teacher", "--student", world / "student", *options)
    shown = ("--protocol", world / "photos.toml", "--format", "csv")
    table, _ = dimo("report", "--results", "records", *shown)
    assert table.count("\nphotos,") == 5
    assert "Tokenizer reconstruction" in table
    assert "psnr" in table
    assert "MaskGIT (teacher)" in table
    assert "Di[M]O (student)" in table


def test_tokens_serve_methods_that_need_data(world):
    tokens = load_tokens(None, teacher=str(world / "teacher"))
    assert tokens.tokens.shape == (200, 16)
    assert read_cache_info(world / "teacher/tokens.safetensors").images == 200
    assert torch.equal(tokens.labels.bincount(), digits.load()[1][:200].bincount())


def test_finished_and_unfinished_teachers(world, dimo, tmp_path):
    source = ("--data", world / "photos", "--tokenizer", "digits", "--recipe", "tiny", *FEW)
    _, problem = dimo("train", *source, "--out", world / "teacher", code=2)
    assert "is a teacher with protocol" in problem
    source = (*source, "--protocol", world / "photos.toml")
    _, problem = dimo("train", *source, "--out", world / "teacher", code=2)
    assert "holds the finished run" in problem
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "teacher.json").write_text((world / "teacher/teacher.json").read_text())
    _, problem = dimo("distill", "--teacher", unfinished, code=2)
    assert "is not trained, it lacks" in problem
    other = ("--data", world / "photos/digit-1", *source[2:6], "--out", unfinished)
    _, problem = dimo("train", *other, code=2)
    assert "is a teacher with class_names" in problem


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--data", "photos"), "a new teacher takes --data and --tokenizer"),
        (("--data", "photos", "--teacher", "digits"), "train needs one of --data"),
        (("--recipe", "tiny"), "a new teacher takes --data and --tokenizer"),
        (("--data", "photos", "--tokenizer", "vae"), "unknown tokenizer 'vae'"),
        (("--data", "photos", "--tokenizer", "scenes"), "encodes 8 x 8 images into 4 tokens"),
    ],
)
def test_wrong_sources_are_refused(dimo, tmp_path, options, problem):
    write_photos(tmp_path / "photos", 10)
    _, printed = dimo("train", *options, "--out", "run", code=2)
    assert problem in printed
    assert not (tmp_path / "run" / "teacher.safetensors").exists()


def test_one_class_without_folders(dimo, tmp_path):
    write_photos(tmp_path / "photos", 30)
    (tmp_path / "digits").touch()  # a file of that name is not the tokenizer
    options = ("--tokenizer", "digits", "--recipe", "tiny", *FEW, "--out", "run")
    dimo("train", "--data", tmp_path / "photos" / "digit-1", *options)
    assert get_teacher("run").class_names == ("images",)
    assert package.load("run").sample(labels=[0], steps=1).shape == (1, 3, 8, 8)
