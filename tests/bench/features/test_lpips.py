"""LPIPS: values that the package lpips 0.1.4 gave for random weights; its two files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.features.lpips import LPIPS, load_lpips
from bench.metrics.base import bootstrap_interval
from bench.metrics.reconstruction import Reconstruction, compare, score_lpips
from bench.metrics.scores import load_comparisons
from dimo.errors import DimoError
from dimo.util.files import sha256_file
from dimo.weights.catalog import OFFICIAL

CONVOLUTIONS = {  # key of AlexNet's file -> shape of the weight
    "features.0": (64, 3, 11, 11),
    "features.3": (192, 64, 5, 5),
    "features.6": (384, 192, 3, 3),
    "features.8": (256, 384, 3, 3),
    "features.10": (256, 256, 3, 3),
}
# What `lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, pretrained=False).double()` gave with
# `weights()` in it, for the levels of `pairs` divided by 127.5, less 1 (torch 2.15, CPU, one
# thread); its parts `net.sliceN` hold AlexNet's layers under their own numbers.
PUBLISHED = {
    (32, 32): [0.1445905047256974, 0.3867696931848054, 0.5473039995002598],
    (45, 83): [0.13774449253157672, 0.4130015793905195, 0.6006256859193083],
}


def weights():
    """Both files' tensors, float32, so wide that no stage fades; those of channels from 0 to 1."""
    rng = np.random.RandomState(0)
    alexnet, linear = {}, {}
    for stage, (name, shape) in enumerate(CONVOLUTIONS.items()):
        spread = np.sqrt(2 / np.prod(shape[1:]))
        alexnet[f"{name}.weight"] = spread * rng.standard_normal(shape)
        alexnet[f"{name}.bias"] = 0.1 * rng.standard_normal(shape[0])
        linear[f"lin{stage}.model.1.weight"] = rng.random_sample((1, shape[0], 1, 1))
    return [{k: torch.tensor(v).float() for k, v in part.items()} for part in (alexnet, linear)]


def pairs(size):
    """Three images, uint8 `[3, 3, H, W]`, and the same with more and more noise."""
    rng = np.random.RandomState(1)
    first = rng.randint(0, 256, (3, 3, *size))
    noise = rng.randint(-60, 61, first.shape) * np.arange(1, 4).reshape(3, 1, 1, 1)
    second = np.clip(first + noise, 0, 255)
    return [torch.tensor(images, dtype=torch.uint8) for images in (first, second)]


@pytest.fixture(scope="module")
def parts():
    return weights()


@pytest.fixture
def folder(parts, tmp_path, monkeypatch):
    """Both files with random weights, as if these were the published ones."""
    alexnet = {**parts[0], "classifier.1.weight": torch.zeros(2, 3)}
    for name, content in (("alexnet", alexnet), ("lpips", parts[1])):
        path = tmp_path / OFFICIAL[name].filename
        torch.save(content, path)
        row = replace(OFFICIAL[name], sha256=sha256_file(path))
        monkeypatch.setitem(OFFICIAL, name, row)
    return tmp_path


def scored(original, decoded, folder):
    functions = load_comparisons(["fid", "lpips"], folder)
    values = {name: compare(f, original=original, decoded=decoded) for name, f in functions.items()}
    return score_lpips(Reconstruction(torch.zeros(3, 1, dtype=torch.int64), 1, values))


def test_it_equals_the_package(folder):
    for size, expected in PUBLISHED.items():
        found = scored(*pairs(size), folder)
        np.testing.assert_allclose(found.contributions, expected, rtol=0, atol=1e-6)
        assert found.value == pytest.approx(np.mean(expected), abs=1e-6)
        interval = bootstrap_interval(
            found.contributions, point=found.value, n_bootstrap=99, seed=0
        )
        assert 0 < interval.low < found.value < interval.high
    original, _ = pairs((32, 32))
    assert scored(original, original, folder).value == 0


def test_files_that_are_missing_or_others(folder, parts):
    (folder / "alex.pth").rename(folder / "kept")
    with pytest.raises(DimoError, match=r"no alex\.pth .*fetch it with: dimo weights fetch lpips"):
        load_lpips(folder)
    torch.save({**parts[1], "lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, folder / "alex.pth")
    with pytest.raises(DimoError, match=r"alex\.pth has sha256 .*: dimo weights fetch lpips$"):
        load_lpips(folder)
    (folder / "kept").replace(folder / "alex.pth")
    (folder / "alexnet-owt-7be5be79.pth").unlink()
    with pytest.raises(DimoError, match=r"AlexNet of LPIPS.*: dimo weights fetch alexnet"):
        load_lpips(folder)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 40, 31)])
def test_images_that_have_none(shape):
    levels = torch.zeros(shape)
    with pytest.raises(DimoError, match=r"have no LPIPS; allowed: 3 channels, 32 x 32 pixels"):
        LPIPS()(levels, levels)
