"""Muon equals PyTorch's in float32, never waits for the GPU, and resumes exactly on any ranks."""

import copy
import json

import pytest
import torch

from dimo.config import load_recipe
from dimo.engine.distributed import Ranks, Runtime
from dimo.engine.optim import Muon, Update, orthogonalize
from dimo.errors import DimoError
from dimo.methods.pretraining import TeacherTask, TrainRecipe
from dimo.models.maskgit import MaskGIT, block_matrices
from dimo.models.scenes import SceneTransformer
from dimo.zoo.bundled import EncodedImages

CPU = torch.device("cpu")
SHAPES = [(24, 8), (8, 8), (8, 20)]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def update_once(optimizer, parameters, seed, *, scale=1.0, bad=0.0):
    generator = torch.Generator().manual_seed(100 + seed)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=generator)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(bad)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_has_the_singular_vectors_and_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(5, 0.5, min(shape))) @ vh
    found = orthogonalize(matrix)
    core = u.T @ found @ vh.T  # diagonal where the singular vectors are those of the matrix
    values = core.diagonal()
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(core, torch.diag(values), atol=1e-5, rtol=0)
    assert not orthogonalize(torch.zeros(shape)).any()


def test_it_is_the_one_of_pytorch_but_for_bfloat16():
    ours, theirs = matrices(), matrices()
    muon = Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        before = [p.detach().clone() for p in ours]
        update_once(muon, ours, step)
        update_once(reference, theirs, step)
        for p, q, old in zip(ours, theirs, before, strict=True):
            missed = (p - q).norm() / (p - old).norm()
            assert missed < 0.08 * (step + 1)  # bfloat16 has three digits, and five iterations
    with torch.no_grad():  # and a step of it is as large as one of AdamW with this learning rate
        moved = (ours[1] - before[1]).square().mean().sqrt()
    assert 0.001 < moved < 0.004


def test_gradients_are_divided_by_their_scale():
    one, other = matrices(), matrices()
    for parameters, scale in ((one, 1.0), (other, 1024.0)):
        muon = Muon(parameters, weight_decay=0.1)
        for step in range(3):
            update_once(muon, parameters, step, scale=scale)
    for p, q in zip(one, other, strict=True):
        assert torch.equal(p, q)  # a power of two


def test_an_update_that_is_not_finite_changes_nothing():
    parameters = matrices()
    muon = Muon(parameters, weight_decay=0.1)
    update_once(muon, parameters, 0)
    before = copy.deepcopy((parameters, muon.state_dict()["state"]))
    update_once(muon, parameters, 1, scale=float("nan"), bad=1.0)
    for p, q in zip(parameters, before[0], strict=True):
        assert torch.equal(p, q)
    for number, state in muon.state_dict()["state"].items():
        assert torch.equal(state["momentum"], before[1][number]["momentum"])
    update_once(muon, parameters, 2)
    assert all(p.isfinite().all() for p in parameters)
    assert not torch.equal(parameters[0], before[0][0])


def test_matrices_of_the_blocks_are_no_embeddings_and_no_outputs(tiny_network):
    for network in (MaskGIT(**tiny_network), SceneTransformer()):
        found = {id(p) for p in block_matrices(network)}
        names = {name for name, p in network.named_parameters() if id(p) in found}
        kinds = {name.split(".", 4)[-1] for name in names}
        assert kinds == {
            "fn.mha.in_proj_weight",
            "fn.mha.out_proj.weight",
            "fn.net.0.weight",
            "fn.net.3.weight",
        }
        assert len(names) == 4 * len(network.transformer.layers)


def test_every_parameter_has_one_optimizer(tiny_network):
    network = MaskGIT(**tiny_network)
    update = Update(
        network,
        device=CPU,
        ranks=Ranks(),
        grad_clip=1.0,
        scaled=False,
        matrices=block_matrices(network),
    )
    groups = [
        len(group["params"])
        for name in ("optimizer", "muon")
        for group in update.state_dict()[name]["param_groups"]
    ]
    assert sum(groups) == len(list(network.parameters()))
    assert groups[1] == len(block_matrices(network))


# --- in a training --------------------------------------------------------------------------------


def make_task(shape, ranks=None):
    recipe = TrainRecipe(
        teacher="digits",
        optimizer="muon",
        steps=20,
        batch_size=8,
        learning_rate=3e-3,
        lr_warmup_steps=5,
        weight_decay=0.05,
        precision="float32",
        dropout=0.0,
    )
    torch.manual_seed(0)
    network = MaskGIT(**shape)
    labels = torch.arange(40) % 5
    tokens = (4 * labels[:, None] + torch.randint(3, (40, 16))) % 20
    return TeacherTask(
        recipe, network, EncodedImages(tokens, labels), Runtime(CPU, ranks or Ranks())
    )


def run_task(task, first, last):
    losses = []
    for step in range(first, last):
        value = task.ranks.sum_(task.step(step)["loss"])
        losses.append(float(value[0] / value[1]))
    return losses


def test_a_resumed_training_is_exact(tiny_network):
    whole, part = make_task(tiny_network), make_task(tiny_network)
    losses = run_task(whole, 0, 20)
    assert losses[-1] < losses[0] - 0.3
    run_task(part, 0, 8)
    again = make_task(tiny_network)
    again.load_state_dict(copy.deepcopy(part.state_dict()))
    assert run_task(again, 8, 20) == losses[8:]
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


RANKS = """
import json, sys
sys.path.insert(0, {here!r})
from test_muon import make_task, run_task
from dimo.engine.distributed import ranks
with ranks() as group:
    task = make_task({shape!r}, group)
    losses = run_task(task, 0, 20)
    total = float(sum(p.double().abs().sum() for p in task.model.parameters()))
    totals = group.all_gather(lambda: total)
    if group.is_first:
        print(json.dumps([losses, totals]))
"""


def test_two_ranks_give_the_curve_of_one(tiny_network, run_ranks, request):
    out = run_ranks(RANKS.format(here=str(request.path.parent), shape=tiny_network))
    losses, totals = json.loads(out)
    assert losses == pytest.approx(run_task(make_task(tiny_network), 0, 20), rel=1e-4)
    assert totals[0] == totals[1]


def test_an_unknown_optimizer_is_one_error():
    with pytest.raises(DimoError, match=r"optimizer 'lion'.*muon"):
        load_recipe(TrainRecipe, "scenes-teacher", ['optimizer="lion"'])
