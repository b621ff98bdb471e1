"""What may be in a weights file, and how a wrong one is named."""

import argparse
import collections
import gzip
import json
import os
import shlex
import sys
import types
import typing
from pathlib import PosixPath

import numpy as np
import pytest
import torch

from dimo.errors import DimoError
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.vqgan import VQGAN, LlamaGenVQ
from dimo.weights.files import (
    load_metadata,
    looks_like,
    read_state_dict,
    read_weights,
    save_tensors,
    sha256_weights,
    state_sha256,
)

OFFICIAL = [
    (MaskGIT, "maskgit_v1_transformer", "official.pth", "MaskGIT v1.0 transformer"),
    (MaskGIT, "maskgit_v1_transformer", "weights.safetensors", "MaskGIT v1.0 transformer"),
    (HaltonMaskGIT, "halton_transformer", "weights.safetensors", "Halton-MaskGIT transformer"),
    (VQGAN, "taming_vqgan_f16", "last.ckpt", "taming VQGAN"),
    (LlamaGenVQ, "halton_llamagen_vq", "weights.safetensors", "LlamaGen VQ tokenizer"),
]
STATE = {"weight": torch.arange(3.0)}


@pytest.mark.parametrize("number", range(len(OFFICIAL)))
def test_a_file_of_another_network_is_named(golden_file, golden_constructor, number):
    """A cycle: each network is given the file of the next one of another kind."""
    cls, case, suffix, kind = OFFICIAL[number]
    assert looks_like(read_state_dict(golden_file(f"{case}.{suffix}"))) == kind
    others = [*OFFICIAL[number + 1 :], *OFFICIAL]
    _, case_, suffix_, kind_ = next(other for other in others if other[3] != kind)
    with pytest.raises(DimoError, match=f"look like those of a {kind_}, but a {kind} is needed"):
        cls.from_official(golden_file(f"{case_}.{suffix_}"), **golden_constructor[case])


@pytest.mark.parametrize(("cls", "case", "suffix", "kind"), OFFICIAL)
def test_a_truncated_file_and_a_missing_key_are_refused(
    golden_file, golden_constructor, tmp_path, cls, case, suffix, kind
):
    path = golden_file(f"{case}.{suffix}")
    data = path.read_bytes()
    for size in (0, len(data) // 2, len(data) - 1):
        short = tmp_path / f"short.{suffix}"
        short.write_bytes(data[:size])
        with pytest.raises(DimoError, match="cannot read weights"):
            cls.from_official(short, **golden_constructor[case])
    state = read_state_dict(path)
    for number, key in enumerate(sorted(state)[::61]):
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / f"{number}.pth")
        with pytest.raises(DimoError):
            cls.from_official(tmp_path / f"{number}.pth", **golden_constructor[case])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cut_anywhere_is_one_clear_error(tmp_path, zipped):
    path = tmp_path / "whole.pth"
    torch.save({"model": STATE}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for size in range(0, len(data) - 1, 67):
        path.write_bytes(data[:size])
        with pytest.raises(DimoError, match="cannot read weights"):
            read_state_dict(path)


@pytest.fixture
def lightning(monkeypatch):
    """Classes with the names that Lightning's checkpoints hold."""
    bases = {
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": object,
        "lightning_fabric.utilities.data.AttributeDict": dict,
        "omegaconf.dictconfig.DictConfig": object,
    }
    made = []
    for name, base in bases.items():
        module_name, class_name = name.rsplit(".", 1)
        made.append(type(class_name, (base,), {"__module__": module_name}))
        for depth in range(module_name.count(".") + 1):
            package = module_name.rsplit(".", depth)[0]
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module_name], class_name, made[-1])
    return made


def test_what_official_files_carry_beside_tensors_is_not_loaded(tmp_path, lightning, monkeypatch):
    checkpoint, attributes, container = lightning
    callback, config = checkpoint(), container()
    callback.best_model_path = PosixPath("best.ckpt")
    config.__dict__.update(_metadata=typing.Any, _content={"lr": np.arange(3)})
    content = {
        "config": config,
        "history": collections.defaultdict(list, loss=[np.zeros((2, 2))]),
        "types": [int, np.int64(3), np.array(["a"])],
        "callbacks": {checkpoint: {"best_model_score": np.float64(0.5)}, "object": callback},
        "hyper_parameters": attributes(lr=1e-4),
        "args": argparse.Namespace(results_dir=PosixPath("runs"), lr=np.float32(0.1)),
        "state_dict": {**STATE, "steps": np.arange(3)},
    }
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.ckpt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    packages = ("pytorch_lightning", "lightning_fabric", "omegaconf")
    for name in [name for name in sys.modules if name.startswith(packages)]:
        monkeypatch.delitem(sys.modules, name)
    for zipped in (True, False):
        state = read_state_dict(tmp_path / f"{zipped}.ckpt")
        assert list(state) == ["weight"]
        assert torch.equal(state["weight"], STATE["weight"])
    assert "omegaconf" not in sys.modules


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.path),)


@pytest.mark.parametrize("hide", [lambda evil: evil, lambda evil: argparse.Namespace(x=evil)])
def test_code_in_a_file_is_never_run(tmp_path, hide):
    Evil.path = tmp_path / "made"
    torch.save({"state_dict": STATE, "args": hide(Evil())}, tmp_path / "evil.ckpt")
    with pytest.raises(DimoError, match=r"it holds objects of \w+\.mkdir, which no official"):
        read_state_dict(tmp_path / "evil.ckpt")
    assert not Evil.path.exists()


class Foreign:
    """Of a package that trainers have of their own."""


def test_the_advice_for_foreign_objects_works(tmp_path, monkeypatch):
    torch.save({"net": {"a": Foreign()}, "model": STATE, "step": 3}, tmp_path / "x.ckpt")
    with pytest.raises(DimoError, match=r"objects of .*Foreign.*if you trust its author") as caught:
        read_state_dict(tmp_path / "x.ckpt")
    python, option, code = shlex.split(str(caught.value).partition("with: ")[2])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert torch.equal(read_state_dict("NEW.pth")["weight"], STATE["weight"])


def test_a_file_that_is_not_what_it_is_called_is_named(tmp_path):
    torch.save(STATE, tmp_path / "pickle.pth")
    save_tensors(tmp_path / "whole.safetensors", STATE)
    pickled, tensors = ((tmp_path / f).read_bytes() for f in ("pickle.pth", "whole.safetensors"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for name, content, said in (
        ("a.pth", pointer, "Git LFS pointer.*git lfs pull"),
        ("a.safetensors", pointer, "Git LFS pointer"),
        ("b.pth", b"\n<!DOCTYPE html><title>Quota exceeded", "web page"),
        ("c.pth", gzip.compress(pickled), "compressed.*decompress"),
        ("d.pth", tensors, r"is a safetensors file; rename it to d\.safetensors"),
        ("e.safetensors", pickled, r"is a PyTorch pickle; rename it, e\.g\. to e\.pth"),
        ("f.bin", b'{"error": "Access denied"}', "JSON text"),
        ("g.index.json", b"[]", "no index of shards"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DimoError, match=said):
            read_state_dict(path)
    with pytest.raises(DimoError, match="Git LFS pointer"):
        load_metadata(tmp_path / "a.safetensors")


def test_shards_are_one_file(tmp_path):
    state = {"a": torch.arange(3.0), "b": torch.ones(2)}
    names = {key: f"m-0000{n}-of-00002.safetensors" for n, key in enumerate(state, 1)}
    for key, name in names.items():
        save_tensors(tmp_path / name, {key: state[key]})
    index = tmp_path / "m.safetensors.index.json"
    places = [tmp_path, tmp_path / names["b"], index]
    for with_index in (False, True):
        if with_index:
            index.write_text(json.dumps({"weight_map": names}))
        for place in places[: 2 + with_index]:
            assert state_sha256(read_state_dict(place)) == state_sha256(state)
    assert len({sha256_weights(place) for place in places}) == 1
    (tmp_path / names["a"]).unlink()
    for place in places:
        with pytest.raises(DimoError, match=r"1 are missing, e\.g\. m-00001-of-00002"):
            read_state_dict(place)
    with pytest.raises(DimoError, match="give the one file"):
        read_state_dict(tmp_path.parent / tmp_path.name / "..")


def test_the_average_is_taken_unless_told_otherwise(tmp_path):
    last = {"weight": torch.zeros(3)}
    torch.save({"model": last, "ema": STATE, "opt": {"lr": 1}, "steps": 3}, tmp_path / "x.pt")
    torch.save({"model": last, "ema": {"decay": 0.9}}, tmp_path / "y.pt")
    for name, ema, part, state in (
        ("x.pt", True, "ema", STATE),
        ("x.pt", False, "model", last),
        ("y.pt", True, "", last),
    ):
        found = read_weights(tmp_path / name, ema=ema)
        assert found.part == part
        assert torch.equal(found.state["weight"], state["weight"])


def test_a_tied_tensor_left_out_by_a_writer_is_restored(golden_file, golden_constructor, tmp_path):
    state = read_state_dict(golden_file("halton_transformer.weights.safetensors"))
    arguments = golden_constructor["halton_transformer"]
    for left_out in ("head.weight", "tok_emb.weight"):
        save_tensors(tmp_path / "x.safetensors", {k: v for k, v in state.items() if k != left_out})
        network = HaltonMaskGIT.from_official(tmp_path / "x.safetensors", **arguments)
        assert torch.equal(network.head.weight, state["head.weight"])


def test_whole_numbers_are_no_weights(golden_file, golden_constructor, tmp_path):
    state = read_state_dict(golden_file("halton_transformer.weights.safetensors"))
    state = {**state, "head.bias": state["head.bias"].to(torch.int8)}
    save_tensors(tmp_path / "x.safetensors", state)
    with pytest.raises(DimoError, match=r"head\.bias is torch\.int8, but torch\.float32"):
        HaltonMaskGIT.from_official(
            tmp_path / "x.safetensors", **golden_constructor["halton_transformer"]
        )


@pytest.mark.parametrize(
    ("prefix", "container"),
    [
        ("", "model_state_dict"),
        ("module.", "state_dict"),
        ("_orig_mod.", "model"),
        ("module._orig_mod.", None),
    ],
)
def test_containers_and_wrappers_are_opened(tmp_path, prefix, container):
    state = {prefix + key: value for key, value in STATE.items()}
    torch.save(state if container is None else {container: state, "iter": 1}, tmp_path / "x.pth")
    assert read_state_dict(tmp_path / "x.pth").keys() == STATE.keys()


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": 3}, {1: STATE["weight"]}, {"a": {"b": STATE["weight"]}}]
)
def test_a_file_without_a_network_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(DimoError, match="holds no state dict"):
        read_state_dict(tmp_path / "x.pth")


def test_saving_writes_whole_or_not_at_all(tmp_path):
    tied = {"a": STATE["weight"], "b": STATE["weight"], "number": torch.tensor(3)}
    save_tensors(tmp_path / "x.safetensors", tied)
    again = read_state_dict(tmp_path / "x.safetensors")
    assert state_sha256(again) == state_sha256(tied)
    with pytest.raises(DimoError, match="cannot write"):
        save_tensors(tmp_path / "x.safetensors" / "y.safetensors", STATE)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DimoError, match="cannot write"):
        save_tensors(tmp_path / "folder.safetensors", STATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "x.safetensors"]
