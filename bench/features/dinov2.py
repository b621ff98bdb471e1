"""DINOv2 ViT-L/14, the features of FD-DINOv2 (arXiv:2306.04675), with timm's network.

FDr6 takes the same weights at another size, see `bench.features.vision`.
"""

import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.features import vision
from bench.features.resize import pil_bicubic_bytes
from dimo.errors import DimoError
from dimo.weights.files import load_state_dict, read_state_dict

_ARCHITECTURE = "vit_large_patch14_dinov2.lvd142m"
_SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, on the scale 0 to 1


class DINOv2(nn.Module):
    """uint8 images [B, 3, H, W] -> features [B, D]: the class token after the last normalisation.

    Images are resized as bytes, antialiased, to `side` x `side`, ignoring their aspect.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network, self.side = network, side
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels = pil_bicubic_bytes(images, self.side)
        return {"features": self.network((levels / 255 - self.mean) / self.std)}


def load_dinov2(weights: Path, resize: str) -> nn.Module:
    """The network of `dinov2_vitl14`, from the official file or timm's safetensors.

    `resize` is "pil-bicubic", to 224 pixels, or FDr6's "torch-antialias", to 256.

    Raises: DimoError: Unreadable file, or weights of another network.
    """
    if resize == "torch-antialias":
        return vision.load_dinov2(weights, resize)
    return make_dinov2(read_state_dict(weights), name=str(weights))


def make_dinov2(
    state: dict[str, Tensor], *, name: str, side: int = _SIDE, **architecture: Any
) -> DINOv2:
    """The network of a state dict, at `side` x `side` pixels, a multiple of 14.

    Keys are those of the official file, i.e. timm's but for `mask_token`; `name` names the weights
    in errors; `architecture` changes timm's `vit_large_patch14_dinov2`, e.g. `depth`.
    """
    with torch.device("meta"):  # nothing is drawn that is overwritten anyway
        network = timm.create_model(
            _ARCHITECTURE, pretrained=False, num_classes=0, img_size=side, **architecture
        )
    network = network.to_empty(device="cpu")
    positions = network.get_parameter("pos_embed")
    state = {key: value for key, value in state.items() if key != "mask_token"}
    if "pos_embed" in state:
        state["pos_embed"] = _resize_positions(state["pos_embed"], positions, name)
    load_state_dict(network, state, name=name)
    return DINOv2(network, side)


def _resize_positions(given: Tensor, own: Tensor, name: str) -> Tensor:
    """Position embeddings [1, 1 + M * M, D] for another number of patches.

    The official interpolation: bicubic, no antialiasing, 0.1 added to the number of patches.
    """
    if given.shape == own.shape:
        return given
    old, new = (math.isqrt(t.shape[1] - 1) if t.ndim == 3 else 0 for t in (given, own))
    if old == 0 or given.shape != (1, 1 + old * old, own.shape[2]):
        raise DimoError(
            f"weights {name} have a pos_embed of shape {list(given.shape)}; allowed: "
            f"[1, 1 + M * M, {own.shape[2]}]; give dinov2_vitl14_pretrain.pth"
        )
    grid = given[:, 1:].float().transpose(1, 2).reshape(1, -1, old, old)  # [1, D, M, M]
    scale = (new + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([given[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)
