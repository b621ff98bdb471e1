"""A training that is killed at any moment and started again ends as if nothing had happened."""

import json
import os

import pytest
import torch

from dimo.engine.checkpoint import latest_checkpoint

RUN = """
import sys
from pathlib import Path
import torch
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.engine.distributed import Runtime, ranks as connected
from dimo.engine.runs import distill

whole, parts, ranks, most, last = *sys.argv[1:3], *map(int, sys.argv[3:])

def run(out):
    recipe = DiMORecipe(
        teacher="digits", steps=last, batch_size=4, learning_rate=1e-3, lr_schedule="linear",
        auxiliary_learning_rate=1e-3, dropout=0.1, checkpoint_every=4, keep_every=20,
        precision="float32", accumulate=2,
    )
    with connected() as group:
        runtime = Runtime(torch.device("cpu"), group)
        distill(recipe, Path(out), recipe_name="test", runtime=runtime)
"""
# A process that never computes forks one for each rank; those train and are killed.
FORKS = """
import json, os, random, signal, socket, time, traceback

def start(out, ranks):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [fork(out, rank, ranks, port) for rank in range(ranks)]

def fork(out, rank, ranks, port):
    child = os.fork()
    if child == 0:
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                              TORCHELASTIC_RUN_ID="test")  # as torchrun does
        code = 1
        try:
            run(out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child

def ended(child):
    assert os.waitpid(child, 0)[1] == 0
    return True

def kill_when(children, condition):
    while not condition():
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            assert status == 0, status
            assert all(ended(child) for child in children[1:])
            return "finished"
        time.sleep(0.001)
    for child in draw.sample(children, len(children)):
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    return "killed"

def steps(out):
    return {p.name for p in Path(out, "checkpoints").glob("step-*")}

began = time.monotonic()
assert all(ended(child) for child in start(whole, ranks))
took = time.monotonic() - began
draw, kills = random.Random(int(time.time())), {"writing": 0, "anywhere": 0}
for number in range(2 * most):
    before, children = steps(parts), start(parts, ranks)
    if number >= most:  # to the end
        end = kill_when(children, lambda: False)
    elif number % 2 == 0:  # while a checkpoint is written, after one that is whole
        kind, enough = "writing", draw.randint(1, 2)
        end = kill_when(children, lambda: len(steps(parts) - before) >= enough
                        and any(Path(parts, "checkpoints").glob(".step-*")))
    else:
        kind, limit = "anywhere", time.monotonic() + draw.uniform(0.05, 0.35) * took
        end = kill_when(children, lambda: time.monotonic() > limit)
    if end == "finished":
        break
    kills[kind] += 1
print(json.dumps({"end": end, **kills}))
"""


def assert_same_run(found, wanted, kept):
    for name in ("student.safetensors", "metrics.jsonl", "recipe.toml"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (found, wanted)]
    assert names[0] == names[1] == [f"step-{n:07d}" for n in kept]
    (_, one), (_, other) = (latest_checkpoint(f / "checkpoints") for f in (found, wanted))
    assert flat(one["task"]) == flat(other["task"])


def flat(state, prefix=""):
    """Nested state as {path: number or bytes}."""
    if isinstance(state, torch.Tensor):
        return {prefix: state.numpy().tobytes()}
    if isinstance(state, dict):
        return {k: v for key in state for k, v in flat(state[key], f"{prefix}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state}


def killed_and_whole(forks, folder, *arguments):
    """What happened to a run in `folder / "parts"`; one in `folder / "whole"` was left alone."""
    script = folder / "script.py"
    script.write_text(RUN + FORKS)
    argv = [script, folder / "whole", folder / "parts", *arguments]
    codes, out, err = forks(argv, folder, [dict(os.environ)])
    assert codes == [0], err
    found = json.loads(out)
    assert found["end"] == "finished"
    return found


def test_a_killed_run_ends_like_an_uninterrupted_one(forks, tmp_path):
    found = killed_and_whole(forks, tmp_path, 1, 4, 24)
    assert found["writing"] >= 1
    assert found["anywhere"] >= 1
    assert_same_run(tmp_path / "parts", tmp_path / "whole", [20, 24])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_many_times_ends_like_an_uninterrupted_one(ranks, forks, tmp_path):
    found = killed_and_whole(forks, tmp_path, ranks, 10, 60)
    assert found["writing"] >= 2
    assert found["anywhere"] >= 2
    assert_same_run(tmp_path / "parts", tmp_path / "whole", [20, 40, 56, 60])
