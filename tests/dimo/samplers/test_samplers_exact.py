"""Samplers of a model whose exact law is known: a Markov chain over four binary tokens.

The model gives the exact marginals of each masked token given the revealed ones. The law that a
continuous-time sampler makes of it is computed without noise, as a product of transition matrices
over all states, from the samplers' own leap law, weights and rates; the samplers themselves are
then compared with that law.
"""

import itertools

import pytest
import torch

from dimo.guidance import GUIDANCE_RULES
from dimo.masking import MASK_SCHEDULES, UNMASKING_RATES, unmasking_rate
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
    law = torch.where((start == V)[..., None], law, stay)
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


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_rates_are_those_of_the_mask_schedule(schedule):
    """r = d/dt log(1 - alpha_t), and 1 - alpha_t = gamma(1 - t)."""
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    step = 1e-6
    above, below = (MASK_SCHEDULES[schedule](1 - x).log() for x in (t + step, t - step))
    rates = [unmasking_rate(schedule)(float(x)) for x in t]
    assert rates == pytest.approx(((above - below) / (2 * step)).tolist(), rel=1e-6)


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


def _fixed_point(rule, scale, temperature):
    """The law [16] that no gradient of Di[M]O moves, if tokens are revealed in random order.

    Its conditionals are read from the objective: with an auxiliary model of equal probabilities the
    gradient of the forward KL is 1 / V - p.
    """
    masked = STATES == V
    objective = DiMOObjective(
        divergence="forward_kl", guidance=Guidance(scale, rule), teacher_temperature=temperature
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
