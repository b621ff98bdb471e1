"""The MaskGIT v1.0 network against the official one, and the official layouts."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimo.errors import DimoError
from dimo.models.maskgit import MaskGIT

CASE = "maskgit_v1_transformer"
LAYOUTS = [
    f"{CASE}.weights.safetensors",
    f"{CASE}.official.pth",
    f"{CASE}.dimo_pytorch_model.bin",
]


@pytest.fixture(params=LAYOUTS)
def model(request, golden, tiny_network):
    return MaskGIT.from_official(golden / request.param, **tiny_network)


@torch.inference_mode()
def test_logits_equal_the_official_network(model, golden_arrays):
    data = golden_arrays(CASE)
    tokens, labels = data["tokens"].flatten(1), data["labels"]
    everyone = torch.ones_like(labels, dtype=torch.bool)
    for name, drop in (
        ("logits_drop_none", None),
        ("logits_no_drop", ~everyone),
        ("logits_mixed_drop", data["drop_label_mixed"]),
        ("logits_all_drop", everyone),
    ):
        torch.testing.assert_close(
            model(tokens, labels, drop=drop), data[name], atol=1e-5, rtol=1e-4
        )


@torch.inference_mode()
@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_embedding_noise_equals_the_official_network(model, golden_arrays, sigma):
    data = golden_arrays(CASE)
    noise = data["noise"][:, : model.num_tokens]
    logits = model(data["tokens"].flatten(1), data["labels"], embedding_noise=sigma, noise=noise)
    torch.testing.assert_close(logits, data[f"logits_sigma_{sigma}"], atol=1e-5, rtol=1e-4)


def test_training_loss_equals_the_official_one(model, golden_arrays):
    data = golden_arrays(CASE)
    logits = model(data["tokens"].flatten(1), data["labels"], drop=data["drop_label_mixed"])
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), data["ce_target"].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(loss, data["ce_all_tokens_ls0.1"], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_logits_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = MaskGIT(
        img_size=64, hidden_dim=64, codebook_size=32, depth=2, heads=4, mlp_dim=128, nclass=10
    ).eval()
    tokens, labels = torch.randint(33, (64, 16)), torch.randint(10, (64,))
    whole = model(tokens, labels)
    for size in (1, 7):
        pieces = zip(tokens.split(size), labels.split(size), strict=True)
        assert torch.equal(torch.cat([model(t, c) for t, c in pieces]), whole)


def test_full_size_has_the_published_parameter_count():
    with torch.device("meta"):
        model = MaskGIT()
    assert sum(p.numel() for p in model.parameters()) == 174_160_874
    frozen = sum(p.numel() for p in model.embedding_parameters())
    assert frozen == 2_274_026
    assert len(model.state_dict()) == 305


def expected_shapes(tokens):
    """Names and shapes of the official state dict, written out from the facts."""
    shapes = {
        "tok_emb.weight": (2026, 768),
        "pos_emb": (1, tokens + 1, 768),
        "bias": (tokens + 1, 2026),
    }
    norms, linears = ["first_layer.0", "first_layer.4", "last_layer.0", "last_layer.4"], {}
    for layer in ("first_layer.2", "first_layer.6", "last_layer.2"):
        linears[layer] = (768, 768)
    for i in range(24):
        attention, feed_forward = (f"transformer.layers.{i}.{branch}" for branch in (0, 1))
        norms += [f"{attention}.norm", f"{feed_forward}.norm"]
        linears[f"{attention}.fn.mha.out_proj"] = (768, 768)
        linears[f"{feed_forward}.fn.net.0"] = (3072, 768)
        linears[f"{feed_forward}.fn.net.3"] = (768, 3072)
        shapes[f"{attention}.fn.mha.in_proj_weight"] = (2304, 768)
        shapes[f"{attention}.fn.mha.in_proj_bias"] = (2304,)
    for name, shape in (dict.fromkeys(norms, (768,)) | linears).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("img_size", [256, 512])
def test_full_size_has_the_official_names_and_shapes(img_size):
    with torch.device("meta"):
        state = MaskGIT(img_size=img_size).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes == expected_shapes((img_size // 16) ** 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("pos_emb"), "1 missing (pos_emb)"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected (extra)"),
        (lambda s: s.update(bias=torch.zeros(2, 2)), "1 of other shape (bias: (2, 2)"),
    ],
)
def test_every_key_and_shape_must_fit(golden, tiny_network, tmp_path, change, words):
    state = load_file(golden / LAYOUTS[0])
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(DimoError) as caught:
        MaskGIT.from_official(tmp_path / "changed.safetensors", **tiny_network)
    assert words in str(caught.value)


def test_a_pickle_with_code_is_refused(tmp_path, tiny_network):
    torch.save({"model_state_dict": pytest.approx}, tmp_path / "bad.pth")
    with pytest.raises(DimoError, match="cannot read weights"):
        MaskGIT.from_official(tmp_path / "bad.pth", **tiny_network)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_truncated_file_is_refused(golden, tiny_network, tmp_path, name):
    path = tmp_path / name
    path.write_bytes((golden / name).read_bytes()[:5000])
    with pytest.raises(DimoError, match="cannot read weights"):
        MaskGIT.from_official(path, **tiny_network)


def test_a_missing_file_is_named(tmp_path, tiny_network):
    with pytest.raises(DimoError, match="no weights file"):
        MaskGIT.from_official(tmp_path / "none.pth", **tiny_network)
