"""The Halton-MaskGIT network against the official one."""

import pytest
import torch

from dimo.errors import DimoError
from dimo.models.halton import SIZES, HaltonMaskGIT
from dimo.weights.files import load_state_dict, read_state_dict, save_tensors

CASE = "halton_transformer"
FILE = f"{CASE}.weights.safetensors"


@pytest.fixture(scope="module")
def model(golden, golden_constructor):
    return HaltonMaskGIT.from_official(golden / FILE, **golden_constructor[CASE])


@torch.inference_mode()
def test_logits_equal_the_official_network(model, golden_arrays, assert_relative):
    data = golden_arrays(CASE)
    tokens, labels = data["tokens"].flatten(1), data["labels"]
    everyone = torch.ones_like(labels, dtype=torch.bool)
    for name, drop in (
        ("logits", None),
        ("logits", ~everyone),
        ("logits_mixed_drop", data["drop_label"]),
        ("logits_all_drop", everyone),
    ):
        assert_relative(model(tokens, labels, drop=drop), data[name])


def test_a_trainer_checkpoint_loads(golden, golden_constructor, tmp_path, golden_arrays):
    state = read_state_dict(golden / FILE)
    wrapped = {f"module.{key}": value for key, value in state.items()}  # as from several GPUs
    content = {"iter": 3, "global_epoch": 1, "model_state_dict": wrapped}
    torch.save({**content, "optimizer_state_dict": None}, tmp_path / "current.pth")
    model = HaltonMaskGIT.from_official(tmp_path / "current.pth", **golden_constructor[CASE])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def expected_shapes(dim, depth, heads, feed_forward, tokens):
    """Names and shapes of the official state dict, written out from the facts."""
    attention = dim // heads * heads
    shapes = {
        "tok_emb.weight": (16385, dim),
        "cls_emb.weight": (1001, dim),
        "pos_emb.weight": (tokens, dim),
        "reg_tokens.weight": (1, dim),
        "last_norm.norm_final.weight": (dim,),
        "last_norm.norm_final.bias": (dim,),
        "last_norm.mlp.1.weight": (2 * dim, dim),
        "last_norm.mlp.1.bias": (2 * dim,),
        "head.weight": (16385, dim),
        "head.bias": (16385,),
    }
    for layer in range(depth):
        parts = {
            "mlp.1.weight": (6 * dim, dim),
            "mlp.1.bias": (6 * dim,),
            "ln1.weight": (dim,),
            "ln2.weight": (dim,),
            "attn.wq.weight": (attention, dim),
            "attn.wk.weight": (attention, dim),
            "attn.wv.weight": (attention, dim),
            "attn.wo.weight": (dim, attention),
            "ff.w1.weight": (feed_forward, dim),
            "ff.w2.weight": (dim, feed_forward),
            "ff.w3.weight": (feed_forward, dim),
        }
        shapes |= {f"transformer.layers.{layer}.{key}": shape for key, shape in parts.items()}
    return shapes


@pytest.mark.parametrize(
    ("size", "sizes", "millions"),
    [
        ("tiny", (384, 6, 6, 1024), 23),
        ("small", (512, 12, 6, 1536), 69),
        ("base", (768, 12, 12, 2048), 142),
        ("large", (1024, 24, 16, 2816), 480),
    ],
)
@pytest.mark.parametrize("side", [16, 24])
def test_full_sizes_have_the_official_names_and_shapes(size, sizes, millions, side):
    with torch.device("meta"):
        model = HaltonMaskGIT(**SIZES[size], input_size=side)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected_shapes(*sizes, side * side)
    in_positions = (side * side - 256) * model.hidden_dim  # the published counts are at 256 pixels
    parameters = sum(p.numel() for p in model.parameters()) - in_positions
    assert round(parameters / 1e6) == millions


@torch.inference_mode()
def test_logits_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = HaltonMaskGIT(
        input_size=4, hidden_dim=64, codebook_size=32, depth=2, heads=4, mlp_dim=128, nclass=10
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # adaLN-zero would hide everything
    tokens, labels = torch.randint(33, (64, 16)), torch.randint(10, (64,))
    whole = model(tokens, labels)
    for size in (1, 7):
        pieces = zip(tokens.split(size), labels.split(size), strict=True)
        assert torch.equal(torch.cat([model(t, c) for t, c in pieces]), whole)


@torch.inference_mode()
def test_embedding_noise_replaces_the_visual_tokens_only(model, golden_arrays):
    data = golden_arrays(CASE)
    tokens, labels = data["tokens"].flatten(1), data["labels"]
    noise = torch.randn(*tokens.shape, model.hidden_dim)
    logits = [
        model(t, labels, embedding_noise=1.0, noise=noise)
        for t in (tokens, torch.zeros_like(tokens))
    ]
    assert torch.equal(*logits)
    as_embedding = model.tok_emb.weight[tokens]
    unchanged = model(tokens, labels, embedding_noise=0.6, noise=as_embedding / 3)
    torch.testing.assert_close(unchanged, model(tokens, labels), atol=1e-5, rtol=1e-5)


def test_a_fresh_network_trains(golden_constructor):
    torch.manual_seed(0)
    model = HaltonMaskGIT(**golden_constructor[CASE]).train()
    tokens, labels = torch.full((2, 16), model.mask_token_id), torch.tensor([1, 4])
    model(tokens, labels, drop=torch.tensor([True, False])).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients["transformer.layers.0.mlp.1.weight"].abs().sum() > 0
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_tied_weights_survive_a_file_and_must_agree(model, golden_constructor, tmp_path):
    path = tmp_path / "saved.safetensors"
    save_tensors(path, model.state_dict())
    again = HaltonMaskGIT.from_official(path, **golden_constructor[CASE])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    state = read_state_dict(path)
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(DimoError, match=r"head\.weight.* one tensor .* differ"):
        load_state_dict(again, state)


def test_merged_tokens_are_refused(golden_constructor):
    with pytest.raises(DimoError, match="proj 2 is not supported"):
        HaltonMaskGIT(**{**golden_constructor[CASE], "proj": 2})
