"""Di[M]O-FD: moments and gradient in closed form; neither ranks nor resumption change them."""

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dimo.engine.distributed import Ranks, Runtime
from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.methods.base import TeacherDefaults
from dimo.methods.dimo.draws import draw
from dimo.methods.frechet.method import DiMOFD, FrechetRecipe
from dimo.methods.frechet.moments import IMAGES_PER_DIMENSION, RunningFrechet
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.scenes import SceneTransformer, SceneWords
from dimo.models.text import Prompts, TextConditioned
from dimo.util.terminal import Stopped, signals_wait, stopped_by_signals

CPU = torch.device("cpu")
NETWORK = {
    **{"img_size": 64, "hidden_dim": 8, "depth": 2, "heads": 2, "mlp_dim": 16},
    **{"codebook_size": 12, "nclass": 3, "dropout": 0.0},
}
DEFAULTS = TeacherDefaults(settings={"mask_schedule": "arccos", "choice_temperature": 4.5})


def features(count, dimensions=6, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    x = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return spread * x @ mixing + seed


def distance(mean, covariance, other_mean, other_covariance):
    root = np.real(sqrtm(covariance @ other_covariance))
    return float(
        np.square(mean - other_mean).sum() + np.trace(covariance + other_covariance - 2 * root)
    )


@pytest.fixture
def running():
    reference = features(400)
    running = RunningFrechet(6, window=200)
    running.set_reference(reference.split(150), Ranks())
    for part in features(480, seed=1, spread=0.7).split(60):
        running.update(part.split(25), Ranks())
    return running, reference


def test_moments_and_distance(running):
    """The window forgets: 60 of 200 images are new in each step, once it is full."""
    running, reference = running
    scale = reference.std(0)
    torch.testing.assert_close(running.scale, scale)
    mean, second, seen = torch.zeros(6).double(), torch.zeros(6, 6).double(), 0
    for part in (features(480, seed=1, spread=0.7) / scale).split(60):
        kept = min(seen / (seen + 60), 1 - 60 / 200)
        mean = kept * mean + (1 - kept) * part.mean(0)
        second = kept * second + (1 - kept) * part.T @ part / 60
        seen += 60
    torch.testing.assert_close(running.mean, mean)
    torch.testing.assert_close(running.second, second)
    assert running.is_ready
    running._derive()
    covariance = second - torch.outer(mean, mean)
    of_reference = (reference / scale).mean(0).numpy(), torch.cov((reference / scale).T).numpy()
    wanted = distance(mean.numpy(), covariance.numpy(), *of_reference)
    assert float(running.distance) == pytest.approx(wanted, rel=1e-9)


def test_the_gradient_is_that_of_the_distance(running):
    """Finite differences of the distance in the features of images with a small part in it."""
    running, reference = running
    running._derive()
    scale = reference.std(0)
    of_reference = (reference / scale).mean(0).numpy(), torch.cov((reference / scale).T).numpy()
    images, weight, step = features(3, seed=2), 1e-3, 1e-4
    original = (images / scale).T @ (images / scale)
    first = (images / scale).sum(0)

    def moved(x):
        f = x / scale
        mean = running.mean + weight * (f.sum(0) - first)
        second = running.second + weight * (f.T @ f - original)
        return distance(mean.numpy(), (second - torch.outer(mean, mean)).numpy(), *of_reference)

    found = running.gradient(images)
    for image, column in ((0, 0), (1, 3), (2, 5)):
        up, down = images.clone(), images.clone()
        up[image, column] += step
        down[image, column] -= step
        wanted = (moved(up) - moved(down)) / (2 * step * weight)
        assert float(found[image, column]) == pytest.approx(wanted, rel=1e-6)


def test_equal_sets_are_at_no_distance():
    running = RunningFrechet(6, window=10_000)
    running.set_reference([features(4000)], Ranks())
    running.update([features(4000)], Ranks())
    assert abs(float(running.distance)) < 1e-3  # n and n - 1
    assert float(running.gradient(features(50)).abs().max()) < 1e-2


def test_descent_along_the_gradient_ends_at_the_reference():
    """Images x = A z + b of a linear generator, a few at a time."""
    running = RunningFrechet(6, window=500)
    running.set_reference([features(4000)], Ranks())
    a, b = torch.eye(6).double().requires_grad_(), torch.ones(6).double().requires_grad_()
    optimizer, generator = torch.optim.Adam([a, b], lr=0.02), torch.Generator().manual_seed(3)
    distances = []
    for _ in range(400):
        images = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ a + b
        running.update([images.detach()], Ranks())
        optimizer.zero_grad()
        images.backward(running.gradient(images) / len(images))
        optimizer.step()
        distances += [float(running.distance)] if running.is_ready else []
    assert np.mean(distances[-200:]) < 0.1 * distances[0]


def of_labels():
    teacher = MaskGIT(**NETWORK)
    teacher.tok_emb.weight.data.mul_(20)  # predictions that are not all alike
    return teacher.eval()


def of_text():
    sizes = {k: v for k, v in NETWORK.items() if k not in ("img_size", "nclass")}
    prompts = Prompts(SceneWords(), ["a red circle", "two blue squares", "a green star"])
    return TextConditioned(SceneTransformer(**sizes), prompts).eval()


def last_norm(model):
    return model.network.head[3] if isinstance(model, TextConditioned) else model.last_layer[-1]


def make_task(ranks=None, make_teacher=of_labels, **changes):
    keys = {
        **{"steps": 20, "batch_size": 64, "learning_rate": 1e-4, "auxiliary_learning_rate": 1e-4},
        **{
            "lr_warmup_steps": 1,
            "precision": "float32",
            "frechet_blocks": 1,
            "checkpoint_every": 5,
        },
        **{"reference_images": 1000, "reference_steps": 4, "ema_decay": 0.9},
    }
    recipe = FrechetRecipe(teacher="digits", **{**keys, **changes})
    torch.manual_seed(0)
    teacher = make_teacher()
    student, runtime = copy.deepcopy(teacher), Runtime(CPU, ranks or Ranks())
    last_norm(student).bias.data += torch.linspace(-1, 1, NETWORK["hidden_dim"])  # it is off
    return DiMOFD().task(recipe, teacher, student, None, DEFAULTS, runtime)


def run_task(task, steps, first=0):
    """The means of each step, over all ranks."""
    curve = []
    for step in range(first, steps):
        sums = {k: task.ranks.sum_(v) for k, v in task.step(step).items()}
        curve.append({k: float(v[0] / v[1]) for k, v in sums.items()})
    return curve


READY = IMAGES_PER_DIMENSION * 2 * NETWORK["hidden_dim"] // 64  # steps of 64


@pytest.mark.parametrize("make_teacher", [of_labels, of_text])
def test_states_are_those_of_the_forward_pass(make_teacher):
    model = make_teacher()
    tokens, labels = torch.randint(12, (2, model.num_tokens)), torch.tensor([0, 2])
    tokens[:, ::2] = model.mask_token_id
    embedded = model.token_embeddings[tokens]
    first, last = model.block_states(embedded, labels, [1, 2])
    assert first.shape == last.shape
    assert first.shape[1] > model.num_tokens
    inputs = []
    head = model.network.head[0] if make_teacher is of_text else model.last_layer[0]
    with head.register_forward_pre_hook(lambda _, x: inputs.append(x[0])):
        model(tokens, labels)
    assert torch.equal(inputs[0], last[:, : model.num_tokens])


@pytest.mark.parametrize("make_teacher", [of_labels, of_text])
def test_the_logit_gradient_passes_hard_tokens_and_their_softmax(make_teacher):
    """d features / d z by the Jacobian of the softmax, written out."""
    task = make_task(make_teacher=make_teacher)
    run_task(task, READY + 2)
    objective, labels = task.objective, torch.tensor([0, 2])
    draws = draw(
        *(objective.initialization, objective.masking, task.student, 1, torch.arange(2)),
        *("student", 0, 12),
    )
    logits, tokens = objective.generate(task.student, draws)
    logits = logits.detach().double().requires_grad_()
    student = objective.student_loss(
        *(logits.float(), tokens, draws.mask, draws.labels),
        teacher=task.teacher,
        auxiliary=task.auxiliary,
    )
    task.network.double()
    if make_teacher is of_text:  # whose words are float32
        task.network.network.words.register_forward_pre_hook(lambda _, x: x[0].double())
    loss = task.further_loss(draws, logits, tokens, student)
    (found,) = torch.autograd.grad(loss, logits)
    embedded = task.network.token_embeddings[tokens].requires_grad_()
    states = task._states(embedded, draws.labels)
    (of_embedding,) = torch.autograd.grad(states, embedded, task.moments.gradient(states))
    p = (logits + draws.gumbel).softmax(-1).detach()
    along = of_embedding @ task.network.token_embeddings[:12].T  # [B, L, V]
    wanted = p * (along - (p * along).sum(-1, keepdim=True))
    ratio = 0.5 * float((task.norms[0] / task.norms[1]).sqrt())
    wanted = wanted * ratio / len(labels)
    assert float((found - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


def test_the_term_begins_when_enough_was_seen():
    curve = run_task(make_task(), READY + 1)
    assert ["hidden_fd" in values for values in curve] == [False] * (READY - 1) + [True] * 2


def test_a_signal_ends_the_teachers_samples():
    """They take minutes before the first step."""
    task, seen = make_task(), []

    def progress(what, done, total, unit):
        seen.append(done)
        os.kill(os.getpid(), signal.SIGTERM)

    task.progress = progress
    with pytest.raises(Stopped, match="143"), stopped_by_signals(), signals_wait():
        task.step(0)
    assert seen == [250]
    assert not task.moments.has_reference


def test_accumulation_changes_nothing_but_rounding():
    whole, parts = (run_task(make_task(accumulate=n), 8) for n in (1, 4))
    for a, b in zip(whole, parts, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)


def test_a_resumed_run_is_bit_equal():
    whole = make_task()
    run_task(whole, 7)
    state = copy.deepcopy(whole.state_dict())
    resumed = make_task()
    resumed.load_state_dict(state)
    assert run_task(resumed, 12, 7) == run_task(whole, 12, 7)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


RANKS = """
import json, sys
sys.path.insert(0, {here!r})
from test_frechet import make_task, run_task
from dimo.engine.distributed import ranks
with ranks() as group:
    curve = run_task(make_task(group), 8)
    if group.is_first:
        print(json.dumps(curve))
"""


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one(run_ranks, request):
    found = json.loads(run_ranks(RANKS.format(here=str(request.path.parent))))
    wanted = run_task(make_task(), 8)
    assert "hidden_fd" in wanted[-1]
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_what_cannot_be_distilled_is_refused():
    assert METHODS["dimo-fd"].distillation.network(HaltonMaskGIT) is None
    with pytest.raises(DimoError, match="frechet_blocks = 3 is out of range; allowed: at most"):
        make_task(frechet_blocks=3)
    with pytest.raises(DimoError, match="frechet_weight = 0 is out of range"):
        make_task(frechet_weight=0)


def test_the_auxiliary_model_may_learn_alone_at_first():
    task = make_task(auxiliary_warmup_steps=2)
    before = copy.deepcopy(task.student.state_dict())
    run_task(task, 2)
    assert all(torch.equal(v, before[k]) for k, v in task.student.state_dict().items())
    run_task(task, 3, 2)
    assert not all(torch.equal(v, before[k]) for k, v in task.student.state_dict().items())
