"""Samplers of a model whose exact law is known: a Markov chain over four binary tokens.

The model gives the exact marginals of each masked token given the revealed ones. The law that a
continuous-time sampler makes of it is computed without noise, as a product of transition matrices
over all states, from the samplers' own leap law, weights and rates; the samplers themselves are
then compared with that law.
"""

import itertools
import math

import pytest
import torch

from dimo.guidance import GUIDANCE_RULES
from dimo.masking import MASK_SCHEDULES, UNMASKING_RATES, mask_probability, unmasking_rate
from dimo.methods.dimo.objective import DiMOObjective, Guidance
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS
from dimo.samplers.inpainting import Inpainting, KnownTokens
from dimo.samplers.leaping import leap_law, trapezoidal_weights

L, V = 4, 2
STATES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # V = masked
GRIDS = torch.tensor(list(itertools.product(range(V), repeat=L)))
# pairs of states such that the second can follow the first
BEFORE, AFTER = ((STATES[:, None] == V) | (STATES[:, None] == STATES)).all(-1).nonzero().T
PLACE = (V + 1) ** torch.arange(L - 1, -1, -1)
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)


class Chain:
    """p(x_d | revealed tokens) of a Markov chain, as a masked model; `law` [16] is its own."""

    codebook_size, mask_token_id, num_tokens, num_classes, hidden_dim, depth = V, V, L, 1, 1, 1
    takes_latent = takes_positions = False

    def __init__(self, start, move):
        start, move = (torch.tensor(x, dtype=torch.float64) for x in (start, move))
        self.law = start[GRIDS[:, 0]]
        for before, after in itertools.pairwise(range(L)):
            self.law = self.law * move[GRIDS[:, before], GRIDS[:, after]]
        fits = ((STATES[:, None] == V) | (STATES[:, None] == GRIDS)).all(-1)  # [states, grids]
        weight = fits * self.law
        one_hot = torch.nn.functional.one_hot(GRIDS, V).double()
        self.p = torch.einsum("sg,gdv->sdv", weight, one_hot) / weight.sum(1)[:, None, None]

    def __call__(self, tokens, labels, *, drop=None):
        return self.p[(tokens * PLACE).sum(1)].log()


WEAK = Chain([0.35, 0.65], [[0.65, 0.35], [0.4, 0.6]])  # the positive part rarely cuts
STRONG = Chain([0.35, 0.65], [[0.9, 0.1], [0.2, 0.8]])  # it cuts often


def _transitions(law, start):
    """[.., states] probabilities from position laws [.., L, V + 1]; a revealed token stays."""
    stay = torch.nn.functional.one_hot(start, V + 1).double()
    return _product(torch.where((start == V)[..., None], law, stay))


def _product(law):
    """[.., states] probabilities of all states from position laws [.., L, V + 1]."""
    out = torch.ones(*law.shape[:-2], len(STATES), dtype=torch.float64)
    for d in range(L):
        out = out * law[..., d, :][..., STATES[:, d]]
    return out


def _tau_leap(chain, state, length, rate):
    return state @ _transitions(leap_law(length * rate * chain.p).exp(), STATES)


def _trapezoidal_step(chain, state, t, h, theta, rate):
    a1, a2 = trapezoidal_weights(theta)
    first = rate(t) * chain.p  # [states, L, V]
    second = rate(t - theta * h) * chain.p
    step = _transitions(leap_law(theta * h * first).exp(), STATES)
    pair = state[BEFORE] * step[BEFORE, AFTER]
    mixed = (a1 * second[AFTER] - a2 * first[BEFORE]).clamp_min(0)
    return pair @ _transitions(leap_law((1 - theta) * h * mixed).exp(), STATES[AFTER])


def _law(chain, sampler, n, *, theta=0.5, schedule="log-linear"):
    """Exact law [16] of a continuous-time sampler with n predictions."""
    rate = unmasking_rate(schedule)
    state = torch.zeros(len(STATES), dtype=torch.float64)
    state[-1] = 1
    step = 0
    while step < n - 1:
        t = 1 - step / n
        if sampler == "tau_leaping" or (n - 1 - step) % 2 == 1:
            state, step = _tau_leap(chain, state, 1 / n, rate(t)), step + 1
        else:
            state, step = _trapezoidal_step(chain, state, t, 2 / n, theta, rate), step + 2
    rest = torch.cat([chain.p, torch.zeros(len(STATES), L, 1)], dim=-1)
    law = (state @ _transitions(rest, STATES))[(GRIDS * PLACE).sum(1)]
    assert abs(float(law.sum()) - 1) < 1e-12
    return law


def _remdm_step(chain, sigma, reveal, before=STATES):
    """[.., states] probabilities after `before` [.., L] by ReMDM's posterior; sigma [.., L]."""
    masked = torch.full(before.shape, 1 - reveal, dtype=torch.float64)[..., None]
    revealed = torch.cat([reveal * chain.p[(before * PLACE).sum(-1)], masked], dim=-1)
    kept = torch.nn.functional.one_hot(before, V + 1) * (1 - sigma[..., None])
    kept[..., V] += sigma
    return _product(torch.where((before == V)[..., None], revealed, kept))


def _remdm_law(chain, remask, n, *, eta, schedule="log-linear"):
    """Exact law [16] of ReMDM with n predictions; the loop's times and alpha are its defaults."""
    t = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    alpha = 1 - (t if schedule == "log-linear" else MASK_SCHEDULES[schedule](1 - t))
    may_mask = torch.ones(n, dtype=torch.bool)
    if remask == "loop":
        alpha = torch.where(t > 0.55, 0.9 * (1 - t) / 0.45, 1 - 0.1 * (t / 0.05).clamp_max(1))
        may_mask = ((t > 0.05) & (t <= 0.55))[:-1]
    a, b = alpha[:-1], alpha[1:]
    largest = ((1 - b) / a).clamp_max(1)
    sigma = may_mask * (eta * largest if remask == "rescaled" else largest.clamp_max(eta))
    reveal = (b - (1 - sigma) * a) / (1 - a)
    state = torch.zeros(len(STATES), dtype=torch.float64)
    state[-1] = 1
    for step in range(n):
        state = state @ _remdm_step(chain, sigma[step].expand(STATES.shape), float(reveal[step]))
    return state[(GRIDS * PLACE).sum(1)]


def _total_variations(chain, sampler, evaluations, **settings):
    laws = [_law(chain, sampler, n, **settings) for n in evaluations]
    return [float((law - chain.law).abs().sum() / 2) for law in laws]


@pytest.mark.parametrize("chain", [WEAK, STRONG], ids=["weak", "strong"])
def test_total_variation_falls_with_the_number_of_predictions(chain):
    tau = _total_variations(chain, "tau_leaping", EVALUATIONS)
    trapezoidal = _total_variations(chain, "theta_trapezoidal", EVALUATIONS)
    for n, a, b in zip(EVALUATIONS, tau, trapezoidal, strict=True):
        print(f"NFE {n:3d}  tau-leaping {a:.6f}  theta-trapezoidal {b:.6f}")
    for values in (tau, trapezoidal):
        assert all(after < before for before, after in itertools.pairwise(values))
    assert tau[:2] == trapezoidal[:2]  # no pair of predictions before the last
    assert all(b < a for a, b in zip(tau[2:], trapezoidal[2:], strict=True))
    assert 1.9 < tau[-2] / tau[-1] < 2.1  # first order: half when the predictions double
    if chain is WEAK:
        assert 3.2 < trapezoidal[-2] / trapezoidal[-1] < 4.2  # second order: about a quarter


@pytest.mark.parametrize("theta", [0.2, 1 / 3, 2 / 3, 0.8])
def test_any_theta_beats_tau_leaping(theta):
    tau = _total_variations(WEAK, "tau_leaping", [64])
    assert _total_variations(WEAK, "theta_trapezoidal", [64], theta=theta)[0] < tau[0] / 4


@pytest.mark.parametrize("schedule", UNMASKING_RATES)
@pytest.mark.parametrize("sampler", ["tau_leaping", "theta_trapezoidal"])
def test_every_noise_schedule_converges(sampler, schedule):
    found = _total_variations(WEAK, sampler, (4, 16, 64), schedule=schedule)
    assert found[0] > 3 * found[1] > 9 * found[2]


@pytest.mark.parametrize("schedule", UNMASKING_RATES)
def test_rates_are_those_of_the_mask_schedule(schedule):
    """r = d/dt log(1 - alpha_t), and 1 - alpha_t = gamma(1 - t)."""
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    step = 1e-6
    gamma = MASK_SCHEDULES[schedule] if schedule != "log-linear" else lambda u: 1 - u
    above, below = (gamma(1 - x).log() for x in (t + step, t - step))
    rates = [unmasking_rate(schedule)(float(x)) for x in t]
    assert rates == pytest.approx(((above - below) / (2 * step)).tolist(), rel=1e-6)
    masked = [mask_probability(schedule)(x) for x in (0.0, *t.tolist(), 1.0)]
    assert masked == pytest.approx([0.0, *gamma(1 - t).tolist(), 1.0], abs=1e-12)


def _frequencies(sampler, images, model=STRONG, **settings):
    index = torch.arange(images)
    found = SAMPLERS[sampler](model, 0 * index, ImageNoise(5, index), **settings)
    cells = (found.tokens * V ** torch.arange(L - 1, -1, -1)).sum(1)
    return torch.bincount(cells, minlength=V**L)


def _chi_squared(counts, law):
    expected = law * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


LIMIT = 44.3  # 15 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("sampler", ["random", "halton", "confidence"])
def test_an_edit_has_the_law_given_what_is_known(sampler):
    """Two of four tokens, one a step; known ones on both sides matter in a chain."""
    known = KnownTokens(torch.tensor([1, 0, 0, 1]), torch.tensor([False, True, True, False]))
    index = torch.arange(50_000)
    settings = {"choice_temperature": 1e6} if sampler == "confidence" else {}  # a random order
    found = SAMPLERS[sampler](
        Inpainting(STRONG, known), 0 * index, ImageNoise(5, index), num_steps=2, **settings
    )
    law = STRONG.law.view(V, V, V, V)[1, :, :, 1].flatten()
    counts = torch.bincount(found.tokens[:, 0] * V + found.tokens[:, 1], minlength=V**2)
    assert found.token_counts == [1, 1]
    assert _chi_squared(counts, law / law.sum()) < 21.1  # 3 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        ("tau_leaping", {}),
        ("tau_leaping", {"schedule": "cosine"}),
        ("theta_trapezoidal", {"theta": 0.5}),
        ("theta_trapezoidal", {"theta": 0.3, "schedule": "arccos"}),
    ],
    ids=str,
)
def test_the_samplers_have_the_law_that_was_enumerated(sampler, settings, steps):
    law = _law(STRONG, sampler, steps, **settings)
    names = {"schedule": "mask_schedule"}
    arguments = {names.get(key, key): value for key, value in settings.items()}
    counts = _frequencies(sampler, 50_000, num_steps=steps, **arguments)
    assert _chi_squared(counts, law) < LIMIT


@pytest.mark.parametrize("schedule", UNMASKING_RATES)
def test_remdm_without_remasking_is_ancestral_sampling(schedule):
    """The steps are exact leaps: their hazard is the integral of the rate, log m_t / m_s."""
    masked = mask_probability(schedule)
    state = torch.zeros(len(STATES), dtype=torch.float64)
    state[-1] = 1
    for step in range(5):
        hazard = math.log(masked(1 - step / 6) / masked(1 - (step + 1) / 6))
        state = _tau_leap(STRONG, state, hazard, 1)
    state = state @ _transitions(torch.nn.functional.pad(STRONG.p, (0, 1)), STATES)
    law = state[(GRIDS * PLACE).sum(1)]
    found = _remdm_law(STRONG, "capped", 6, eta=0.0, schedule=schedule)
    torch.testing.assert_close(found, law)
    counts = _frequencies("remdm", 20_000, num_steps=6, eta=0.0, mask_schedule=schedule)
    assert _chi_squared(counts, law) < LIMIT


@pytest.mark.parametrize(
    ("remask", "eta", "schedule"),
    [
        ("capped", 0.5, "log-linear"),
        ("capped", 1.0, "arccos"),
        ("rescaled", 0.5, "cosine"),
        ("loop", 0.05, "log-linear"),
    ],
)
def test_remdm_has_the_law_that_was_enumerated(remask, eta, schedule):
    settings = {"eta": eta, "schedule": schedule}
    law = _remdm_law(STRONG, remask, 7, **settings)
    counts = _frequencies(
        "remdm", 20_000, num_steps=7, remask=remask, eta=eta, mask_schedule=schedule
    )
    assert _chi_squared(counts, law) < LIMIT
    assert _chi_squared(counts, _remdm_law(STRONG, "capped", 7, eta=0.0)) > 2 * LIMIT


def test_remdm_masks_again_what_was_drawn_with_little_confidence():
    """Token by token: how often a revealed one is masked, given what it was drawn with."""
    index, history = torch.arange(20_000), []
    settings = {"num_steps": 8, "remask": "confidence", "eta": 1.0}
    settings["callback"] = lambda step, tokens: history.append(tokens)
    SAMPLERS["remdm"](STRONG, 0 * index, ImageNoise(5, index), **settings)
    before, psi = torch.full_like(history[0], V), torch.zeros(history[0].shape).double()
    found, expected, alike, variance = torch.zeros(4, 2, dtype=torch.float64)  # unsure, sure
    for step, after in enumerate(history):
        alpha, after_alpha = step / 8, (step + 1) / 8
        largest = min(1, (1 - after_alpha) / alpha) if step else 1.0
        revealed = before != V
        weight = (-psi).exp() * revealed
        sigma = largest * weight / weight.sum(1, keepdim=True).clamp_min(1e-9)
        for group, chosen in enumerate((revealed & (psi < 0.5), revealed & (psi >= 0.5))):
            found[group] += (after[chosen] == V).sum()
            expected[group] += sigma[chosen].sum()
            alike[group] += (largest / revealed.sum(1, keepdim=True).expand(-1, L)[chosen]).sum()
            variance[group] += (sigma * (1 - sigma))[chosen].sum()
        p = STRONG.p[(before * PLACE).sum(1)].gather(-1, after.clamp_max(V - 1)[..., None])[..., 0]
        psi, before = torch.where(revealed, psi, p), after
    assert ((found - expected).abs() < 3 * variance.sqrt()).all()
    assert ((found - alike).abs() > 4 * variance.sqrt()).all()  # and not all alike


def test_a_little_remasking_is_closer_to_the_data_than_tau_leaping():
    """Redrawing mends mistakes, but draws more tokens at once: the best strength is small.

    Where tokens depend weakly, none at all is best.
    """

    def distances(chain, remask, *etas):
        laws = [_remdm_law(chain, remask, 64, eta=eta) for eta in etas]
        return [float((law - chain.law).abs().sum() / 2) for law in laws]

    (tau,) = _total_variations(STRONG, "tau_leaping", [64])
    for remask, limit in (("capped", 0.96), ("rescaled", 0.98)):
        little, much = distances(STRONG, remask, 0.01, 1.0)
        assert little < limit * tau
        assert much > 3 * tau
    (tau,) = _total_variations(WEAK, "tau_leaping", [64])
    for remask in ("capped", "rescaled"):
        found = distances(WEAK, remask, 0.0, 0.001, 0.01, 0.1)
        assert found == sorted(found)
        assert found[1] < tau < found[2]


@pytest.mark.parametrize("sampler", ["random", "halton"])
def test_one_token_a_step_samples_the_exact_law(sampler):
    counts = _frequencies(sampler, 50_000, num_steps=L)
    assert _chi_squared(counts, STRONG.law) < LIMIT
    two_steps = _frequencies(sampler, 50_000, num_steps=2)
    assert _chi_squared(two_steps, STRONG.law) > 10 * LIMIT  # and the test can tell


class Guided(Chain):
    """A chain whose unconditional half is another chain."""

    def __call__(self, tokens, labels, *, drop=None):
        logits = super().__call__(tokens, labels)
        return logits if drop is None else torch.where(drop[:, None, None], WEAK(tokens, 0), logits)


GUIDED = Guided([0.35, 0.65], [[0.9, 0.1], [0.2, 0.8]])


def _fixed_point(rule, scale, temperature, final_temperature=None):
    """The law [16] that no gradient of Di[M]O moves, if tokens are revealed in random order.

    Its conditionals are read from the objective: with an auxiliary model of equal probabilities the
    gradient of the forward KL is 1 / V - p.
    """
    masked = STATES == V
    objective = DiMOObjective(
        divergence="forward_kl",
        guidance=Guidance(scale, rule),
        teacher_temperature=temperature,
        teacher_final_temperature=final_temperature,
    )
    equal = torch.zeros(*STATES.shape, V)
    found = objective.student_loss(
        equal,
        STATES.masked_fill(masked, 0),
        masked,
        torch.zeros(len(STATES), dtype=torch.int64),
        teacher=GUIDED,
        auxiliary=equal,
        mask_ratio=masked.double().mean(1),
    )
    p = (1 / V - found.logit_gradient).double()
    state = torch.zeros(len(STATES), dtype=torch.float64)
    state[-1] = 1
    for left in range(L, 0, -1):
        after = torch.zeros_like(state)
        for d, v in itertools.product(range(L), range(V)):
            here = masked[:, d] & (masked.sum(1) == left)
            target = ((STATES - (V - v) * torch.eye(L, dtype=torch.int64)[d]) * PLACE).sum(1)
            after.index_add_(0, target[here], (state * p[:, d, v] / left)[here])
        state = after
    return state[(GRIDS * PLACE).sum(1)]


@pytest.mark.parametrize("rule", GUIDANCE_RULES)
def test_random_order_samples_what_a_distillation_converges_to(rule):
    law, plain = _fixed_point(rule, 2.0, 0.7), _fixed_point(rule, 1.0, 1.0)
    torch.testing.assert_close(plain, STRONG.law, rtol=1e-5, atol=1e-7)
    settings = {"guidance_scale": 2.0, "temperature": 0.7, "num_steps": L}
    counts = _frequencies("random", 50_000, GUIDED, guidance_rule=rule, **settings)
    assert _chi_squared(counts, law) < LIMIT
    other = _frequencies("random", 50_000, GUIDED, **settings)  # guidance that rises
    assert _chi_squared(other, law) > 2 * LIMIT
    as_trained = [
        _frequencies("random", 2_000, GUIDED, num_steps=L, **kw)
        for kw in ({}, {"guidance_rule": rule})
    ]
    assert as_trained[0].equal(as_trained[1])


def test_a_final_temperature_means_the_same_to_a_distillation_and_its_law():
    law = _fixed_point("constant", 2.0, 1.0, 0.3)
    settings = {"guidance_scale": 2.0, "guidance_rule": "constant", "num_steps": L}
    for temperatures, is_same in (
        ({"temperature": 1.0, "final_temperature": 0.3}, True),
        ({"temperature": 0.3, "final_temperature": 1.0}, False),
        ({"temperature": 0.5}, False),
    ):
        counts = _frequencies("random", 50_000, GUIDED, **settings, **temperatures)
        statistic = _chi_squared(counts, law)
        assert statistic < LIMIT if is_same else statistic > 2 * LIMIT
    constant = _fixed_point("constant", 2.0, 0.7, 0.7)
    torch.testing.assert_close(constant, _fixed_point("constant", 2.0, 0.7))
