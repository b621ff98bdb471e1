"""A training that is killed at any moment and started again ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from dimo.checkpoint import latest_checkpoint

RUN = """
import sys
from pathlib import Path
import torch
from dimo.config import DistillRecipe
from dimo.runs import distill

def run(out):
    recipe = DistillRecipe(
        teacher="digits", steps=36, batch_size=4, learning_rate=1e-3, lr_schedule="linear",
        auxiliary_learning_rate=1e-3, dropout=0.1, checkpoint_every=4, keep_every=20,
        precision="float32", accumulate=2,
    )
    distill(recipe, Path(out), recipe_name="test", device=torch.device("cpu"))
"""
# One process imports torch and never computes; its forks train and are killed.
FORKS = """
import json, os, random, signal, time

def start(out):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(out)
            code = 0
        finally:
            os._exit(code)
    return child

def kill_when(child, condition):
    while not condition():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            return "finished"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed"

def steps(out):
    return {p.name for p in Path(out, "checkpoints").glob("step-*")}

whole, parts = sys.argv[1:]
assert os.waitpid(start(whole), 0)[1] == 0
draw, kills = random.Random(int(time.time())), {"writing": 0, "anywhere": 0}
for number in range(20):
    before, child = steps(parts), start(parts)
    if number >= 10:  # to the end
        end = kill_when(child, lambda: False)
    elif number % 2:  # while a checkpoint is written, after one that is whole
        kind, enough = "writing", draw.randint(1, 2)
        end = kill_when(child, lambda: len(steps(parts) - before) >= enough
                        and any(Path(parts, "checkpoints").glob(".step-*")))
    else:
        kind, limit = "anywhere", time.monotonic() + draw.uniform(0.05, 1.2)
        end = kill_when(child, lambda: time.monotonic() > limit)
    if end == "finished":
        break
    kills[kind] += 1
print(json.dumps({"end": end, **kills}))
"""


def assert_same_run(found, wanted):
    for name in ("student.safetensors", "metrics.jsonl", "recipe.toml"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (found, wanted)]
    assert names[0] == names[1] == [f"step-{n:07d}" for n in (20, 32, 36)]
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


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = subprocess.run(
        [sys.executable, "-c", RUN + FORKS, str(whole), str(parts)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["end"] == "finished"
    assert found["writing"] >= 2
    assert found["anywhere"] >= 2
    assert_same_run(parts, whole)


@pytest.mark.slow
def test_two_killed_ranks_end_like_uninterrupted_ones(tmp_path):
    (tmp_path / "run.py").write_text(RUN + "run(sys.argv[1])\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command.append(str(tmp_path / "run.py"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = subprocess.run([*command, str(whole)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [*command, str(parts)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(parts, 3)
    kill_tree(process)
    assert not (parts / "config.json").exists()
    done = subprocess.run([*command, str(parts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(parts, whole)


def wait_for(folder, count):
    """Until the run writes a checkpoint after its `count`-th."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        steps = [int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*")]
        if steps and max(steps) >= 4 * count and any((folder / "checkpoints").glob(".step-*")):
            return
    raise AssertionError("no checkpoint came")


def kill_tree(process):
    """Kills the launcher and its workers, each by its id."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        os.kill(member.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)
