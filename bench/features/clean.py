"""NVIDIA's TorchScript Inception, the network of clean-fid: features only."""

__all__ = ["TorchScriptInception", "load_inception_torchscript"]

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bench.features.resize import pil_bicubic
from bench.features.torchscript import load_torchscript
from dimo.errors import DimoError

_SIDE = 299


class TorchScriptInception(nn.Module):
    """uint8 images [B, 3, H, W] -> features [B, 2048].

    Args:
        network: The archive: maps images of any size, and its part `layers` normalised ones.
        resize: "tf1-bilinear", which the archive does itself (clean-fid's `legacy_tensorflow`), or
            "pil-bicubic" (clean-fid's `clean`).
    """

    def __init__(self, network: nn.Module, resize: str) -> None:
        super().__init__()
        self.network, self.resizes_itself = network, resize == "tf1-bilinear"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        # The optimiser would rewrite the graph after the first calls, perhaps with other rounding.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            if self.resizes_itself:
                features = self.network(images.float(), return_features=True)
            else:
                levels = pil_bicubic(images, _SIDE)
                layers = cast(nn.Module, self.network.layers)
                features = layers((levels - 128) / 128)
        return {"features": features.flatten(1)}


def load_inception_torchscript(weights: Path, resize: str) -> TorchScriptInception:
    """The network of NVIDIA's archive `inception-2015-12-05.pt`.

    Raises:
        DimoError: Unreadable file, or an archive of another network.
    """
    network = load_torchscript(weights)
    if not hasattr(network, "layers"):
        raise DimoError(
            f"{weights} has no part named 'layers'; give NVIDIA's inception-2015-12-05.pt"
        )
    return TorchScriptInception(network, resize)
