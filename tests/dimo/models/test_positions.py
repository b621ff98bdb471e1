"""Logits asked for at some positions only: the ones that the whole grid has there."""

import pytest
import torch

from dimo.methods.di4c.network import Di4CStudent
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.rng import ImageNoise

SMALL = {"hidden_dim": 64, "codebook_size": 50, "depth": 3, "heads": 4, "mlp_dim": 128, "nclass": 6}


def _networks():
    torch.manual_seed(0)
    halton = HaltonMaskGIT(input_size=8, **SMALL)
    for parameter in halton.parameters():  # adaLN-zero would make every block the identity
        torch.nn.init.normal_(parameter, std=0.1)
    return {
        "maskgit": MaskGIT(img_size=128, **SMALL),
        "di4c": Di4CStudent(img_size=128, **SMALL),
        "halton": halton,
    }


@pytest.mark.parametrize("name", ["maskgit", "di4c", "halton"])
@torch.inference_mode()
def test_logits_at_positions_are_those_of_the_whole_grid(name):
    model = _networks()[name].eval()
    assert model.takes_positions
    inputs = {"z": torch.rand(5)} if name == "di4c" else {}
    tokens, labels = torch.randint(0, 51, (5, 64)), torch.arange(5)
    drop = labels % 2 == 0
    positions = torch.rand(5, 64).argsort(1)[:, :16]
    whole = model(tokens, labels, drop=drop, **inputs)
    some = model(tokens, labels, drop=drop, positions=positions, **inputs)
    expected = torch.stack([whole[i, positions[i]] for i in range(5)])
    torch.testing.assert_close(some, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError):  # the order of the positions counts
        torch.testing.assert_close(some, expected.flip(1), atol=1e-5, rtol=1e-5)


def test_noise_at_positions_is_that_of_the_whole_grid():
    noise = ImageNoise(7, torch.tensor([3, 11, 4]))
    positions = torch.rand(3, 20).argsort(1)[:, :6]
    whole = noise.gumbel("stream", (20, 9))
    expected = torch.stack([whole[i, positions[i]] for i in range(3)])
    assert torch.equal(noise.gumbel_at("stream", positions, 9), expected)
