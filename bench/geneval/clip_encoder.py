"""CLIP ViT-L/14 as GenEval's colour classifier uses it, with open_clip's network.

open_clip 2.20, which GenEval pins, took QuickGELU for OpenAI's weights by itself; later versions
do so only under the name that ends in `-quickgelu`.
"""

__all__ = ["ClipEncoder", "load_clip_encoder"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch import Tensor

from bench.features.resize import pil_central_square
from bench.features.torchscript import is_torchscript, load_torchscript
from dimo.weights import load_state_dict, read_state_dict

_ARCHITECTURE = "ViT-L-14-quickgelu"
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archive
_BATCH = 32

_Pixels = npt.NDArray[np.uint8]


class ClipEncoder:
    """Images and texts -> embeddings, not normalised.

    Args:
        network: open_clip's.
        side: Height and width of its images.
        device: Where it is.
    """

    def __init__(self, network: open_clip.CLIP, side: int, device: torch.device) -> None:
        self.network, self.side, self.device = network.to(device).eval(), side, device
        self._mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device).view(3, 1, 1)
        self._tokenize = open_clip.get_tokenizer(_ARCHITECTURE)

    @torch.inference_mode()
    def images(self, images: Sequence[_Pixels]) -> npt.NDArray[np.float32]:
        """uint8 images [h, w, 3] of any size -> float32 [N, D]."""
        rows: list[Tensor] = []
        for start in range(0, len(images), _BATCH):
            squares = [pil_central_square(i, self.side) for i in images[start : start + _BATCH]]
            levels = torch.from_numpy(np.stack(squares)).to(self.device).permute(0, 3, 1, 2)
            rows.append(self.network.encode_image((levels / 255 - self._mean) / self._std))
        found: npt.NDArray[np.float32] = torch.cat(rows).float().cpu().numpy()
        return found

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Texts -> float32 [N, D]."""
        tokens = self._tokenize(list(texts)).to(self.device)
        found: npt.NDArray[np.float32] = self.network.encode_text(tokens).float().cpu().numpy()
        return found


def load_clip_encoder(
    weights: Path, device: torch.device, config: dict[str, Any] | None = None
) -> ClipEncoder:
    """The network of OpenAI's `ViT-L-14.pt`, or of a checkpoint with open_clip's keys.

    Args:
        weights: The file.
        device: Where the network shall be.
        config: As `open_clip.get_model_config` gives it; None: of ViT-L/14 with QuickGELU.

    Raises:
        DimoError: Unreadable file, or weights of another network.
    """
    if is_torchscript(weights):
        state = load_torchscript(weights).state_dict()
    else:
        state = read_state_dict(weights)
    state = {key: value.float() for key, value in state.items() if key not in _NOT_WEIGHTS}
    config = config or open_clip.get_model_config(_ARCHITECTURE)
    assert config is not None
    network = open_clip.CLIP(**config)
    load_state_dict(network, state, name=str(weights))
    return ClipEncoder(network, int(config["vision_cfg"]["image_size"]), device)
