"""Each resizer is bit-equal to the package whose pipeline it stands for."""

import cleanfid.resize
import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from bench.features import resize

SIZES = [(8, 8), (32, 32), (256, 256), (299, 299), (512, 512), (40, 300), (333, 111)]


def _by_cleanfid(images, mode):
    resizer = cleanfid.resize.build_resizer(mode)
    resized = [resizer(image.permute(1, 2, 0).numpy()) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def _equal(found, expected):
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.fixture(params=SIZES, ids="{0[0]}x{0[1]}".format)
def images(request, make_images):
    return make_images(3, *request.param)


def test_tf1_bilinear_is_torch_fidelitys(images):
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    _equal(resize.tf1_bilinear(images, 299), expected)


def test_tf1_bilinear_by_hand():
    """Two pixels become four: sources at 0, 0.5, 1 and 1.5, which stays inside the image."""
    images = torch.tensor([[10, 30], [50, 90]], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert resize.tf1_bilinear(images, 4)[0, 2].tolist() == [
        [10, 20, 30, 30],
        [30, 45, 60, 60],
        [50, 70, 90, 90],
        [50, 70, 90, 90],
    ]


def test_pil_bicubic_is_cleanfids_clean(images):
    _equal(resize.pil_bicubic(images, 299), _by_cleanfid(images, "clean"))


def test_pil_bicubic_floor_cuts_off_like_haltons(images):
    expected = _by_cleanfid(images, "clean").to(torch.uint8).float()
    _equal(resize.pil_bicubic_floor(images, 299), expected)


def test_torch_bilinear_is_cleanfids_legacy_pytorch(images):
    _equal(resize.torch_bilinear(images, 299), _by_cleanfid(images, "legacy_pytorch"))


def test_pil_bicubic_bytes_is_pillows_on_rgb(images):
    expected = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), 3))
        for image in images
    ]
    expected = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2).float()
    _equal(resize.pil_bicubic_bytes(images, 224), expected)


def test_torch_bicubic_neither_clips_nor_smooths(make_images):
    black_and_white = (torch.arange(64) % 16 < 8).byte().mul(255).expand(1, 3, 64, 64)
    larger = resize.torch_bicubic(black_and_white, 336)
    assert larger.min() < -5
    assert larger.max() > 260
    images = make_images(1, 1008, 1008)  # a third: each pixel is one of the source's
    assert torch.allclose(resize.torch_bicubic(images, 336), images[..., 1::3, 1::3].float())


def test_torch_bicubic_antialias_is_pillows_without_clipping(make_images):
    images = (make_images(2, 70, 50) > 127).byte() * 255
    bands = [Image.fromarray(band.numpy()).convert("F") for band in images.flatten(0, 1)]
    for side in (32, 60):
        found = resize.torch_bicubic_antialias(images, side)
        sides = (side, side)
        expected = [np.asarray(band.resize(sides, Image.Resampling.BICUBIC)) for band in bands]
        assert (found.flatten(0, 1) - torch.from_numpy(np.stack(expected))).abs().max() < 0.01
    assert found.min() < 0
    assert found.max() > 255
    _equal(resize.torch_bicubic_antialias(images[..., :50, :], 50), images[..., :50, :].float())
