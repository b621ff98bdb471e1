"""Dropout on a CPU, and attention with it."""

import pytest
import torch

from dimo.models.layers import Dropout, attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_its_share_scaled_and_passes_the_same_gradient(dtype):
    torch.manual_seed(0)
    x = torch.full((300, 401), 3.0, dtype=dtype, requires_grad=True)  # not a multiple of four
    y = Dropout(0.1)(x)
    kept = y != 0
    assert (~kept).double().mean().item() == pytest.approx(0.1, abs=0.004)  # 4.6 standard errors
    torch.testing.assert_close(y[kept], (x / 0.9)[kept])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept * torch.tensor(1 / 0.9, dtype=dtype))
    again = Dropout(0.1)(x) != 0
    agreement = (again == kept).double().mean().item()  # of independent draws
    assert agreement == pytest.approx(0.82, abs=0.006)


def test_dropout_drops_nothing_in_eval_mode_or_at_rate_zero():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_dropout_is_attention_on_average(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 65, 8, dtype=dtype) for _ in range(3))
    draws = torch.stack([attend(q, k, v, dropout=0.3).double() for _ in range(400)])
    weights = (q.double() @ k.double().transpose(-1, -2) / 8**0.5).softmax(-1)
    expected = weights @ v.double()
    error = (draws.mean(0) - expected).abs().max().item()
    assert 0 < error < 5 * draws.std(0).max().item() / 20
    torch.testing.assert_close(attend(q, k, v).double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("length", [64, 65])
def test_gradients_through_bfloat16_attention_are_those_of_float32(length):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 16, requires_grad=True) for _ in range(3)]
    exact = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    found = torch.autograd.grad(attend(*halves).square().sum(), halves)
    for a, b in zip(found, exact, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()
