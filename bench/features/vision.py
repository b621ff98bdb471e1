"""The five networks of FDr6 beside Inception (FD-loss, arXiv:2604.28190), by timm.

Everything is as in DiffusionBench's evaluator (nanovisionx/nanogen-evals), which follows FD-loss:
bicubic, antialiased resize of float tensors, without clipping; where patches do not divide the side
zeros fill it up after normalisation (256 pixels are 19 x 19 patches of 14); timm interpolates the
positions. On a GPU the transformers compute in bfloat16, but for attention pooling; FD-loss itself
has bfloat16 there and in ConvNeXt, too. CLIP has plain GELU, as timm's network of that name, though
it was trained with QuickGELU.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from bench.features import read_weights
from bench.features.resize import torch_bicubic_antialias
from dimo.errors import DimoError
from dimo.weights.files import load_state_dict

_POSITIONS = ("pos_embed", "visual.positional_embedding", "visual.trunk.pos_embed")
_CLASSIFIER = ("head.weight", "head.bias", "head.fc.")  # what else files hold


@dataclass(frozen=True)
class VisionKind:
    """A network of timm: its name there, the side of its images, what its features are."""

    architecture: str
    side: int
    pool: Literal["class token", "attention", "mean"]


VISION: Mapping[str, VisionKind] = {  # by name in EXTRACTORS
    "convnextv2-b": VisionKind("convnextv2_base.fcmae_ft_in22k_in1k", 224, "mean"),
    "dinov2-vit-l-14": VisionKind("vit_large_patch14_dinov2.lvd142m", 256, "class token"),
    "mae-vit-l-16": VisionKind("vit_large_patch16_224.mae", 224, "class token"),
    "siglip2-so400m-16": VisionKind("vit_so400m_patch16_siglip_256.v2_webli", 224, "attention"),
    "clip-vit-l-14": VisionKind("vit_large_patch14_clip_224.openai", 256, "class token"),
}


class Vision(nn.Module):
    """uint8 images [B, 3, H, W] -> features [B, width], after the last normalisation of a
    transformer, before that of ConvNeXt.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, kind: VisionKind) -> None:
        super().__init__()
        self.network, self.kind = network, kind
        self.width = int(network.num_features)
        for name in ("mean", "std"):
            levels = 255 * torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, levels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels = (torch_bicubic_antialias(images, self.kind.side) - self.mean) / self.std
        reduced = images.is_cuda and self.kind.pool != "mean"
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=reduced):
            found = self.network.forward_features(levels)  # [B, L, D], of ConvNeXt [B, D, h, w]
        if self.kind.pool == "mean":
            return {"features": found.mean((2, 3))}
        pooled = self.network.attn_pool(found) if self.kind.pool == "attention" else found[:, 0]
        return {"features": pooled}


def _load(name: str, weights: Path, resize: str) -> Vision:
    """The network with the weights of its source's file, or of timm's or open_clip's.

    Raises: DimoError: Unreadable file, or weights of another network.
    """
    return make_vision(read_weights(weights), VISION[name], name=str(weights))


load_convnextv2: Callable[[Path, str], Vision] = partial(_load, "convnextv2-b")
load_dinov2: Callable[[Path, str], Vision] = partial(_load, "dinov2-vit-l-14")
load_mae: Callable[[Path, str], Vision] = partial(_load, "mae-vit-l-16")
load_siglip2: Callable[[Path, str], Vision] = partial(_load, "siglip2-so400m-16")
load_clip: Callable[[Path, str], Vision] = partial(_load, "clip-vit-l-14")


def make_vision(state: dict[str, Tensor], kind: VisionKind, *, name: str, **sizes: Any) -> Vision:
    """The network of a state dict, whose keys timm knows how to translate.

    `name` names the weights in errors; `sizes` changes timm's network, e.g. `depth`.
    """
    if kind.pool != "mean":  # transformers for any side
        sizes |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    with torch.device("meta"):  # nothing is drawn that is overwritten anyway
        network: Any = timm.create_model(kind.architecture, num_classes=0, **sizes)
    network = network.to_empty(device="cpu")
    given = next((state[key] for key in _POSITIONS if key in state), None)
    own: Tensor | None = getattr(network, "pos_embed", None)
    if given is not None and own is not None and given.shape[-2:] != own.shape[-2:]:
        # timm would interpolate them
        raise DimoError(
            f"weights {name} have positions of shape {list(given.shape)}; allowed: "
            f"[..., {own.shape[-2]}, {own.shape[-1]}]; give the file of {kind.architecture}"
        )
    translate = importlib.import_module(type(network).__module__).checkpoint_filter_fn
    try:
        state = translate(dict(state), network)
    except (KeyError, RuntimeError) as error:
        raise DimoError(
            f"weights {name} do not fit {kind.architecture}: {' '.join(str(error).split())[:200]}; "
            "give the file of that network"
        ) from error
    load_state_dict(network, state, name=name, ignore=_CLASSIFIER)
    return Vision(network, kind)
