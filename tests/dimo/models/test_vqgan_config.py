"""The VQGAN's `model.yaml`: read beside the checkpoint, or from a converted file."""

import json
import shutil

import pytest
import torch
import yaml

from dimo.errors import DimoError
from dimo.models.vqgan import VQGAN, read_config
from dimo.weights.files import read_state_dict, save_tensors

CASE = "taming_vqgan_f16"
# As published, https://huggingface.co/llvictorll/Maskgit-pytorch, with a loss's settings shortened.
OFFICIAL = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 256
    n_embed: 1024
    ddconfig:
      double_z: false
      z_channels: 256
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: [1, 1, 2, 2, 4]
      num_res_blocks: 2
      attn_resolutions:
      - 16
      dropout: 0.0
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {disc_conditional: false, disc_start: 0}
    monitor: val/rec_loss
"""


@pytest.fixture
def config(golden):
    return json.loads((golden / f"{CASE}.config.json").read_text())


@pytest.fixture
def checkpoint(golden_file, config, tmp_path):
    """A folder as the official one: `last.ckpt` and `model.yaml`."""
    shutil.copy(golden_file(f"{CASE}.last.ckpt"), tmp_path / "last.ckpt")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "last.ckpt"


def test_the_official_file_gives_the_full_size_network(tmp_path):
    (tmp_path / "model.yaml").write_text(OFFICIAL)
    arguments = read_config(tmp_path / "last.ckpt")
    with torch.device("meta"):
        read, default = VQGAN(**arguments), VQGAN()
    assert {k: v.shape for k, v in read.state_dict().items()} == {
        k: v.shape for k, v in default.state_dict().items()
    }
    assert arguments["n_embed"] == 1024


def test_the_file_of_its_training_gives_the_same_network(tmp_path):
    (tmp_path / "model.yaml").write_text(OFFICIAL)
    content = yaml.safe_load(OFFICIAL)
    content["model"]["params"] |= {"remap": None, "sane_index_shape": True, "image_key": "image"}
    content["model"]["params"]["ddconfig"]["resamp_with_conv"] = True
    content |= {"data": {"target": "main.Data"}, "lightning": {"trainer": {"gpus": "0,"}}}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(content), encoding="utf-8-sig")
    plain, training = (
        read_config(tmp_path / "last.ckpt", tmp_path / name)
        for name in ("model.yaml", "project.yaml")
    )
    assert training == plain


def test_a_checkpoint_loads_with_the_file_beside_it(checkpoint, golden_file, golden_constructor):
    tokenizer = VQGAN.from_file(checkpoint)
    expected = VQGAN.from_official(golden_file(f"{CASE}.last.ckpt"), **golden_constructor[CASE])
    pairs = zip(tokenizer.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not tokenizer.training
    assert tokenizer.num_tokens == 16
    assert VQGAN.from_file(checkpoint, image_size=128).num_tokens == 64


def test_a_converted_file_needs_no_other(checkpoint, tmp_path):
    state, arguments = read_state_dict(checkpoint), read_config(checkpoint)
    path = tmp_path / "elsewhere" / "last.safetensors"
    save_tensors(path, state, {"config": arguments})
    assert read_config(path) == arguments
    assert VQGAN.from_file(path).codebook_size == 20
    save_tensors(path, state, {"config": {**arguments, "n_embeds": 3}})
    with pytest.raises(DimoError, match=r"last\.safetensors.*did you mean 'n_embed'.*convert"):
        VQGAN.from_file(path)


def test_safetensors_without_a_configuration_takes_the_file_beside_it(checkpoint):
    path = checkpoint.with_name("other.safetensors")
    save_tensors(path, read_state_dict(checkpoint))
    assert VQGAN.from_file(path).codebook_size == 20


def test_a_missing_file_is_named_with_the_next_step(checkpoint):
    checkpoint.with_name("model.yaml").unlink()
    with pytest.raises(DimoError, match=r"no .*model\.yaml.*fetch maskgit-vqgan-config"):
        VQGAN.from_file(checkpoint)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "cannot be read as YAML"),
        ("a\tb: \x00", "cannot be read as YAML"),
        ("", "must be a table"),
        ("model: 3", "'model' must be a table"),
        ("model: {target: x.VQModel}", "missing key 'model.params'"),
        ("data: {}", "unknown key 'data'"),
        ("model: {params: {remap: a.npy}}", "remap must be null"),
        ("model: {params: {ddconfig: {resamp_with_conv: false}}}", "resamp_with_conv must be true"),
        ("model: {params: {n_embeds: 3}}", "did you mean 'n_embed'"),
        ("model: {params: {n_embed: many}}", "'n_embed' must be an integer"),
        ("model: {params: {ddconfig: {ch_mult: 3}}}", "'ddconfig.ch_mult' must be a list"),
        ("model: {params: {ddconfig: {double_z: true}}}", "double_z must be false"),
        ("model: {target: taming.GumbelVQ, params: {}}", "'taming.GumbelVQ', but a VQModel"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_one_clear_line(checkpoint, text, words):
    path = checkpoint.with_name("model.yaml")
    path.write_text(text)
    with pytest.raises(DimoError) as caught:
        VQGAN.from_file(checkpoint)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "\n" not in message


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(DimoError, match=r"cannot read weights .*cut\.safetensors"):
        VQGAN.from_file(tmp_path / "cut.safetensors")
