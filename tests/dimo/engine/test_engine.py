"""How a batch is split changes nothing, and what is not finite changes nothing either."""

import copy
import dataclasses
import json
import os
from collections import Counter

import pytest
import torch

from dimo.engine.distributed import Ranks, Runtime
from dimo.engine.optim import Update, update_ema
from dimo.engine.runs import distill
from dimo.errors import DimoError
from dimo.methods.base import TeacherDefaults
from dimo.methods.dimo.method import DiMO
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.pretraining import TeacherTask, TrainRecipe
from dimo.models.halton import HaltonMaskGIT
from dimo.models.layers import recompute_activations
from dimo.models.maskgit import MaskGIT
from dimo.zoo.bundled import EncodedImages
from dimo.zoo.loading import load_network, weights_file
from dimo.zoo.teachers import get_teacher

CPU = torch.device("cpu")
RECIPE = DiMORecipe(
    teacher="digits",
    steps=50,
    batch_size=8,
    learning_rate=1e-4,
    auxiliary_learning_rate=3e-4,
    lr_warmup_steps=5,
    teacher_guidance_scale=1.5,
    precision="float32",
)


def make_task(ranks=None, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    row = get_teacher("digits")
    teacher = load_network(row, weights_file(row, "transformer"))
    student = row.architecture(**{**row.network, "dropout": recipe.dropout})
    student.load_state_dict(teacher.state_dict())
    return DiMO().task(
        recipe, teacher, student, None, TeacherDefaults(), Runtime(CPU, ranks or Ranks())
    )


def run_task(task, steps):
    """The means of each step, over all ranks."""
    curve = []
    for step in range(steps):
        sums = {k: task.ranks.sum_(v) for k, v in task.step(step).items()}
        curve.append({k: float(v[0] / v[1]) for k, v in sums.items()})
    return curve


def weights(task):
    return {
        f"{name}/{key}": value.clone()
        for name, network in task.networks.items()
        for key, value in network.state_dict().items()
    }


def assert_same_curve(found, wanted, tolerance):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


def assert_untouched(found, wanted, names=("",)):
    for key, value in wanted.items():
        if key.startswith(tuple(names)):
            assert torch.equal(found[key], value), key


# --- one batch, however it is split ----------------------------------------------------------


@pytest.mark.parametrize("samples", ["fresh", "shared"])
def test_accumulation_changes_nothing_but_rounding(samples):
    settings = {"batch_size": 12, "auxiliary_samples": samples}
    whole, parts = make_task(**settings), make_task(**settings, accumulate=3)
    assert_same_curve(run_task(parts, 8), run_task(whole, 8), 1e-6)


def test_accumulation_in_the_training_of_a_teacher(tiny_network):
    curves = []
    for parts in (1, 3):
        torch.manual_seed(0)
        recipe = TrainRecipe(
            teacher="digits",
            steps=5,
            batch_size=12,
            learning_rate=1e-3,
            precision="float32",
            dropout=0.0,
            accumulate=parts,
        )
        tokens, labels = torch.randint(20, (30, 16)), torch.arange(30) % 5
        task = TeacherTask(
            recipe, MaskGIT(**tiny_network), EncodedImages(tokens, labels), Runtime(CPU)
        )
        curves.append(run_task(task, 5))
    assert_same_curve(curves[1], curves[0], 1e-6)


RANKS = """
import json, sys
sys.path.insert(0, {here!r})
from test_engine import make_task, run_task
from dimo.engine.distributed import ranks
with ranks() as group:
    curve = run_task(make_task(group, **{changes!r}), 50)
    if group.is_first:
        print(json.dumps(curve))
"""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"accumulate": 2},
        pytest.param({"auxiliary_samples": "shared"}, marks=pytest.mark.slow),
    ],
    ids=["whole", "accumulated", "shared samples"],
)
def test_two_ranks_give_the_curve_of_one(changes, run_ranks, request):
    out = run_ranks(RANKS.format(here=str(request.path.parent), changes=changes))
    wanted = run_task(make_task(**{**changes, "accumulate": 1}), 50)
    assert wanted[-1]["gradient"] > 2 * wanted[5]["gradient"]  # something was learned from
    assert_same_curve(json.loads(out), wanted, 1e-5)


RESTARTED = """
import os, signal, time
from dimo.engine.distributed import ranks
signal.alarm(60)  # a rank that waits for one that ended waits for half an hour
if os.environ["RANK"] == "1":
    time.sleep(0.5)  # by then the first rank has looked for its address
with ranks() as group:
    os.write(1, f"{group.largest(group.index)}\\n".encode())
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(1)
"""


def test_restarted_ranks_do_not_meet_those_that_ended(forks, tmp_path):
    """The store of torchrun outlives them, with their addresses in it."""
    (tmp_path / "script.py").write_text(RESTARTED)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    keys = [store.num_keys()]
    for attempt in ("0", "1"):
        given = {**os.environ, **shared, "TORCHELASTIC_RESTART_COUNT": attempt}
        environs = [{**given, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        codes, out, err = forks([tmp_path / "script.py"], tmp_path, environs)
        keys.append(store.num_keys())
    assert (codes, out) == ([0, 0], "1\n1\n"), err
    assert keys[0] < keys[1] < keys[2]  # none is used twice, also where they met by chance


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_batch_that_does_not_split_is_one_error(ranks):
    with pytest.raises(DimoError, match=rf"batch_size 8 .* {ranks} ranks x accumulate 3"):
        make_task(Ranks(0, ranks), accumulate=3)


# --- the auxiliary model's samples ------------------------------------------------------------


def test_shared_samples_are_those_of_the_students_update():
    """The student takes the step it takes with fresh ones, the auxiliary model one on x, x~_t."""
    fresh, shared, plain = make_task(), make_task(auxiliary_samples="shared"), make_task()
    fresh.step(0)
    shared.step(0)
    for name in ("student", "ema"):
        assert_untouched(weights(shared), weights(fresh), (f"{name}/",))
    draws = plain.objective.draw(plain.student, 0, torch.arange(8), "student")
    with torch.no_grad():
        _, tokens = plain.objective.generate(plain.student, draws)
    update = plain.updates["auxiliary"]
    loss = plain.objective.auxiliary_loss(update.model, tokens, draws.mask, draws.labels).loss
    update.backward(loss, draws.mask.float().mean())
    update.step(RECIPE.auxiliary_learning_rate * RECIPE.learning_rate_factor(0))
    assert_untouched(weights(shared), weights(plain), ("auxiliary/",))
    changed = weights(fresh)
    assert any(not torch.equal(changed[k], v) for k, v in weights(shared).items())


@pytest.mark.parametrize(
    ("samples", "turns", "calls"), [("fresh", 1, 2), ("shared", 1, 1), ("shared", 3, 3)]
)
def test_shared_samples_save_a_forward_of_either_network(samples, turns, calls):
    task = make_task(auxiliary_samples=samples, auxiliary_steps=turns)
    found = Counter()
    for name in ("student", "auxiliary"):
        network = task.networks[name]
        network.register_forward_hook(lambda *_, name=name: found.update([name]))
    task.step(0)
    assert found == {"student": calls, "auxiliary": calls}


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["maskgit", "halton"])
def test_recomputed_activations_give_the_same_gradients(
    architecture, tiny_network, golden_constructor
):
    torch.manual_seed(0)
    if architecture == "maskgit":
        network = MaskGIT(**{**tiny_network, "dropout": 0.2})
    else:
        config = golden_constructor["halton_transformer"]
        network = HaltonMaskGIT(**{**config, "dropout": 0.2})
        for parameter in network.parameters():  # adaLN-zero would hide the blocks
            torch.nn.init.normal_(parameter, std=0.1)
    other = copy.deepcopy(network)
    recompute_activations(other)
    tokens = torch.randint(network.codebook_size, (3, network.num_tokens))
    found, saved = [], []
    for model in (network, other):
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.train()(tokens, torch.arange(3)).logsumexp(-1).sum().backward()
        found.append([p.grad for p in model.parameters()])
        saved.append(sum(kept))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert saved[1] < saved[0] / 2


def test_a_distillation_with_recomputed_activations_is_the_same():
    wanted = run_task(make_task(dropout=0.1), 4)
    assert_same_curve(
        run_task(make_task(dropout=0.1, gradient_checkpointing=True), 4), wanted, 1e-6
    )


def test_networks_without_blocks_say_so():
    with pytest.raises(DimoError, match="Linear has no gradient checkpointing"):
        recompute_activations(torch.nn.Linear(1, 1))


def test_the_average_on_the_cpu_is_that_on_the_device():
    here, there = make_task(), make_task(ema_on_cpu=True)
    for task in (here, there):
        run_task(task, 5)
        assert not any(p.requires_grad for p in task.ema.parameters())
    assert_untouched(weights(there), weights(here))


def task_on_gpu(**changes):
    row = get_teacher("digits")
    teacher = load_network(row, weights_file(row, "transformer"))
    recipe = dataclasses.replace(RECIPE, **changes)
    return DiMO().task(
        recipe,
        teacher,
        copy.deepcopy(teacher),
        None,
        TeacherDefaults(),
        Runtime(torch.device("cuda")),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_no_update_waits_for_the_gpu(scaled):
    device = torch.device("cuda")
    network, x = torch.nn.Linear(8, 8, device=device), torch.randn(4, 8, device=device)
    ema = copy.deepcopy(network)
    update = Update(network, device=device, ranks=Ranks(), grad_clip=1.0, scaled=scaled)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for is_last in (False, True):
                with update.part(is_last=is_last):
                    update.backward(network(x).square().mean(), x.square().mean())
            _, good = update.step(1e-3)
            update_ema(ema, network, decay=0.9, step=0, is_finite=good)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_average_on_the_cpu_is_that_on_the_gpu():
    here, there = task_on_gpu(), task_on_gpu(ema_on_cpu=True)
    for step in range(5):
        here.step(step)
        there.step(step)
    for a, b in zip(here.ema.parameters(), there.ema.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_the_average_forgets_the_first_steps_and_leaves_out_bad_ones():
    ema, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = copy.deepcopy(ema)
    update_ema(ema, model, decay=0.999, step=8, is_finite=torch.tensor(False))
    assert torch.equal(ema.weight, before.weight)
    update_ema(ema, model, decay=0.999, step=8, is_finite=torch.tensor(True))
    torch.testing.assert_close(ema.weight, 0.5 * before.weight + 0.5 * model.weight)


# --- what is not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(precision):
    task = make_task(precision=precision)
    run_task(task, 2)
    first = task.counts()[0]  # float16 may have skipped to find its scale
    before, state = weights(task), copy.deepcopy(task.updates["student"].state_dict())
    bias = task.teacher.last_layer[4].bias
    kept = bias.clone()
    bias.fill_(torch.nan)
    task.step(2)
    bias.copy_(kept)
    assert task.counts()[0] == first + 1
    assert_untouched(weights(task), before, ("student", "ema"))
    for found, wanted in zip(
        task.updates["student"].state_dict()["optimizer"]["state"].values(),
        state["optimizer"]["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not torch.equal(
        weights(task)["auxiliary/last_layer.2.weight"], before["auxiliary/last_layer.2.weight"]
    )
    curve = run_task(task, 5)  # goes on
    assert task.counts()[0] == first + 1
    assert all(torch.isfinite(v).all() for v in weights(task).values())
    assert curve[-1]["grad_norm"] > 0


def test_a_skipped_update_is_left_out_of_the_log(tmp_path):
    def disturb(step, scalars, task):
        task.teacher.requires_grad_(False).last_layer[4].bias.fill_(torch.nan if step == 7 else 0)

    distill(RECIPE, tmp_path / "run", recipe_name="test", runtime=Runtime(CPU), watchers=[disturb])
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["skipped"] == 1
    assert found["gradient"] > 0
    assert found["grad_norm"] > 0


def test_a_diverged_training_stops_with_one_error(tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=100, max_skipped=10)

    def spoil(step, scalars, task):
        task.teacher.requires_grad_(False).last_layer[4].bias.fill_(torch.nan if step > 50 else 0)

    with pytest.raises(DimoError, match="diverged before step 100: 49 updates in a row"):
        distill(
            recipe, tmp_path / "run", recipe_name="test", runtime=Runtime(CPU), watchers=[spoil]
        )
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_watchers_see_every_step_and_the_plain_networks(tmp_path):
    seen = []

    def watch(step, scalars, task):
        seen.append((step, set(scalars), {k: type(v) for k, v in task.networks.items()}))

    recipe = dataclasses.replace(RECIPE, steps=3)
    distill(recipe, tmp_path / "run", recipe_name="test", runtime=Runtime(CPU), watchers=[watch])
    keys = {"gradient", "grad_norm", "auxiliary_loss", "skipped", "token_entropy", "top_1"}
    keys |= {
        f"{of}{what}" for of in ("", "teacher_") for what in ("marginal_entropy", "token_coverage")
    }
    assert [(step, scalars) for step, scalars, _ in seen] == [
        (0, set()),
        (1, set()),
        (2, set()),
        (3, keys),
    ]
    plain = {"student": MaskGIT, "auxiliary": MaskGIT, "ema": MaskGIT}
    assert all(networks == plain for _, _, networks in seen)
