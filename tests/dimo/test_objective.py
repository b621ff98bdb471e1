"""Di[M]O against the official trainer's recorded step, given its random draws."""

import pytest
import torch

from dimo.divergence import logit_gradient
from dimo.masking import initialize_tokens, mask_count, mask_ratio, random_mask
from dimo.models.maskgit import MaskGIT
from dimo.objective import DiMOObjective

CASE = "dimo_distillation_step"
CLOSE = {"atol": 1e-5, "rtol": 1e-3}
RUNS = {
    "FKL": ("forward_kl", 0.0),
    "RKL": ("reverse_kl", 0.0),
    "Jeffreys_0.5": ("jeffreys", 0.5),
    "Jeffreys_-0.2": ("jeffreys", -0.2),
}


@pytest.fixture
def networks(golden, tiny_network):
    def load(role: str) -> MaskGIT:
        return MaskGIT.from_official(golden / f"{CASE}.{role}.weights.safetensors", **tiny_network)

    return {role: load(role) for role in ("teacher", "fake", "student")}


@pytest.fixture
def data(golden_arrays):
    return golden_arrays(CASE)


def _objective(name: str = "forward_kl", beta: float = 0.0, smoothing: float = 0.0):
    return DiMOObjective(
        divergence=name,
        beta=beta,
        guidance_scale=2.0,
        label_smoothing=smoothing,
        keep_mask_class=True,
    )


def _student_logits(networks, data, prefix=""):
    noise = data[f"{prefix}perturb_noise"][:, :16]
    initial = data[f"{prefix}x_init"].flatten(1)
    return networks["student"](initial, data["labels"], embedding_noise=0.1, noise=noise)


def test_token_initialization_equals_the_official_one(data):
    ranks = data["init_rand_for_mask"].argsort(dim=1)
    tokens = data["init_random_codes"].flatten(1)
    found = initialize_tokens(tokens, ranks, init_mask_ratio=0.6, mask_token_id=20)
    assert torch.equal(found, data["x_init"].flatten(1))


def test_intermediate_state_equals_the_official_one(data):
    ratio = mask_ratio("arccos", data["remask_u"])
    torch.testing.assert_close(ratio, data["remask_ratio"])
    ranks = data["remask_rand_for_positions"].argsort(dim=1)
    mask = random_mask(ranks, mask_count(ratio, 16))
    assert torch.equal(mask, data["remask"].flatten(1))
    tokens = data["sampled_codes"].flatten(1).masked_fill(mask, 20)
    assert torch.equal(tokens, data["remask_codes"].flatten(1))


@pytest.mark.parametrize("run", RUNS)
def test_student_step_equals_the_official_one(networks, data, run):
    objective = _objective(*RUNS[run])
    logits = _student_logits(networks, data)
    torch.testing.assert_close(logits.detach(), data["student_logits"], **CLOSE)
    found = objective.student_loss(
        logits,
        data["sampled_codes"].flatten(1),
        data["remask"].flatten(1),
        data["labels"],
        teacher=networks["teacher"],
        auxiliary=networks["fake"],
    )
    torch.testing.assert_close(found.logit_gradient, data[f"{run}/grad_after_mask"], **CLOSE)
    found.loss.backward()
    parameters = dict(networks["student"].named_parameters())
    for key in data:
        if key.startswith(f"{run}/param_grad/"):
            name = key.removeprefix(f"{run}/param_grad/")
            torch.testing.assert_close(parameters[name].grad, data[key], **CLOSE)
    norm = sum(p.grad.double().square().sum() for p in parameters.values()).sqrt()
    torch.testing.assert_close(norm, data[f"{run}/grad_norm_all_params"], atol=0, rtol=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_gradient_formula_equals_the_official_one_before_masking(data, run):
    name, beta = RUNS[run]
    found = logit_gradient(
        name,
        teacher_logits=data["teacher_logits_cfg2"],
        auxiliary_logits=data["fake_logits"],
        beta=beta,
    )
    torch.testing.assert_close(found, data[f"{run}/grad_before_mask"], atol=1e-6, rtol=1e-4)


def test_auxiliary_step_equals_the_official_one(networks, data):
    logits = _student_logits(networks, data, "fake/")
    torch.testing.assert_close(logits.detach(), data["fake/student_logits"], **CLOSE)
    found = _objective(smoothing=0.1).auxiliary_loss(
        networks["fake"],
        data["fake/sampled_codes"].flatten(1),
        data["fake/remask"].flatten(1),
        data["labels"],
    )
    torch.testing.assert_close(found.loss.detach(), data["fake_hard/loss"], atol=0, rtol=1e-4)
    found.loss.backward()
    parameters = dict(networks["fake"].named_parameters())
    for name in ("last_layer.2.weight", "tok_emb.weight"):
        expected = data[f"fake_hard/param_grad/{name}"]
        torch.testing.assert_close(parameters[name].grad, expected, **CLOSE)


def test_only_masked_tokens_get_a_gradient(networks, data):
    mask = data["remask"].flatten(1)
    logits = _student_logits(networks, data).detach().requires_grad_()
    found = _objective().student_loss(
        logits,
        data["sampled_codes"].flatten(1),
        mask,
        data["labels"],
        teacher=networks["teacher"],
        auxiliary=networks["fake"],
    )
    found.loss.backward()
    assert logits.grad[~mask].abs().max() == 0
    assert (logits.grad[mask].abs().sum(-1) > 0).all()
    torch.testing.assert_close(logits.grad, found.logit_gradient / len(logits))


def test_the_student_cannot_emit_the_mask_token(networks, tiny_network):
    objective = DiMOObjective()
    draws = objective.draw(networks["student"], 0, torch.arange(64), "student")
    logits, tokens = objective.generate(networks["student"], draws)
    assert logits.shape[-1] == tiny_network["codebook_size"]
    assert int(tokens.max()) < tiny_network["codebook_size"]


def test_equal_teacher_and_auxiliary_leave_the_student_alone(networks, data):
    found = DiMOObjective(divergence="jeffreys", beta=0.3).student_loss(
        _student_logits(networks, data)[..., :20],
        data["sampled_codes"].flatten(1),
        data["remask"].flatten(1),
        data["labels"],
        teacher=networks["teacher"],
        auxiliary=networks["teacher"],
    )
    assert found.logit_gradient.abs().max() == 0
