"""A CLIP of golden size under the name of any architecture, and its weights in a file."""

import gzip
import json

import open_clip
import pytest
import torch
from safetensors.torch import load

from dimo.cli import main

CASE = "hpsv2_tiny_clip"


@pytest.fixture
def tiny_clip(golden, monkeypatch):
    """`tiny_clip(path)` writes a checkpoint as HPSv2 publishes them."""
    config = json.loads((golden / f"{CASE}.config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    state = load(gzip.decompress((golden / f"{CASE}.weights.safetensors.gz").read_bytes()))

    def write(path):
        torch.save({"state_dict": state}, path)
        return path

    return write


_EVAL = """
import sys
import open_clip
from dimo.cli import main

open_clip.get_model_config = lambda name: {config!r}
sys.argv = ["dimo", "eval", *{arguments!r}, "--json"]
main()
"""


@pytest.fixture
def eval_on_two_ranks(golden, run_ranks):
    """`eval_on_two_ranks(*arguments)`: the one record that two ranks of `dimo eval` print."""
    config = json.loads((golden / f"{CASE}.config.json").read_text())["model_cfg"]

    def run(*arguments):
        given = [str(argument) for argument in arguments]
        return json.loads(run_ranks(_EVAL.format(config=config, arguments=given)))

    return run


@pytest.fixture
def dimo(monkeypatch, capsys):
    """`dimo(*arguments)` -> exit code, stdout, stderr as one line."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["dimo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return stop.value.code or 0, said.out, " ".join(said.err.split())

    return run
