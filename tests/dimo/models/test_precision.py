"""Networks made ready for sampling: the same function, the same in any batch."""

import copy

import pytest
import torch

from dimo.errors import DimoError
from dimo.methods.di4c.network import Di4CStudent
from dimo.models import cpu as precision_module
from dimo.models.cpu import prepare_for_inference
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS, teacher_samplers
from dimo.samplers.student import sample_one_step

SMALL = {"hidden_dim": 96, "codebook_size": 50, "depth": 3, "heads": 2, "mlp_dim": 160, "nclass": 6}
BUILD = {
    "maskgit": lambda: MaskGIT(img_size=128, **SMALL),
    "di4c": lambda: Di4CStudent(img_size=128, **SMALL),
    "halton": lambda: HaltonMaskGIT(input_size=8, **SMALL),
}


def _network(name):
    torch.manual_seed(1)
    model = BUILD[name]().eval()
    for parameter in model.parameters():  # so that attention and every block matter
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def _logits(model, count=4):
    torch.manual_seed(2)
    tokens, labels = torch.randint(0, 51, (64, 64))[:count], torch.arange(64)[:count] % 6
    with torch.inference_mode():
        return model(tokens, labels, drop=labels == 2)


# relative error of the logits: of another order of summation, and of 8 bits of mantissa
@pytest.mark.parametrize(
    ("precision", "low", "high"), [("float32", 0, 1e-5), ("bfloat16", 1e-4, 0.06)]
)
@pytest.mark.parametrize("name", BUILD)
def test_the_function_stays_the_same(name, precision, low, high):
    model = _network(name)
    expected = _logits(model)
    found = _logits(prepare_for_inference(model, precision))
    assert found.dtype == torch.float32
    error = float((found - expected).abs().max() / expected.abs().max())
    assert low <= error < high


def test_a_cpu_without_bfloat16_multiplies_the_rounded_numbers(monkeypatch):
    """Inputs and weights are rounded, their product is exact up to float32, and rounded once."""
    monkeypatch.setattr(precision_module, "has_bfloat16", lambda: False)
    torch.manual_seed(3)
    x, layer = torch.randn(64, 96), torch.nn.Linear(96, 50)
    product = precision_module._Product(layer.weight, layer.bias, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = product(x)
        rounded = [t.bfloat16().double() for t in (x, layer.weight, layer.bias)]
        exact = torch.nn.functional.linear(*rounded).bfloat16()
    assert found.dtype == torch.bfloat16
    assert float((found == exact).double().mean()) > 0.99


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BUILD)
def test_logits_do_not_depend_on_the_batch(name, precision):
    model = prepare_for_inference(_network(name), precision)
    whole = _logits(model, 64)
    for size in (1, 7):
        assert torch.equal(_logits(model, size), whole[:size])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("sampler", "precision"),
    [("confidence", "float32"), *((name, "bfloat16") for name in teacher_samplers())],
)
def test_images_do_not_depend_on_the_batch(sampler, precision):
    model = prepare_for_inference(_network("maskgit"), precision)
    index = torch.arange(24)
    settings = {"num_steps": 5, "guidance_scale": 2.0}

    def tokens(part):
        return SAMPLERS[sampler](model, part % 6, ImageNoise(3, part), **settings).tokens

    with torch.inference_mode():
        whole = tokens(index)
        for size in (1, 7):
            assert torch.equal(torch.cat([tokens(part) for part in index.split(size)]), whole)


def test_a_student_is_sampled_in_bfloat16_too():
    model = _network("maskgit")
    index = torch.arange(32)
    init = {"init_mask_ratio": 0.6, "embedding_noise": 0.1}
    found = []
    with torch.inference_mode():
        for network in (model, prepare_for_inference(copy.deepcopy(model), "bfloat16")):
            samples = sample_one_step(network, index % 6, ImageNoise(0, index), **init)
            found.append(samples.tokens)
    agreement = float((found[0] == found[1]).double().mean())
    assert agreement > 0.9


def test_an_unknown_precision_is_refused():
    with pytest.raises(DimoError, match="unknown precision 'float16'"):
        prepare_for_inference(_network("maskgit"), "float16")
