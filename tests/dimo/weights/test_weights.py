"""What may be in a weights file, and how a wrong one is named."""

import argparse
import os
import sys
import types
from pathlib import PosixPath

import numpy as np
import pytest
import torch

from dimo.errors import DimoError
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.vqgan import VQGAN, LlamaGenVQ
from dimo.weights.files import looks_like, read_state_dict, save_tensors, state_sha256

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
    """Classes with the names that old PyTorch Lightning checkpoints hold."""
    bases = {
        "callbacks.model_checkpoint.ModelCheckpoint": object,
        "utilities.parsing.AttributeDict": dict,
    }
    made = []
    for name, base in bases.items():
        module_name, class_name = f"pytorch_lightning.{name}".rsplit(".", 1)
        made.append(type(class_name, (base,), {"__module__": module_name}))
        for depth in range(module_name.count(".") + 1):
            package = module_name.rsplit(".", depth)[0]
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module_name], class_name, made[-1])
    return made


def test_what_official_files_carry_beside_tensors_is_not_loaded(tmp_path, lightning, monkeypatch):
    checkpoint, attributes = lightning
    callback = checkpoint()
    callback.best_model_path = PosixPath("best.ckpt")
    content = {
        "callbacks": {checkpoint: {"best_model_score": np.float64(0.5)}, "object": callback},
        "hyper_parameters": attributes(lr=1e-4),
        "args": argparse.Namespace(results_dir=PosixPath("runs"), lr=np.float32(0.1)),
        "state_dict": STATE,
    }
    torch.save(content, tmp_path / "last.ckpt")
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read_state_dict(tmp_path / "last.ckpt")["weight"], STATE["weight"])


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
