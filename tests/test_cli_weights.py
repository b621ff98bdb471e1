"""`dimo weights` as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DIMO = str(Path(sys.executable).with_name("dimo"))
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}


def run(*arguments, cwd, code=0):
    """Not the fixture, whose process has read the address of the hub before."""
    done = subprocess.run(
        [DIMO, "weights", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **NOWHERE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def weights(run):
    """As the function above, in this process: for what needs no hub."""

    def call(*arguments, **options):
        return run("weights", *arguments, **options)

    return call


@pytest.mark.parametrize("command", ["list", "fetch", "convert", "verify"])
def test_every_command_has_help_with_an_example(weights, command, tmp_path):
    text = weights(command, "--help", cwd=tmp_path).stdout
    assert "Example" in text
    assert f"dimo weights {command}" in " ".join(text.split())


def test_list_says_what_is_known_and_what_is_here(weights, tmp_path):
    (tmp_path / "vq_ds16_c2i.pt").write_bytes(b"x")
    text = weights("list", "--folder", ".", cwd=tmp_path).stdout
    assert "here: vq_ds16_c2i.pt" in text
    assert "size unknown, licence unknown, https://zenodo.org/records/15124163/files/" in text
    assert "size 6 KB, licence BSD" in text
    assert "size 2,090 MB, " in text
    rows = json.loads(weights("list", "--folder", tmp_path, "--json", cwd=tmp_path).stdout)
    known = {row["name"]: row for row in rows}
    assert known["llamagen-vq16"]["present"] == str(tmp_path / "vq_ds16_c2i.pt")
    assert known["maskgit-256"]["size"] == 2_090_306_069
    assert known["maskgit-256"]["present"] is known["di4c-d"]["size"] is None
    assert known["di4c-d"]["licence"] is known["di4c-d"]["sha256"] is None


def test_fetch_without_a_connection_is_one_line(tmp_path):
    done = run("fetch", "maskgit-vqgan", "--folder", "weights", cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: cannot reach pretrained_maskgit/VQGAN/model.yaml")
    assert done.stderr.count("\n") == 1
    assert "by hand and put it at weights/pretrained_maskgit/VQGAN/model.yaml" in done.stderr
    assert not list(tmp_path.iterdir())
    done = run("fetch", "inception", "maskgit-51", "--folder", "weights", cwd=tmp_path, code=2)
    assert "did you mean 'maskgit-512'" in done.stderr


def test_convert_then_verify(weights, golden, tmp_path):
    source = golden / "maskgit_v1_transformer.official.pth"
    done = weights("convert", source, "-o", "out", cwd=tmp_path)
    result = tmp_path / "out" / "maskgit_v1_transformer.official.safetensors"
    assert "MaskGIT v1.0 transformer" in done.stderr
    done = weights("convert", source, "-o", "out", cwd=tmp_path, code=2)
    assert "--force" in done.stderr
    done = weights("convert", source, "-o", "out", "--force", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["source_file"] == source.name
    text = weights("verify", result, cwd=tmp_path).stdout
    assert text.startswith(f"ok  {result}")
    result.write_bytes(result.read_bytes()[:-1])
    done = weights("verify", result, "maskgit-256", "--folder", ".", cwd=tmp_path, code=1)
    assert done.stdout.count("WRONG") == 2
    done = weights("verify", result, "--json", cwd=tmp_path, code=1)
    (found,) = json.loads(done.stdout)
    assert not found["ok"]
    assert "cannot read weights" in found["problems"][0]
