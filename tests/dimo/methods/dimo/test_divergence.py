"""Divergences: their gradients against autograd, and their closed forms."""

import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.methods.dimo.divergence import (
    DIVERGENCES,
    F_DIVERGENCES,
    certainty,
    divergence,
    logit_gradient,
)

CASES = [("forward_kl", 0.0), ("reverse_kl", 0.0)] + [
    ("jeffreys", beta) for beta in (-0.3, 0.0, 0.3, 0.5, 1.0)
]
CASES += [(name, 0.0) for name in F_DIVERGENCES]


def _logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(4, 5, 17, generator=generator, dtype=torch.float64)


def test_every_divergence_is_tested():
    assert {name for name, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize(("name", "beta"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_equals_autograd(name, beta, dtype):
    teacher, auxiliary = _logits(0).to(dtype), _logits(1).to(dtype).requires_grad_()
    divergence(name, teacher_logits=teacher, auxiliary_logits=auxiliary, beta=beta).sum().backward()
    found = logit_gradient(
        name, teacher_logits=teacher, auxiliary_logits=auxiliary.detach(), beta=beta
    )
    tolerance = 1e-6 if dtype is torch.float32 else 1e-13
    # pearson alone has gradients far above 1
    assert ((found - auxiliary.grad).abs() <= tolerance * auxiliary.grad.abs().clamp_min(1)).all()


# D_f(p || q) = sum q f(p / q)
CONVEX = {
    "js": lambda t: (t * t.log() - (1 + t) * ((1 + t) / 2).log()) / 2,
    "hellinger": lambda t: (1 - t.sqrt()).square() / 2,
    "pearson": lambda t: (t - 1).square(),
    "forward_kl": lambda t: t * t.log(),
    "reverse_kl": lambda t: -t.log(),
}


@pytest.mark.parametrize("name", CONVEX)
def test_values_are_those_of_the_convex_function(name):
    teacher, auxiliary = _logits(0, 1.5), _logits(1, 1.5)
    p, q = teacher.softmax(-1), auxiliary.softmax(-1)
    found = divergence(name, teacher_logits=teacher, auxiliary_logits=auxiliary)
    torch.testing.assert_close(found, (q * CONVEX[name](p / q)).sum(-1))


@pytest.mark.parametrize("name", ["js", "hellinger"])
def test_bounded_divergences_stay_finite_on_peaked_logits(name):
    teacher, auxiliary = _logits(0, 100.0).float(), _logits(1, 100.0).float()
    inputs = {"teacher_logits": teacher, "auxiliary_logits": auxiliary}
    assert divergence(name, **inputs).max() <= 1
    assert logit_gradient(name, **inputs).abs().max() <= 1


def test_forward_is_the_mode_covering_one():
    teacher, auxiliary = _logits(0), _logits(1)
    p, q = teacher.softmax(-1), auxiliary.softmax(-1)
    forward = divergence("forward_kl", teacher_logits=teacher, auxiliary_logits=auxiliary)
    reverse = divergence("reverse_kl", teacher_logits=teacher, auxiliary_logits=auxiliary)
    torch.testing.assert_close(forward, (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(reverse, (q * (q / p).log()).sum(-1))
    mixed = divergence("jeffreys", teacher_logits=teacher, auxiliary_logits=auxiliary, beta=0.25)
    torch.testing.assert_close(mixed, 0.75 * forward + 0.25 * reverse)


def test_gradient_is_zero_at_equality_and_sums_to_zero():
    teacher, auxiliary = _logits(0), _logits(1)
    for name, beta in CASES:
        same = logit_gradient(name, teacher_logits=teacher, auxiliary_logits=teacher, beta=beta)
        other = logit_gradient(name, teacher_logits=teacher, auxiliary_logits=auxiliary, beta=beta)
        assert same.abs().max() < 1e-15
        assert other.sum(-1).abs().max() < 1e-12 * other.abs().max().clamp_min(1)


def test_half_precision_logits_are_widened():
    teacher, auxiliary = _logits(0).bfloat16(), _logits(1).bfloat16()
    found = logit_gradient("jeffreys", teacher_logits=teacher, auxiliary_logits=auxiliary, beta=0.5)
    assert found.dtype == torch.float32


def test_unknown_name_is_one_clear_error():
    with pytest.raises(DimoError, match="did you mean 'forward_kl'"):
        logit_gradient("forward_k", teacher_logits=_logits(0), auxiliary_logits=_logits(1))


def test_certainty_of_known_distributions():
    even, settled = torch.zeros(2, 3, 16), 1e4 * torch.eye(16)[None]
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    for given, temperature, entropy, top in [
        (even, 0.5, math.log(16), 1 / 16),
        (settled, 1, 0.0, 1.0),
        (logits, 1, 1.5 * math.log(2), 0.5),
        (logits, 0.5, 2 / 3 * math.log(1.5) + 1 / 3 * math.log(6), 2 / 3),  # squared: 4 : 1 : 1
    ]:
        found = certainty(given, temperature)
        assert found["token_entropy"].item() == pytest.approx(entropy, abs=1e-6)
        assert found["top_1"].item() == pytest.approx(top, abs=1e-6)
