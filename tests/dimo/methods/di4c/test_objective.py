"""di4c's objective: unbiased estimators, chunks, and each term where it belongs."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from dimo.masking import mask_count, mask_ratio
from dimo.methods.di4c.network import Di4CStudent
from dimo.methods.di4c.objective import Di4CObjective, Draws, LatentMixture, Target, under_latents
from dimo.methods.masked_data import DataDraw, draw_categorical, reveal

TOKENS, VALUES, LATENTS = 4, 3, 8


# --- estimators on a mixture that can be enumerated ------------------------------------------


class Table(nn.Module):
    """A mixture of 8 products over 4 tokens of 3 values, which looks at the latent alone."""

    codebook_size, num_tokens, num_classes, mask_token_id = VALUES, TOKENS, 1, VALUES

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(LATENTS, TOKENS, VALUES + 1, generator=generator, dtype=torch.float64)
        self.logits = nn.Parameter(logits)

    def forward(self, tokens, labels, *, drop, z):
        return self.logits[(z * LATENTS).long()]

    def log_components(self):
        """[N, L, V]."""
        return self.logits[..., :VALUES].log_softmax(-1)


GRID = torch.tensor(list(product(range(VALUES), repeat=TOKENS)))  # every x_0, [81, L]


def exact_loss(student, law):
    """-sum_x law(x) log p_theta(x) over all x."""

    def log_of(table):
        index = GRID.T[None].expand(LATENTS, -1, -1).mT  # [N, 81, L]
        by_token = table.log_components()[:, None].expand(-1, len(GRID), -1, -1)
        joint = by_token.gather(-1, index[..., None])[..., 0].sum(-1)  # [N, 81]
        return joint.logsumexp(0) - math.log(LATENTS)

    return -(log_of(law).exp().detach() * log_of(student)).sum()


def draws_of(rows):
    everything = torch.ones(rows, TOKENS, dtype=torch.bool)
    zero, latents = torch.zeros(rows), (torch.arange(LATENTS) + 0.5) / LATENTS
    unused = torch.empty(0)
    return Draws(
        DataDraw(torch.zeros(rows, TOKENS).long(), zero.long(), zero.bool()),
        r=zero,
        mask=everything,
        count=zero.long(),
        latents=latents.expand(rows, -1),
        target_latents=latents.expand(rows, -1),
        proposal=unused,
        choice=unused,
        sample=unused,
    )


def target_of(law, rows, generator):
    """A datum from the law, and a sample from each of its components, [rows, 1 + N, L]."""
    p = law.log_components().exp().detach()  # [N, L, V]
    uniform = torch.rand(LATENTS, TOKENS, rows, generator=generator, dtype=torch.float64)
    by_latent = draw_categorical(p, uniform).permute(2, 0, 1)
    component = torch.randint(LATENTS, (rows,), generator=generator)
    uniform = torch.rand(LATENTS, TOKENS, rows, generator=generator, dtype=torch.float64)
    datum = draw_categorical(p, uniform).permute(2, 0, 1)[torch.arange(rows), component]
    marginal = p.mean(0).expand(rows, -1, -1)
    masked = torch.full((rows, TOKENS), VALUES)
    return Target(
        masked, marginal.log().float(), torch.cat([datum[:, None], by_latent], 1), marginal.float()
    )


BATCHES, ROWS = 400, 50
OBJECTIVE = {"num_latents": LATENTS, "alpha": 1 + math.exp(-10.0)}  # alpha(0) = 1


TERMS = ("consistency", "data")


def estimates(control_variate):
    """Of both terms, loss and gradient of each batch [400, 97], and the exact values [97]."""
    student, law = Table(1), Table(2)
    mixture = LatentMixture(student, 0)
    objective = Di4CObjective(**OBJECTIVE, control_variate=control_variate)
    generator, found = torch.Generator().manual_seed(3), {term: [] for term in TERMS}
    for _ in range(BATCHES):
        target = target_of(law, ROWS, generator)
        losses = objective.losses(mixture, draws_of(ROWS), target)
        for term, values in found.items():
            values.append(with_gradient(getattr(losses, term).mean(), student))
    exact = with_gradient(exact_loss(student, law), student)
    return {term: torch.stack(values) for term, values in found.items()}, exact


def with_gradient(loss, student):
    (gradient,) = torch.autograd.grad(loss, student.logits, retain_graph=True)
    return torch.cat([loss.detach()[None].double(), gradient.flatten()])


def test_estimators_are_unbiased_and_the_control_variate_is_worth_it():
    plain, controlled = (estimates(control_variate) for control_variate in (False, True))
    for term in TERMS:
        for found, exact in (plain, controlled):
            error = found[term].std(0) / math.sqrt(BATCHES)
            score = (found[term].mean(0) - exact) / error.clamp_min(1e-9)
            assert abs(score[0]) < 3  # the loss
            gradient = score[1:].view(LATENTS, TOKENS, VALUES + 1)
            assert gradient[..., VALUES].abs().max() == 0  # the mask class takes no part
            gradient = gradient[..., :VALUES]
            # of 96 numbers a quarter of one lies outside 3 standard errors by chance
            assert (gradient.abs() < 3).float().mean() >= 0.98
            assert gradient.square().mean() < 1.5
        before, after = plain[0][term].var(0), controlled[0][term].var(0)
        loss, gradient = float(after[0] / before[0]), float(after[1:].sum() / before[1:].sum())
        print(
            f"{term}: variance with the control variate, of that without: loss {loss:.3f}, ", end=""
        )
        print(f"gradient {gradient:.3f}")
        assert loss < 0.9
        assert gradient < 0.9


def test_a_biased_estimator_would_be_found():
    """The marginal term of another law, which is what a wrong control variate adds."""
    student, law = Table(1), Table(2)
    objective = Di4CObjective(**OBJECTIVE)
    target = target_of(law, 20_000, torch.Generator().manual_seed(3))
    other = target_of(Table(4), 1, torch.Generator()).marginal.expand(20_000, -1, -1)
    target = Target(target.tokens, target.teacher, target.samples, other)
    with torch.no_grad():
        found = objective.losses(LatentMixture(student, 0), draws_of(20_000), target).consistency
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - exact_loss(student, law)) > 10 * error


# --- chunks of latents -----------------------------------------------------------------------


@pytest.fixture
def student(tiny_network):
    torch.manual_seed(0)
    network = Di4CStudent(**tiny_network)
    nn.init.normal_(network.latent_projection[2].weight, std=0.5)
    nn.init.normal_(network.bias)
    return network.eval()


@pytest.fixture
def teacher(tiny_network):
    torch.manual_seed(1)
    network = Di4CStudent(**tiny_network)
    nn.init.normal_(network.bias)
    return network.eval().requires_grad_(False)


def drawn(objective, rows=5):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(20, (30, 16), generator=generator)
    return objective.draw(tokens, torch.arange(30) % 5, 0, torch.arange(rows))


def outcome(student, teacher, chunk):
    """Losses, gradients, and how many numbers were kept for the backward pass."""
    objective = Di4CObjective(num_latents=6, latent_chunk=chunk, step_size=0.25, alpha=0.5)
    draws = drawn(objective)
    target = objective.target(draws, teacher=teacher, student=student)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    student.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = objective.losses(LatentMixture(student, chunk), draws, target)
    losses.total.backward()
    gradients = {name: value.grad for name, value in student.named_parameters()}
    return vars(losses), gradients, sum(kept)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_change_memory_and_nothing_else(student, teacher, chunk):
    losses, gradients, kept = outcome(student, teacher, 0)
    in_chunks, their_gradients, kept_in_chunks = outcome(student, teacher, chunk)
    for name, value in losses.items():
        torch.testing.assert_close(in_chunks[name], value, rtol=1e-6, atol=1e-6)
    scale = max(float(value.abs().max()) for value in gradients.values())
    for name, value in gradients.items():
        torch.testing.assert_close(their_gradients[name], value, rtol=0, atol=1e-6 * scale)
    assert kept_in_chunks < 0.6 * kept


# --- the terms -------------------------------------------------------------------------------


def test_equal_components_have_no_correlation_and_the_teacher_no_divergence(student):
    """Under one latent for all, the student is a product; held against itself, nothing is left."""
    objective = Di4CObjective(num_latents=3, step_size=0.25)
    draws = drawn(objective, rows=40)
    draws = Draws(**{**vars(draws), "latents": torch.full((40, 3), 0.4)})
    tokens = draws.data.tokens.masked_fill(draws.mask, student.mask_token_id)
    labels, drop = draws.data.labels, draws.data.drop
    with torch.no_grad():
        own = under_latents(student, tokens[:, None], labels, drop, draws.latents[:, :1])[:, 0]
        samples = torch.randint(20, (40, 4, 16))
        found = objective.losses(
            LatentMixture(student, 0), draws, Target(tokens, own, samples, own.exp())
        )
    assert found.distillation.abs().max() < 1e-4
    entropy = -((own.exp() * own).sum(-1) * draws.mask).sum(-1)
    torch.testing.assert_close(found.data, entropy, rtol=1e-4, atol=1e-4)
    is_end = draws.r >= 0.75
    assert is_end.any()
    assert (~is_end).any()
    torch.testing.assert_close(found.consistency, entropy * ~is_end, rtol=1e-4, atol=1e-4)


def test_distillation_near_the_end_alone_and_weighted(student, teacher):
    objective = Di4CObjective(num_latents=2, step_size=0.25)
    draws = drawn(objective, rows=40)
    with torch.no_grad():
        target = objective.target(draws, teacher=teacher, student=student)
        mixture = LatentMixture(student, 0)
        losses = objective.losses(mixture, draws, target)
        data = draws.data
        args = (target.tokens, draws.mask, data.labels, data.drop, draws.latents)
        _, _, divergence = mixture(*args, target.samples, target.teacher)
    is_end = draws.r >= 0.75
    torch.testing.assert_close(losses.distillation, 4 * divergence * is_end)
    assert (divergence > 0).all()
    assert (losses.consistency[is_end] == 0).all()
    assert (losses.consistency[~is_end] != 0).all()


def test_alpha_falls_in_the_middle_and_zero_leaves_the_datum_out(student, teacher):
    objective = Di4CObjective(alpha=0.3)
    alpha = objective._alpha(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(alpha, torch.tensor([0.3, 0.15, 0.0]), atol=1e-4, rtol=1e-4)

    def data_loss(alpha, datum):
        objective = Di4CObjective(num_latents=4, step_size=0.25, alpha=alpha)
        draws = drawn(objective, rows=8)
        with torch.no_grad():
            target = objective.target(draws, teacher=teacher, student=student)
            target.samples[:, 0] = torch.where(draws.mask, datum, target.samples[:, 0])
            return objective.losses(LatentMixture(student, 0), draws, target).data

    assert torch.equal(data_loss(0.0, 3), data_loss(0.0, 7))
    assert not torch.equal(data_loss(0.1, 3), data_loss(0.1, 7))


def test_the_target_is_one_step_of_the_teacher_on(student, teacher):
    objective = Di4CObjective(num_latents=3, step_size=0.25)
    draws = drawn(objective, rows=40)
    target = objective.target(draws, teacher=teacher, student=student)
    masked = draws.mask.sum(1)
    assert torch.equal(masked, mask_count(mask_ratio("arccos", draws.r), 16))
    after = (mask_ratio("arccos", (draws.r + 0.25).clamp_max(1)) * 16).round().long()
    assert torch.equal(draws.count, (masked - after).clamp_min(1))
    assert torch.equal(target.samples[:, 0], draws.data.tokens)
    kept = ~draws.mask[:, None].expand(-1, 4, -1)
    assert torch.equal(
        target.samples[kept], draws.data.tokens[:, None].expand(-1, 4, -1)[kept]
    )  # what x_t shows
    assert target.samples.max() < 20
    torch.testing.assert_close(target.marginal.sum(-1), torch.ones(40, 16))
    shown = target.marginal.gather(-1, draws.data.tokens[..., None])[..., 0]
    torch.testing.assert_close(shown[~draws.mask], torch.ones(int((~draws.mask).sum())))


# --- the teacher's step ----------------------------------------------------------------------


def test_a_step_reveals_the_most_confident_tokens_and_no_others():
    log_p = torch.randn(6, 16, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < 0.7
    tokens = torch.zeros(6, 16).long().masked_fill(mask, 9)
    uniform = torch.rand(6, 5, 16, generator=torch.Generator().manual_seed(2))
    count = torch.arange(1, 7)
    found = reveal(
        log_p,
        tokens,
        mask,
        count=count,
        noise_scale=torch.zeros(6),
        uniform=uniform,
        gumbel=torch.zeros(6, 5, 16),
    )
    new = (found != 9) & mask[:, None]
    assert torch.equal(new.sum(-1), count[:, None].expand(-1, 5))
    assert torch.equal(found[~mask[:, None].expand(-1, 5, -1)].unique(), torch.tensor([0]))
    proposal = draw_categorical(log_p.exp(), uniform.mT).mT
    confidence = log_p.gather(-1, proposal.mT).mT
    low = confidence.masked_fill(~new, torch.inf).amin(-1)
    high = confidence.masked_fill(new | ~mask[:, None], -torch.inf).amax(-1)
    assert (low >= high).all()


def test_draws_have_the_probabilities():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    counts = draw_categorical(p, uniform).bincount(minlength=5)
    assert counts.tolist() == pytest.approx([100, 0, 600, 300, 0], abs=1)
