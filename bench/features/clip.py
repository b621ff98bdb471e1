"""CLIP ViT-L/14 at 336 pixels, the features of CMMD (arXiv:2401.09603), with open_clip's network.

The published weights were trained with QuickGELU; plain GELU loads them too and is wrong.
"""

__all__ = ["CLIPImages", "load_clip", "make_clip"]

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from bench.features.resize import Resizer, pil_bicubic_bytes, torch_bicubic
from bench.features.torchscript import is_torchscript, load_torchscript
from dimo.errors import DimoError
from dimo.weights import load_state_dict, read_state_dict

_ARCHITECTURE = "ViT-L-14-336-quickgelu"
_RESIZERS: dict[str, Resizer] = {
    "pil-bicubic": pil_bicubic_bytes,
    "torch-bicubic": torch_bicubic,
}
_TOWER = "visual."  # what the keys of the image tower begin with


class CLIPImages(nn.Module):
    """uint8 images [B, 3, H, W] -> features [B, D]: image embeddings, not normalised.

    The largest central square is taken first, as CMMD's code does.

    Args:
        tower: open_clip's image tower.
        side: Height and width of its images.
        resize: "pil-bicubic", on bytes and antialiased as CMMD's code, or "torch-bicubic".
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, side: int, resize: str) -> None:
        super().__init__()
        self.tower, self.side, self.resize = tower, side, resize
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[2:]
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        square = images[:, :, top : top + short, left : left + short]
        levels = _RESIZERS[self.resize](square, self.side)
        return {"features": self.tower((levels / 255 - self.mean) / self.std)}


def load_clip(weights: Path, resize: str) -> CLIPImages:
    """The image tower of OpenAI's ViT-L/14 at 336 pixels.

    Args:
        weights: OpenAI's archive, or a state dict with open_clip's keys.
        resize: As for `CLIPImages`.

    Raises:
        DimoError: Unreadable file, or weights of another network.
    """
    if is_torchscript(weights):
        state = load_torchscript(weights).state_dict()
    else:
        state = read_state_dict(weights)
    config = open_clip.get_model_config(_ARCHITECTURE)
    assert config is not None
    return make_clip(state, resize, config, name=str(weights))


def make_clip(
    state: dict[str, Tensor], resize: str, config: dict[str, Any], *, name: str
) -> CLIPImages:
    """The image tower of a state dict; what belongs to the text tower is left out.

    Args:
        state: Keys as in OpenAI's archive and open_clip's checkpoints.
        resize: As for `CLIPImages`.
        config: As `open_clip.get_model_config` gives it.
        name: Of the weights, for errors.
    """
    state = {k.removeprefix(_TOWER): v for k, v in state.items() if k.startswith(_TOWER)}
    if not state:
        raise DimoError(
            f"weights {name} have no keys that begin with {_TOWER!r}; give OpenAI's "
            "ViT-L-14-336px.pt, or a checkpoint of open_clip"
        )
    with torch.device("meta"):  # nothing is drawn that is overwritten anyway
        tower = open_clip.CLIP(**config).visual
    tower = tower.to_empty(device="cpu")
    load_state_dict(tower, state, name=name)
    return CLIPImages(tower, int(config["vision_cfg"]["image_size"]), resize)
