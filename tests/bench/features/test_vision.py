"""The networks of FDr6 at a small size: timm's own, fed by hand, and open_clip's tower."""

import dataclasses
import math
import re

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

from bench.features import load_extractor
from bench.features.extraction import Networks
from bench.features.vision import VISION, make_vision
from bench.protocol.catalog import ANY
from bench.protocol.networks import EXTRACTORS
from dimo.errors import DimoError
from dimo.weights.files import save_tensors

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES = {  # small networks, each with positions of another grid than its images have
    "convnextv2-b": {"dims": (8, 8, 16, 24), "depths": (1, 1, 1, 1)},
    "dinov2-vit-l-14": {**VIT, "img_size": 70},
    "mae-vit-l-16": {**VIT, "img_size": 48},
    "siglip2-so400m-16": {**VIT, "img_size": 64},
    "clip-vit-l-14": {**VIT, "img_size": 28},
}
SIDES = dict(zip(SIZES, (40, 32, 48, 48, 40), strict=True))  # two are no multiple of 14


def small(name, **changes):
    return dataclasses.replace(VISION[name], **{"side": SIDES[name], **changes})


def draw(network, seed=0):
    """Weights that are neither so small nor so alike that a mistake would not show."""
    rng = torch.Generator().manual_seed(seed)
    drawn = {k: torch.randn(v.shape, generator=rng) for k, v in network.state_dict().items()}
    return {k: w / math.sqrt(w[0].numel()) if w.ndim > 1 else w for k, w in drawn.items()}


def network_of(name, **changes):
    return timm.create_model(VISION[name].architecture, **{**SIZES[name], **changes}).eval()


def by_hand(name, state, images):
    """Resized, normalised and filled up here; positions interpolated here; timm does the rest."""
    side, sizes = SIDES[name], {}
    levels = F.interpolate(images.float() / 255, (side, side), mode="bicubic", antialias=True)
    config = timm.get_pretrained_cfg(VISION[name].architecture)
    mean, std = (torch.tensor(getattr(config, key)).view(3, 1, 1) for key in ("mean", "std"))
    levels = (levels - mean) / std
    if name != "convnextv2-b":
        patch = 14 if "14" in name else 16
        grid = -(-side // patch)
        levels = F.pad(levels, (0, grid * patch - side, 0, grid * patch - side))
        sizes["img_size"], prefix = grid * patch, 0 if "siglip" in name else 1
        table = state["pos_embed"][:, prefix:].transpose(1, 2)
        table = table.unflatten(2, [math.isqrt(table.shape[2])] * 2)
        table = F.interpolate(table, (grid, grid), mode="bicubic", antialias=True)
        table = torch.cat([state["pos_embed"][:, :prefix], table.flatten(2).transpose(1, 2)], 1)
        state = state | {"pos_embed": table}
    network = network_of(name, num_classes=0, **sizes)
    network.load_state_dict(state)
    found = network.forward_features(levels)
    if name == "convnextv2-b":
        return found.flatten(2).mean(2)
    return network.attn_pool(found) if "siglip" in name else found[:, 0]


@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_features_are_those_of_timms_network(name, make_images):
    state, images = draw(network_of(name, num_classes=0)), make_images(3, 64, 80)
    network = make_vision(state, small(name), name="small", **SIZES[name]).eval()
    found, expected = network(images)["features"], by_hand(name, state, images)
    assert found.shape == (3, network.width)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@torch.inference_mode()
def test_clip_is_openais_tower_with_plain_gelu(make_images):
    """OpenAI's layout; features are what its projection takes. The published numbers have GELU."""
    vision = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
    text = {"context_length": 4, "vocab_size": 5, "width": 16, "heads": 2, "layers": 1}
    towers = [
        open_clip.CLIP(embed_dim=24, quick_gelu=quick, vision_cfg=vision, text_cfg=text).eval()
        for quick in (False, True)
    ]
    state, images = draw(towers[0]), make_images(3, 28, 28)
    network = make_vision(
        state, small("clip-vit-l-14", side=28), name="small", **SIZES["clip-vit-l-14"]
    )
    found = network.eval()(images)["features"] @ state["visual.proj"]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    levels = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for tower in towers:
        tower.load_state_dict(state)
    plain, quick = (tower.visual(levels) for tower in towers)
    assert (found - plain).norm() <= 1e-6 * plain.norm()
    assert (found - quick).norm() > 1e-3 * quick.norm()


@pytest.mark.parametrize("name", ["convnextv2-b", "dinov2-vit-l-14", "siglip2-so400m-16"])
def test_files_of_the_sources_are_translated(name):
    """ConvNeXt's own keys, DINOv2's mask token, open_clip's prefix and text tower; classifiers."""
    own = draw(network_of(name, num_classes=0))
    given = {k: v for k, v in draw(network_of(name, num_classes=5)).items() if k not in own} | own
    if name == "convnextv2-b":
        renamed = (
            (r"stem\.", "downsample_layers.0."),
            (r"stages\.(\d)\.downsample", r"downsample_layers.\1"),
            (r"\.blocks\.", "."),
            (r"conv_dw", "dwconv"),
            (r"mlp\.grn\.weight", "grn.gamma"),
            (r"mlp\.grn\.bias", "grn.beta"),
            (r"mlp\.fc", "pwconv"),
            (r"head\.norm", "norm"),
            (r"head\.fc", "head"),
        )
        for old, new in renamed:
            given = {re.sub(old, new, key): value for key, value in given.items()}
        given = {k: v.view(1, 1, 1, -1) if "grn" in k else v for k, v in given.items()}
    elif name == "dinov2-vit-l-14":
        given["mask_token"] = torch.zeros(1, 32)
    else:
        given = {f"visual.trunk.{key}": value for key, value in given.items()}
        given |= {"text.token_embedding.weight": torch.zeros(3, 4), "logit_scale": torch.zeros(1)}
    found = make_vision(given, small(name), name="small", **SIZES[name]).network.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_other_weights_are_refused(tmp_path):
    clip, mae = (draw(network_of(n, num_classes=0)) for n in ("clip-vit-l-14", "mae-vit-l-16"))
    cases = (
        (
            "clip-vit-l-14",
            clip,
            {"img_size": 42},
            r"positions of shape \[1, 5, 32\]; allowed: .*10",
        ),
        ("dinov2-vit-l-14", clip, {"img_size": 28}, r"missing \(blocks.0.ls1.gamma"),
        ("convnextv2-b", mae, {}, r"do not fit convnextv2_base\.fcmae_ft_in22k_in1k"),
    )
    for name, state, sizes, message in cases:
        with pytest.raises(DimoError, match=message):
            make_vision(state, small(name), name="small", **(SIZES[name] | sizes))
    save_tensors(tmp_path / "x.safetensors", mae)
    given = {"sha256": ANY, "weights": tmp_path / "x.safetensors", "device": torch.device("cpu")}
    with pytest.raises(DimoError, match=r"positions of shape \[1, 10, 32\]; allowed: .*197, 1024"):
        load_extractor("mae-vit-l-16", **given)


def test_the_networks_are_as_wide_as_published():
    """Features of 2048, 1024, 1024, 1024, 1152 and 1024 numbers, and the published sides."""
    parts = EXTRACTORS["six"].parts
    widths = {}
    for name, (row, _) in parts.items():
        if row != "inception":
            with torch.device("meta"):
                few = {"depths": (1, 1, 1, 1)} if name == "convnext" else {"depth": 1}
                widths[name] = timm.create_model(VISION[row].architecture, **few).num_features
    assert widths == {"convnext": 1024, "dinov2": 1024, "mae": 1024, "siglip2": 1152, "clip": 1024}
    assert [VISION[row].side for row in SIZES] == [224, 256, 224, 224, 256]
    assert all(resize in EXTRACTORS[row].resizes for row, resize in parts.values())


class Mean(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, images):
        return {"features": images.double().mean((1, 2, 3))[:, None].expand(-1, self.width)}


def test_features_stand_side_by_side(make_images):
    network = Networks({"a": Mean(3), "b": Mean(2)})
    assert network.columns == {"a": slice(0, 3), "b": slice(3, 5)}
    assert network(make_images(4, 2, 2))["features"].shape == (4, 5)
