"""The Meissonic transformer against its golden values; its official folder; its full size."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimo.errors import DimoError
from dimo.models import TextFeatures
from dimo.models.cpu import prepare_for_inference
from dimo.models.meissonic import Meissonic
from dimo.models.meissonic_layers import rotary_tables

CASE = "meissonic_transformer"
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 10,
    "num_attention_heads": 2,
    "joint_attention_dim": 28,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (2, 4, 4),
    "vocab_size": 40,
    "codebook_size": 20,
}


@pytest.fixture
def folder(golden, tmp_path):
    """The official folder of the golden network."""
    (tmp_path / "config.json").write_bytes((golden / f"{CASE}.config.json").read_bytes())
    weights = (golden / f"{CASE}.weights.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    return tmp_path


@pytest.fixture
def data(golden_arrays):
    return golden_arrays(CASE)


def run(model, data, **inputs):
    text = TextFeatures(data["encoder_hidden_states"], data["pooled_projections"])
    arguments = {"timestep": data["timestep"], "micro_conditions": data["micro_conds"]}
    with torch.inference_mode():
        return model(data["codes"].flatten(1), text, **{**arguments, **inputs})


def logits_of(data, key):
    """[B, V, H, W] of the official network -> [B, L, V]."""
    return data[key].flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("key", "inputs"),
    [
        ("logits", {}),
        ("logits_timestep_63", {"timestep": torch.tensor([63.0])}),
        ("logits_timestep_0", {"timestep": torch.tensor([0])}),
    ],
)
def test_logits_equal_the_official_ones(folder, data, key, inputs):
    model = Meissonic.from_official(folder, input_size=8)
    torch.testing.assert_close(run(model, data, **inputs), logits_of(data, key), **TOLERANCE)


def test_embedding_noise_acts_where_it_does_officially(folder, data):
    model = Meissonic.from_official(folder, input_size=8)
    noise = data["noise"].flatten(2).transpose(1, 2)
    found = run(model, data, embedding_noise=0.3, noise=noise)
    torch.testing.assert_close(found, logits_of(data, "logits_sigma_0.3"), **TOLERANCE)
    embedded = model.embed(data["codes"].flatten(1)).detach()
    torch.testing.assert_close(embedded, logits_of(data, "embed"), **TOLERANCE)


def test_rotary_tables_equal_the_official_ones(folder, data):
    model = Meissonic.from_official(folder, input_size=8)
    ids = model.position_ids(5, torch.device("cpu"))
    assert torch.equal(ids[5:].float(), data["img_ids"])
    assert not ids[:5].any()
    cos, sin = rotary_tables(ids, SIZES["axes_dims_rope"])
    torch.testing.assert_close(cos, data["rope_cos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, data["rope_sin"], atol=1e-6, rtol=0)


def test_the_timestep_is_1000_times_the_masked_share(folder, data):
    """As in Meissonic's own training; not the steps left, and not 0."""
    model = Meissonic.from_official(folder, input_size=8)
    share = (data["codes"] == 39).double().mean((1, 2))
    assert 0 < share.min() < share.max() < 1
    own = run(model, data, timestep=None)
    torch.testing.assert_close(own, run(model, data, timestep=(1000 * share).float()))
    for other in (torch.zeros(2), torch.tensor([63.0]), share):
        assert (own - run(model, data, timestep=other)).abs().max() > 1e-3


def test_micro_conditions_are_those_of_the_whole_image(folder, data):
    model = Meissonic.from_official(folder, input_size=8)
    whole = torch.tensor([[128.0, 128.0, 0.0, 0.0, 6.0]] * 2)
    own = run(model, data, micro_conditions=None)
    assert torch.equal(own, run(model, data, micro_conditions=whole))
    assert not torch.equal(own, run(model, data, micro_conditions=whole + 1))


def test_logits_at_positions(folder, data):
    model = Meissonic.from_official(folder, input_size=8)
    positions = torch.tensor([[0, 63, 17] + [1] * 13, [5, 4, 3] + [2] * 13])
    whole = run(model, data)
    at = run(model, data, positions=positions)
    expected = whole.gather(1, positions[..., None].expand(-1, -1, 20))
    torch.testing.assert_close(at, expected, **TOLERANCE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_image_does_not_depend_on_the_others(precision):
    torch.manual_seed(0)
    sizes = {**SIZES, "attention_head_dim": 16, "num_attention_heads": 4}
    sizes |= {"pooled_projection_dim": 64, "axes_dims_rope": (4, 6, 6)}
    model = prepare_for_inference(Meissonic(**sizes, input_size=16).eval(), precision)
    tokens = torch.randint(20, (5, 256))
    text = TextFeatures(torch.randn(5, 77, 28), torch.randn(5, 64))
    with torch.inference_mode():
        whole = model(tokens, text)
        for count in (1, 2, 3):
            part = TextFeatures(text.states[:count], text.pooled[:count])
            assert torch.equal(model(tokens[:count], part), whole[:count])


def test_bfloat16_is_close(folder, data):
    model = prepare_for_inference(Meissonic.from_official(folder, input_size=8), "bfloat16")
    error = run(model, data) - logits_of(data, "logits")
    assert 1e-4 < error.abs().max() < 0.3
    assert error.abs().mean() < 0.03


def test_the_full_network_has_the_published_size():
    """4.03 GB in float32 (the official file), which is 1.0 billion parameters."""
    with torch.device("meta"):
        network = Meissonic()
    count = sum(p.numel() for p in network.parameters())
    assert count == 1_006_946_304
    assert round(4 * count / 1e9, 2) == 4.03
    assert network.num_tokens == 4096
    assert (network.codebook_size, network.mask_token_id, network.hidden_dim) == (8192, 8255, 1024)


def test_checkpointed_blocks_have_the_same_gradients(folder, data):
    model = Meissonic.from_official(folder, input_size=8)
    text = TextFeatures(data["encoder_hidden_states"], data["pooled_projections"])
    found = []
    for model.recomputes in (False, True):
        model.zero_grad()
        model(data["codes"].flatten(1), text).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 2}, "patch_size is 2, supported is 1"),
        ({"guidance_embeds": True}, "guidance_embeds is True"),
        ({"num_leyers": 3}, "unknown key 'num_leyers'; did you mean 'num_layers'"),
        ({"_class_name": "UVit2DModel"}, "_class_name is not"),
        ({"num_layers": 2}, "keys .* missing"),
        ({"axes_dims_rope": [2, 4, 6]}, "sum to attention_head_dim 10"),
        ({"pooled_projection_dim": 24}, "attention_head_dim x num_attention_heads = 20"),
        ({"upsample": False}, "both or none"),
        ({"codebook_size": 40}, "vocab_size 40"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_error(folder, changes, said):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DimoError, match=said):
        Meissonic.from_official(folder, input_size=8)


def test_folders_and_files_that_are_not_it(folder, tmp_path):
    weights = folder / "diffusion_pytorch_model.safetensors"
    with pytest.raises(DimoError, match="num_layers is 1, but 14 is needed"):
        Meissonic.from_official(weights, num_layers=14, input_size=8)
    with pytest.raises(DimoError, match="input_size 9"):
        Meissonic.from_official(weights, input_size=9)
    with pytest.raises(DimoError, match=r"dropout 0\.1"):
        Meissonic(**SIZES, input_size=8, dropout=0.1)
    state = load_file(weights)
    save_file({**state, "extra.weight": torch.zeros(1)}, weights)
    with pytest.raises(DimoError, match=r"1 unexpected \(extra.weight\)"):
        Meissonic.from_official(folder, input_size=8)
    (folder / "config.json").write_text("{")
    with pytest.raises(DimoError, match="not valid JSON"):
        Meissonic.from_official(folder, input_size=8)
    (folder / "config.json").unlink()
    with pytest.raises(DimoError, match=r"no config.json in"):
        Meissonic.from_official(folder, input_size=8)
