"""Sets of real digits in files, and a protocol of forty of them."""

import json

import pytest
import torch
from PIL import Image

from dimo.models import digits

PROTOCOL = """
format = 1
name = "tiny"
version = 1
title = "Forty digits"
paper = "none"
[images]
resolution = [8, 8]
channels = 3
num_images = 40
labels = "balanced"
num_classes = 10
uint8 = "round"
[seeds]
report = 1
select = 2
n_select = 10
[extractor]
name = "digits-cnn"
sha256 = "0eadf646999892aae206189b18cd53ecef8c14cd23e8e7f7cc5bdd1a2861eecd"
[reference]
name = "digits-all"
sha256 = "8a34b04f4383d51c994980439df95523fd6091a40d6c0c0e37f4cc5e090dbad7"
count = 1797
[[metrics]]
name = "fid"
higher_is_better = false
[[metrics]]
name = "inception_score"
higher_is_better = true
splits = 2
seed = 2020
[[metrics]]
name = "precision"
higher_is_better = true
k = 3
[[metrics]]
name = "recall"
higher_is_better = true
k = 3
[[metrics]]
name = "density"
higher_is_better = true
k = 3
[[metrics]]
name = "coverage"
higher_is_better = true
k = 3
[[metrics]]
name = "kid"
higher_is_better = false
subsets = 10
subset_size = 30
seed = 2020
[[metrics]]
name = "class_accuracy"
higher_is_better = true
[uncertainty]
n_bootstrap = 50
seed = 0
level = 0.95
"""
ANY_REFERENCE = PROTOCOL.replace(
    'sha256 = "8a34b04f4383d51c994980439df95523fd6091a40d6c0c0e37f4cc5e090dbad7"\ncount = 1797',
    'sha256 = "any"\ncount = 100',
).replace('"digits-all"', '"my-digits"')


@pytest.fixture(scope="session")
def tiny_protocol():
    """Text of the protocol `tiny`, which the commands find as tiny.toml."""
    return PROTOCOL


@pytest.fixture(scope="session")
def any_reference():
    """The same, with a reference that is given."""
    return ANY_REFERENCE


@pytest.fixture
def dimo(dimo, tmp_path):
    """In a folder with the protocol `tiny`."""
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    return dimo


@pytest.fixture(scope="session")
def real_digits():
    """`real_digits(count, start=0)` -> uint8 [count, 8, 8, 3], labels.

    Real images, count // 10 of each class in cyclic order.
    """

    def read(count, start=0):
        images, labels = digits.load()
        rows = [torch.where(labels == c)[0][start : start + count // 10] for c in range(10)]
        order = torch.stack(rows, dim=1).flatten()
        return images[order].permute(0, 2, 3, 1).numpy(), labels[order].numpy()

    return read


@pytest.fixture(scope="session")
def write_folder():
    """`write_folder(folder, pixels, labels)`: a file for each image, with its label in its name."""

    def write(folder, pixels, labels):
        folder.mkdir()
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            Image.fromarray(image).save(folder / f"{i:06d}_{label}.png")
        return folder

    return write


@pytest.fixture
def samples(real_digits, write_folder, tmp_path):
    """A folder with forty images."""
    return write_folder(tmp_path / "samples", *real_digits(40))


@pytest.fixture
def eval_json(dimo):
    """`eval_json(path, ...)` -> the record of `dimo eval`, value of each metric."""

    def call(*arguments):
        out, _ = dimo("eval", *arguments, "--protocol", "tiny.toml", "--json")
        record = json.loads(out)
        return record, {name: found["value"] for name, found in record["metrics"].items()}

    return call
