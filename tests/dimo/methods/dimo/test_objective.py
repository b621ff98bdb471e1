"""Di[M]O against the official trainer's recorded steps, given its random draws."""

import dataclasses
import json

import pytest
import torch

from dimo.errors import DimoError
from dimo.masking import initialize_tokens, mask_count, mask_ratio, random_mask
from dimo.methods.dimo.divergence import gradient_divisor, logit_gradient
from dimo.methods.dimo.draws import Initialization, Masking
from dimo.methods.dimo.method import objective_of
from dimo.methods.dimo.objective import DiMOObjective, Guidance
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT

CASE = "dimo_distillation_step"
STUDENT_RUNS = ("FKL", "RKL", "Jeffreys_0.5", "Jeffreys_-0.2", "FKL_mean", "FKL_adaptive_cfg_temps")
AUXILIARY_RUNS = ("fake_hard", "fake_soft0.5")


def objective_from(**settings):
    """The objective of flat settings, named as in a recipe."""
    parts = {"initialization": Initialization, "masking": Masking, "guidance": Guidance}
    built = {}
    for name, part in parts.items():
        keys = [f.name for f in dataclasses.fields(part) if f.name in settings]
        built[name] = part(**{key: settings.pop(key) for key in keys})
    return DiMOObjective(**built, **settings)


@pytest.fixture(scope="module")
def case(golden):
    cases = json.loads((golden / "manifest.json").read_text())["cases"]
    return next(case for case in cases if case["case"] == CASE)


@pytest.fixture
def close(case):
    """Keywords of `assert_close`: the tolerance the case states for gradients."""
    tolerance = case["tolerance"]["gradients"]
    return {"atol": tolerance["atol"], "rtol": tolerance["rtol"]}


@pytest.fixture
def networks(golden, case):
    def load(role: str) -> MaskGIT:
        return MaskGIT.from_official(
            golden / case["files"][f"{role}_weights"]["name"], **case["constructor"]
        )

    return {role: load(role) for role in ("teacher", "fake", "student")}


@pytest.fixture
def data(golden_arrays):
    return golden_arrays(CASE)


def _official(case, run=""):
    """The objective of a recorded run, from its official settings."""
    settings = {**case["settings"], **case["runs"].get(run, {})}
    name, beta = ("jeffreys", settings["beta"]) if "beta" in settings else ("forward_kl", 0.0)
    return objective_from(
        divergence="reverse_kl" if run == "RKL" else name,
        beta=beta,
        loss_reduction=settings["loss_reduction"],
        init_mask_ratio=settings["cur_fixed_ratio"],
        embedding_noise=settings["cur_noise_emb_perturb"],
        mask_schedule=settings["ratio_mode"],
        auxiliary_mask_schedule=settings["ratio_mode_fake"],
        teacher_guidance_scale=settings["true_cfg"],
        teacher_guidance="adaptive" if settings["adaptive_cfg"] else "constant",
        student_temperature=settings["gen_temp"],
        teacher_temperature=settings["true_temp"],
        auxiliary_temperature=settings["fake_temp"],
        label_smoothing=0.1,
        soft_targets=settings["alpha_fake"],
        soft_target_temperature=settings["temperature_fake"],
        soft_target_reduction="mean",
        keep_mask_class=True,
    )


def _student_logits(networks, data, case, prefix=""):
    initial = data[f"{prefix}x_init"].flatten(1)
    noise = data[f"{prefix}perturb_noise"][:, : initial.shape[1]]
    sigma = case["settings"]["cur_noise_emb_perturb"]
    return networks["student"](initial, data["labels"], embedding_noise=sigma, noise=noise)


def _student_loss(objective, networks, data, logits):
    return objective.student_loss(
        logits,
        data["sampled_codes"].flatten(1),
        data["remask"].flatten(1),
        data["labels"],
        teacher=networks["teacher"],
        auxiliary=networks["fake"],
        mask_ratio=data["remask_ratio"],
    )


def _check_parameter_gradients(network, data, run, close):
    """Those that were recorded, and the norm of all."""
    gradients = {name: p.grad for name, p in network.named_parameters()}
    for key in data:
        if key.startswith(f"{run}/param_grad/"):
            name = key.removeprefix(f"{run}/param_grad/")
            torch.testing.assert_close(gradients[name], data[key], **close)
    norm = sum(g.double().square().sum() for g in gradients.values()).sqrt()
    torch.testing.assert_close(norm, data[f"{run}/grad_norm_all_params"], atol=0, rtol=1e-4)


def test_every_recorded_run_is_compared(case):
    assert set(case["runs"]) == {*STUDENT_RUNS, *AUXILIARY_RUNS}


def test_token_initialization_equals_the_official_one(data, case):
    settings = case["settings"]
    found = initialize_tokens(
        data["init_random_codes"].flatten(1),
        data["init_rand_for_mask"].argsort(dim=1),
        init_mask_ratio=settings["cur_fixed_ratio"],
        mask_token_id=settings["mask_value"],
    )
    assert torch.equal(found, data["x_init"].flatten(1))


def test_intermediate_state_equals_the_official_one(data, case):
    ratio = mask_ratio(case["settings"]["ratio_mode"], data["remask_u"])
    torch.testing.assert_close(ratio, data["remask_ratio"])
    ranks = data["remask_rand_for_positions"].argsort(dim=1)
    mask = random_mask(ranks, mask_count(ratio, ranks.shape[1]))
    assert torch.equal(mask, data["remask"].flatten(1))
    tokens = data["sampled_codes"].flatten(1).masked_fill(mask, case["settings"]["mask_value"])
    assert torch.equal(tokens, data["remask_codes"].flatten(1))


def test_a_fraction_of_the_states_is_fully_masked_and_the_rest_follow_the_schedule():
    masking = Masking("arccos", fully_masked=0.2, mask_ratio_range=(0.02, 0.98))
    ratio = masking.ratio("student", torch.linspace(0, 1, 10_001, dtype=torch.float64))
    assert bool((ratio[:2000] == 1).all())
    assert (ratio == 1).double().mean().item() == pytest.approx(0.2, abs=1e-4)
    rest = mask_ratio("arccos", torch.linspace(0, 1, 8_001, dtype=torch.float64))
    torch.testing.assert_close(ratio[2000:], rest.clamp(0.02, 0.98))
    always = Masking(fully_masked=1.0).ratio("auxiliary/0", torch.tensor([0.0, 0.999]))
    assert always.tolist() == [1, 1]
    u = torch.rand(1000, dtype=torch.float64)
    assert torch.equal(Masking("arccos").ratio("student", u), mask_ratio("arccos", u))
    assert Masking("arccos", fully_masked=0.2).ratio("student", torch.ones(1)).item() == 0


@pytest.mark.parametrize("run", STUDENT_RUNS)
def test_student_step_equals_the_official_one(networks, data, case, close, run):
    logits = _student_logits(networks, data, case)
    logits.retain_grad()
    torch.testing.assert_close(logits.detach(), data["student_logits"], **close)
    found = _student_loss(_official(case, run), networks, data, logits)
    torch.testing.assert_close(found.logit_gradient, data[f"{run}/grad_after_mask"], **close)
    torch.testing.assert_close(
        found.loss.detach(), data[f"{run}/surrogate_loss"], atol=1e-5, rtol=1e-4
    )
    found.loss.backward()
    if f"{run}/dloss_dlogits" in data:
        torch.testing.assert_close(logits.grad, data[f"{run}/dloss_dlogits"], **close)
    _check_parameter_gradients(networks["student"], data, run, close)


@pytest.mark.parametrize("run", ["FKL", "RKL", "Jeffreys_0.5", "Jeffreys_-0.2"])
def test_gradient_formula_equals_the_official_one_before_masking(data, case, run):
    objective = _official(case, run)
    found = logit_gradient(
        objective.divergence,
        teacher_logits=data["teacher_logits_cfg2"],
        auxiliary_logits=data["fake_logits"],
        beta=objective.beta,
    )
    torch.testing.assert_close(found, data[f"{run}/grad_before_mask"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("run", AUXILIARY_RUNS)
def test_auxiliary_step_equals_the_official_one(networks, data, case, close, run):
    logits = _student_logits(networks, data, case, "fake/").detach()
    torch.testing.assert_close(logits, data["fake/student_logits"], **close)
    found = _official(case, run).auxiliary_loss(
        networks["fake"],
        data["fake/sampled_codes"].flatten(1),
        data["fake/remask"].flatten(1),
        data["labels"],
        student_logits=logits,
    )
    torch.testing.assert_close(found.loss.detach(), data[f"{run}/loss"], atol=1e-5, rtol=1e-4)
    found.loss.backward()
    _check_parameter_gradients(networks["fake"], data, run, close)


def test_soft_targets_are_a_sum_over_the_classes_by_default(networks, data, case):
    def soft_part(reduction):
        objective = objective_from(
            soft_targets=1.0, soft_target_reduction=reduction, keep_mask_class=True
        )
        found = objective.auxiliary_loss(
            networks["fake"],
            data["fake/sampled_codes"].flatten(1),
            data["fake/remask"].flatten(1),
            data["labels"],
            student_logits=data["fake/student_logits"],
        )
        return found.loss.detach()

    p = data["fake/student_logits"].log_softmax(-1)
    q = data["fake/fake_logits"].log_softmax(-1)
    by_token = (p.exp() * (p - q)).sum(-1)[data["fake/remask"].flatten(1)]
    torch.testing.assert_close(soft_part("sum"), by_token.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(soft_part("mean") * p.shape[-1], soft_part("sum"))


def test_only_masked_tokens_get_a_gradient(networks, data, case):
    mask = data["remask"].flatten(1)
    logits = _student_logits(networks, data, case).detach().requires_grad_()
    found = _student_loss(_official(case), networks, data, logits)
    found.loss.backward()
    assert logits.grad[~mask].abs().max() == 0
    assert (logits.grad[mask].abs().sum(-1) > 0).all()
    torch.testing.assert_close(logits.grad, found.logit_gradient / len(logits))


def test_the_student_cannot_emit_the_mask_token(networks, case):
    objective = objective_from()
    draws = objective.draw(networks["student"], 0, torch.arange(64), "student")
    logits, tokens = objective.generate(networks["student"], draws)
    assert logits.shape[-1] == case["constructor"]["codebook_size"]
    assert int(tokens.max()) < case["constructor"]["codebook_size"]


def test_equal_teacher_and_auxiliary_leave_the_student_alone(networks, data, case):
    found = objective_from(divergence="jeffreys", beta=0.3).student_loss(
        _student_logits(networks, data, case)[..., : case["constructor"]["codebook_size"]],
        data["sampled_codes"].flatten(1),
        data["remask"].flatten(1),
        data["labels"],
        teacher=networks["teacher"],
        auxiliary=networks["teacher"],
    )
    assert found.logit_gradient.abs().max() == 0


class _WholeGridOnly:
    """A network that knows no positions, and counts the logits it is asked for."""

    def __init__(self, network):
        self.network, self.rows = network, 0
        self.codebook_size, self.mask_token_id = network.codebook_size, network.mask_token_id

    def __call__(self, tokens, labels, **inputs):
        assert "positions" not in inputs
        return self.network(tokens, labels, **inputs)


class _Counted(_WholeGridOnly):
    takes_positions = True

    def __call__(self, tokens, labels, **inputs):
        logits = self.network(tokens, labels, **inputs)
        self.rows += logits.shape[0] * logits.shape[1]
        return logits


_SMALL = {"hidden_dim": 32, "codebook_size": 30, "depth": 2, "heads": 4, "mlp_dim": 64}


def _network(family, seed):
    torch.manual_seed(seed)
    if family == "maskgit":
        return MaskGIT(img_size=128, nclass=6, **_SMALL).eval()
    network = HaltonMaskGIT(input_size=8, nclass=6, **_SMALL).eval()
    for parameter in network.parameters():  # adaLN-zero would make every block the identity
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("family", ["maskgit", "halton"])
@pytest.mark.parametrize("keep_mask_class", [False, True])
def test_logits_at_masked_positions_alone_change_nothing(family, keep_mask_class):
    teacher, auxiliary, student = (_network(family, seed) for seed in range(3))
    vocabulary = student(torch.zeros(1, 64, dtype=torch.long), torch.tensor([0])).shape[-1]
    keep_mask_class = keep_mask_class and vocabulary > _SMALL["codebook_size"]
    objective = objective_from(
        beta=0.3,
        weighting="dmd",
        teacher_guidance_scale=2.0,
        teacher_guidance="adaptive",
        mask_ratio_range=(0.0, 0.5),
        soft_targets=0.5,
        keep_mask_class=keep_mask_class,
    )
    draws = objective.draw(student, 3, torch.arange(5), "student")
    with torch.no_grad():
        z, tokens = objective.generate(student, draws)
    if keep_mask_class:  # a sampled mask token is no re-masked position
        tokens[:, ::3] = student.mask_token_id

    def losses(wrap):
        asked = wrap(teacher), wrap(auxiliary)
        auxiliary.zero_grad()
        first = objective.student_loss(
            z,
            tokens,
            draws.mask,
            draws.labels,
            teacher=asked[0],
            auxiliary=asked[1],
            mask_ratio=draws.mask_ratio,
        )
        state = (tokens, draws.mask, draws.labels)
        second = objective.auxiliary_loss(asked[1], *state, student_logits=z)
        second.loss.backward()
        again = objective.student_loss(
            z,
            tokens,
            draws.mask,
            draws.labels,
            teacher=teacher,
            auxiliary=second.logits,
            mask_ratio=draws.mask_ratio,
        )
        assert torch.equal(again.logit_gradient, first.logit_gradient)
        return first, second, [p.grad.clone() for p in auxiliary.parameters()], asked

    whole, some = losses(_WholeGridOnly), losses(_Counted)
    assert some[3][0].rows == 2 * 5 * 32  # both halves, 32 of 64 positions
    assert some[3][1].rows == 2 * 5 * 32  # for either loss
    assert whole[0].logit_gradient.abs().max() > 1e-3
    torch.testing.assert_close(some[0].logit_gradient, whole[0].logit_gradient)
    torch.testing.assert_close(some[0].loss, whole[0].loss)
    torch.testing.assert_close(some[1].loss, whole[1].loss)
    torch.testing.assert_close(some[2], whole[2], atol=1e-6, rtol=1e-4)


def test_a_teacher_in_train_mode_is_refused(networks, data, case):
    networks["teacher"].train()
    with pytest.raises(AssertionError, match="dropout"):
        _student_loss(_official(case), networks, data, data["student_logits"])


def test_dmd_weighting_divides_by_the_mean_distance_of_an_image(networks, data, case):
    plain = objective_from(keep_mask_class=True, teacher_guidance_scale=2.0)
    weighted = objective_from(keep_mask_class=True, teacher_guidance_scale=2.0, weighting="dmd")
    z = data["student_logits"]
    a, b = (_student_loss(o, networks, data, z).logit_gradient for o in (plain, weighted))
    distance = (z.softmax(-1) - data["teacher_logits_cfg2"].softmax(-1)).abs().mean(-1)
    mask = data["remask"].flatten(1)
    for image in range(len(z)):
        mean = distance[image][mask[image]].mean()
        torch.testing.assert_close(b[image], a[image] / mean, atol=1e-4, rtol=1e-4)
    same = gradient_divisor("dmd", student_logits=z, teacher_logits=z, mask=mask)
    assert same.flatten().tolist() == pytest.approx([1e-5] * len(z))
    with pytest.raises(DimoError, match="unknown weighting 'dm'; allowed: constant, dmd"):
        gradient_divisor("dm", student_logits=z, teacher_logits=z, mask=mask)


def test_student_temperature_divides_what_the_tokens_are_drawn_from(networks):
    cold, warm = objective_from(student_temperature=1e-4), objective_from()
    draws = warm.draw(networks["student"], 0, torch.arange(64), "student")
    z, tokens = cold.generate(networks["student"], draws)
    assert torch.equal(tokens, z.argmax(-1))
    assert not torch.equal(warm.generate(networks["student"], draws)[1], tokens)


def test_the_settings_of_a_draw(networks):
    """Which draws depend on the step, on the purpose and on neither."""
    student, index = networks["student"], torch.arange(400)
    objective = objective_from(
        init_mask_ratio_range=(0.2, 0.9),
        embedding_noise=0.4,
        embedding_noise_warmup="linear",
        embedding_noise_warmup_steps=10,
        mask_schedule="linear",
        auxiliary_mask_schedule="mage",
        mask_ratio_range=(0.1, 0.7),
    )
    draws = {
        (purpose, step): objective.draw(student, 5, index, purpose, step=step)
        for purpose in ("student", "auxiliary/0")
        for step in (0, 5, 20)
    }
    masked = {
        key: (draw.initial.tokens == student.mask_token_id).sum(1) for key, draw in draws.items()
    }
    assert all(len(set(counts.tolist())) == 1 for counts in masked.values())
    assert len({int(counts[0]) for counts in masked.values()}) > 1
    for step in (0, 5, 20):
        assert torch.equal(masked["student", step], masked["auxiliary/0", step])
    assert draws["student", 0].initial.noise is None
    sigmas = [draws["student", step].embedding_noise for step in (0, 5, 20)]
    assert sigmas == pytest.approx([0, 0.2, 0.4])
    for (purpose, _), draw in draws.items():
        low = 0.1 if purpose == "student" else 0.5
        assert float(draw.mask_ratio.min()) == pytest.approx(low, abs=0.02)
        assert float(draw.mask_ratio.max()) == pytest.approx(0.7)
    plain = objective_from().draw(student, 5, index, "student")
    again = objective_from().draw(student, 5, index, "student", step=7)
    assert torch.equal(plain.initial.tokens, again.initial.tokens)
    assert torch.equal(plain.gumbel, draws["student", 0].gumbel)


def test_a_recipe_becomes_an_objective():
    required = {"teacher": "digits", "steps": 1, "learning_rate": 0.1}
    recipe = DiMORecipe(
        **required,
        auxiliary_learning_rate=0.1,
        divergence="js",
        teacher_guidance_scale=3.0,
        soft_targets=0.25,
        init_mask_ratio_range=(0.1, 0.9),
    )
    found = objective_of(recipe, label_smoothing=0.1)
    assert (
        found.divergence,
        found.guidance.teacher_guidance_scale,
        found.soft_targets,
    ) == ("js", 3.0, 0.25)
    assert (found.label_smoothing, found.initialization.init_mask_ratio_range) == (0.1, (0.1, 0.9))
    own = DiMORecipe(**required, auxiliary_learning_rate=0.1, label_smoothing=0.0)
    assert objective_of(own, label_smoothing=0.1) == objective_from()


@pytest.mark.parametrize("field", ["loss_reduction", "soft_target_reduction"])
def test_an_unknown_reduction_is_refused(field):
    with pytest.raises(DimoError, match="unknown reduction 'max'; allowed: mean, sum"):
        objective_from(**{field: "max"})
