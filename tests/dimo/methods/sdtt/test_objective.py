"""SDTT's targets: the prediction at the step that reveals a token, at the sampler's own counts."""

import pytest
import torch
from torch import nn

from dimo.masking import tokens_per_step
from dimo.methods.masked_data import log_probabilities
from dimo.methods.sdtt.objective import SDTTObjective
from dimo.models.maskgit import MaskGIT


@pytest.fixture
def teacher(tiny_network):
    torch.manual_seed(0)
    network = MaskGIT(**tiny_network)
    nn.init.normal_(network.bias)
    return network.eval().requires_grad_(False)


def drawn(objective, rows=60):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(20, (30, 16), generator=generator)
    return objective.draw(tokens, torch.arange(30) % 5, 0, torch.arange(rows))


def test_states_are_met_at_the_samplers_counts():
    draws = drawn(SDTTObjective(num_steps=8))
    counts = tokens_per_step("arccos", 8, 16)
    left = [16 - sum(counts[: 2 * step]) for step in range(4)]
    assert draws.mask.sum(1).tolist() == [left[step] for step in draws.step]
    assert set(draws.step.tolist()) == {0, 1, 2, 3}


def test_targets_are_of_the_first_step_or_the_second(teacher):
    objective = SDTTObjective(num_steps=8)
    draws = drawn(objective)
    target = objective.target(draws, teacher=teacher)
    tokens = draws.data.tokens.masked_fill(draws.mask, teacher.mask_token_id)
    first = log_probabilities(teacher, tokens, draws.data.labels, draws.data.drop)
    is_first = (target == first).all(-1) & draws.mask  # revealed by the first of the two steps
    counts = torch.tensor(tokens_per_step("arccos", 8, 16))
    assert torch.equal(is_first.sum(1), counts[2 * draws.step])
    torch.testing.assert_close(target.exp().sum(-1), torch.ones(60, 16))


def test_the_loss_is_zero_for_a_student_that_hits_the_target(teacher, tiny_network):
    objective = SDTTObjective(num_steps=16)
    draws = drawn(objective)
    tokens = draws.data.tokens.masked_fill(draws.mask, teacher.mask_token_id)
    own = log_probabilities(teacher, tokens, draws.data.labels, draws.data.drop)
    assert objective.loss(teacher, draws, own).abs() < 1e-6
    assert objective.loss(teacher, draws, objective.target(draws, teacher=teacher)) > 1e-5
    torch.manual_seed(1)
    other = MaskGIT(**tiny_network).eval()
    found = log_probabilities(other, tokens, draws.data.labels, draws.data.drop)
    wanted = (own.exp() * (own - found)).sum(-1)[draws.mask].mean()
    torch.testing.assert_close(objective.loss(other, draws, own), wanted)
