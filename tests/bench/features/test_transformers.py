"""DINOv2 and CLIP at a small size, against a vision transformer written out here."""

import math

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from bench.features import clip, load_extractor
from bench.features.clip import make_clip
from bench.features.dinov2 import make_dinov2
from bench.features.resize import pil_bicubic_bytes, torch_bicubic
from bench.protocol.catalog import ANY
from bench.protocol.networks import EXTRACTORS
from dimo.errors import DimoError
from dimo.weights.files import save_tensors

CPU = torch.device("cpu")
WIDTH, HEADS, DEPTH, PATCH = 128, 2, 2, 14


def _draw(shapes, seed=0):
    """Weights that are neither so small nor so alike that a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {key: w / math.sqrt(w.shape[-1]) if w.ndim > 1 else w for key, w in drawn.items()}


def _attend(x, qkv_weight, qkv_bias):
    """Attention of [B, L, D] in HEADS parts, before its last projection."""
    qkv = (x @ qkv_weight.T + qkv_bias).unflatten(-1, (3, HEADS, WIDTH // HEADS))  # [B, L, 3, h, d]
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
    weights = (queries @ keys.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2)


def _patches(images, kernel):
    """Convolution with a stride of its own size, as a product; [B, L, D]."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2) @ kernel.flatten(1).T


def _norm(x, state, name, epsilon):
    return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def _linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


# --- DINOv2: the official file is for 518 x 518 pixels, 37 x 37 patches ---------------------------


def _dinov2_shapes():
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + 37 * 37, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(DEPTH):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (WIDTH,)
        for name in ("ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (WIDTH,)
        for name, (rows, columns) in linear.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows * WIDTH, columns * WIDTH)
            shapes[f"blocks.{i}.{name}.bias"] = (rows * WIDTH,)
    return shapes


def _dinov2_forward(state, images):
    """Images of 224 x 224 levels -> normalised class token, as the official network does it."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = _patches((images / 255 - mean) / std, state["patch_embed.proj.weight"])
    x = x + state["patch_embed.proj.bias"]
    grid = state["pos_embed"][:, 1:].view(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    assert grid.shape[2:] == (16, 16)
    x = x + grid.permute(0, 2, 3, 1).reshape(1, 256, WIDTH)
    token = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), 1, WIDTH)
    x = torch.cat([token, x], 1)
    for i in range(DEPTH):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items()}
        before = _norm(x, block, "norm1", 1e-6)
        heads = _attend(before, block["attn.qkv.weight"], block["attn.qkv.bias"])
        x = x + block["ls1.gamma"] * _linear(heads, block, "attn.proj")
        hidden = F.gelu(_linear(_norm(x, block, "norm2", 1e-6), block, "mlp.fc1"))
        x = x + block["ls2.gamma"] * _linear(hidden, block, "mlp.fc2")
    return _norm(x[:, 0], state, "norm", 1e-6)


def _small_dinov2(state):
    return make_dinov2(state, name="small", embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS).eval()


@torch.inference_mode()
def test_dinov2_is_the_official_network(make_images):
    state = _draw(_dinov2_shapes())
    images = make_images(3, 100, 130)
    found = _small_dinov2(state)(images)
    assert found.keys() == {"features"}
    expected = _dinov2_forward(state, pil_bicubic_bytes(images, 224))
    assert (found["features"] - expected).norm() <= 1e-5 * expected.norm()


def test_dinov2_takes_timms_file_too():
    state = _draw(_dinov2_shapes())
    timms = {key: value for key, value in state.items() if key != "mask_token"}
    ours, theirs = _small_dinov2(state).state_dict(), _small_dinov2(timms).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_positions_of_the_wanted_size_stay_as_they_are():
    state = _draw(_dinov2_shapes() | {"pos_embed": (1, 257, WIDTH)})
    found = _small_dinov2(state).network.pos_embed
    assert torch.equal(found, state["pos_embed"])


@pytest.mark.parametrize("shape", [(1, 1371, WIDTH), (1, 1370, WIDTH + 1), (1370, WIDTH), (1370,)])
def test_other_positions_are_refused(shape):
    with pytest.raises(DimoError, match=r"pos_embed of shape \[.*give dinov2_vitl14_pretrain.pth"):
        _small_dinov2(_draw(_dinov2_shapes() | {"pos_embed": shape}))


def test_weights_with_registers_are_refused():
    state = _draw(_dinov2_shapes() | {"register_tokens": (1, 4, WIDTH)})
    with pytest.raises(DimoError, match=r"1 unexpected \(register_tokens\)"):
        _small_dinov2(state)


def test_dinov2_is_vit_l_14_at_224():
    """The official keys and shapes, and the size that the table promises."""
    with torch.device("meta"):
        network = timm.create_model("vit_large_patch14_dinov2", pretrained=False, num_classes=0)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert shapes["pos_embed"] == (1, 1370, 1024)
    assert {key.split(".", 2)[2] for key in shapes if key.startswith("blocks.23.")} == {
        key.split(".", 2)[2] for key in _dinov2_shapes() if key.startswith("blocks.1.")
    }
    assert {key for key in _dinov2_shapes() if "blocks" not in key} - {"mask_token"} == {
        key for key in shapes if "blocks" not in key
    }


# --- CLIP -----------------------------------------------------------------------------------------

CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "layers": DEPTH, "width": WIDTH, "patch_size": PATCH},
    "text_cfg": {"context_length": 4, "vocab_size": 5, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_state():
    network = open_clip.CLIP(**CONFIG)
    return _draw({key: value.shape for key, value in network.state_dict().items()})


def _clip_forward(state, images):
    """Images of 56 x 56 levels -> embeddings, with OpenAI's normalisation and QuickGELU."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    x = _patches((images / 255 - mean) / std, state["conv1.weight"])
    x = torch.cat([state["class_embedding"].expand(len(x), 1, WIDTH), x], 1)
    x = _norm(x + state["positional_embedding"], state, "ln_pre", 1e-5)
    for i in range(DEPTH):
        prefix = f"transformer.resblocks.{i}."
        block = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        before = _norm(x, block, "ln_1", 1e-5)
        heads = _attend(before, block["attn.in_proj_weight"], block["attn.in_proj_bias"])
        x = x + _linear(heads, block, "attn.out_proj")
        hidden = _linear(_norm(x, block, "ln_2", 1e-5), block, "mlp.c_fc")
        x = x + _linear(hidden * torch.sigmoid(1.702 * hidden), block, "mlp.c_proj")
    return _norm(x[:, 0], state, "ln_post", 1e-5) @ state["proj"]


@pytest.mark.parametrize(
    ("resize", "resizer"), [("pil-bicubic", pil_bicubic_bytes), ("torch-bicubic", torch_bicubic)]
)
@torch.inference_mode()
def test_clip_is_openais_image_tower(clip_state, make_images, resize, resizer):
    images = make_images(3, 70, 101)
    found = make_clip(clip_state, resize, CONFIG, name="small").eval()(images)
    assert found.keys() == {"features"}
    expected = _clip_forward(clip_state, resizer(images[..., 15:85], 56))
    assert (found["features"] - expected).norm() <= 1e-5 * expected.norm()
    assert (expected.norm(dim=1) - 1).abs().min() > 0.1  # not normalised


@torch.inference_mode()
def test_clip_needs_only_the_image_tower(clip_state, make_images):
    tower = {key: value for key, value in clip_state.items() if key.startswith("visual.")}
    images = make_images(1, 56, 56)
    few, all_of_it = (
        make_clip(state, "pil-bicubic", CONFIG, name="small").eval()(images)["features"]
        for state in (tower, clip_state)
    )
    assert torch.equal(few, all_of_it)


def test_clip_without_a_tower_or_of_another_size_is_refused(clip_state):
    with pytest.raises(DimoError, match=r"no keys that begin with 'visual\.'"):
        make_clip({"proj": torch.zeros(1)}, "pil-bicubic", CONFIG, name="small")
    other = CONFIG | {"embed_dim": 25}
    with pytest.raises(DimoError, match=r"of other shape \(proj: "):
        make_clip(clip_state, "pil-bicubic", other, name="small")


def test_the_architecture_is_the_one_with_quick_gelu():
    config = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    assert (config["embed_dim"], config["vision_cfg"]["image_size"]) == (768, 336)
    assert config["quick_gelu"]
    assert set(EXTRACTORS["clip-vit-l-14-336"].resizes) <= clip._RESIZERS.keys()


class _Holder(nn.Module):
    """An archive as OpenAI's: half precision, with both towers' weights."""

    def __init__(self, state):
        super().__init__()
        self.visual = nn.ParameterDict()
        for key, value in state.items():
            if key == "visual.proj":
                self.visual.register_parameter("proj", nn.Parameter(value.half()))

    def forward(self) -> torch.Tensor:
        return self.visual.proj


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_openais_archive_is_read_for_its_weights(clip_state, tmp_path):
    torch.jit.script(_Holder(clip_state)).save(tmp_path / "clip.pt")
    arguments = {"sha256": ANY, "weights": tmp_path / "clip.pt", "device": CPU}
    with pytest.raises(DimoError, match="--allow-code"):
        load_extractor("clip-vit-l-14-336", **arguments)
    with pytest.raises(DimoError, match=r"missing \(class_embedding, \.\.\.\), 1 of other shape"):
        load_extractor("clip-vit-l-14-336", allow_code=True, **arguments)
    save_tensors(tmp_path / "clip.safetensors", {"visual.proj": torch.zeros(1024, 768)})
    arguments["weights"] = tmp_path / "clip.safetensors"
    with pytest.raises(DimoError, match=r"missing \(class_embedding, \.\.\.\); check"):
        load_extractor("clip-vit-l-14-336", **arguments)
