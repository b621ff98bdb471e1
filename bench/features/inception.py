"""Inception of FID: torch-fidelity's network (features, logits, sFID's spatial features) with
TensorFlow's weights `inception-2015-12-05`, as ADM's evaluator; and NVIDIA's TorchScript archive,
the network of clean-fid (features only).
"""

import io
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bench.features import load_torchscript
from bench.features import resize as r
from dimo.errors import DimoError
from dimo.weights.files import check_finite, read_state_dict

_SIDE = 299
_SPATIAL_CHANNELS = 7  # of 768: 7 * 17 * 17 = 2023 numbers
_CPU_IMAGES = 8  # at a time through the large early layers, so that a CPU's caches hold them

_RESIZERS: dict[str, r.Resizer] = {
    "tf1-bilinear": r.tf1_bilinear,
    "pil-bicubic": r.pil_bicubic,
    "pil-bicubic-floor": r.pil_bicubic_floor,
    "torch-bilinear": r.torch_bilinear,
}
_LOWER = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *(f"Mixed_{block}" for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d")),
)
_UPPER = ("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")


class Inception(nn.Module):
    """uint8 images [B, 3, H, W] -> all three outputs in one pass.

    - features [B, 2048]: the last average pool.
    - logits [B, 1008]: without bias, as TensorFlow's Inception Score takes them.
    - spatial [B, 2023]: the first 7 channels of `Mixed_6d` (`mixed_6/conv`), flattened in the
      order height, width, channel, as ADM's sFID.

    Args:
        network: torch-fidelity's, whose operations are kept as they are: folding its batch
            normalisations would save 15 % of the time on a CPU and cost bit-equality.
        resize: "tf1-bilinear" (ADM), "pil-bicubic" (clean-fid), "pil-bicubic-floor" (Halton) or
            "torch-bilinear", which includes pytorch-fid's normalisation.
    """

    width = 2048

    def __init__(self, network: nn.Module, resize: str) -> None:
        super().__init__()
        self.lower = nn.Sequential(*(network.get_submodule(name) for name in _LOWER))
        self.upper = nn.Sequential(*(network.get_submodule(name) for name in _UPPER))
        self.classes = nn.Linear(self.width, 1008, bias=False)
        self.classes.weight = network.get_parameter("fc.weight")
        self.resize = resize

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        size = _CPU_IMAGES if images.device.type == "cpu" else len(images)
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        middle = torch.cat([self.lower(self._input(part)) for part in parts])  # [B, 768, 17, 17]
        features = self.upper(middle).flatten(1)
        return {
            "features": features,
            "logits": self.classes(features),
            "spatial": middle[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1),
        }

    def _input(self, images: Tensor) -> Tensor:
        """Resized and normalised images, float32 [B, 3, 299, 299]."""
        levels = _RESIZERS[self.resize](images, _SIDE)
        if self.resize == "torch-bilinear":
            levels.div_(255).mul_(2).sub_(1)
        else:
            levels.sub_(128).div_(128)
        return levels.contiguous()


def load_inception(weights: Path, resize: str) -> Inception:
    """The network with the weights of torch-fidelity's (and pytorch-fid's) file.

    Raises: DimoError: Unreadable file, or weights of another network.
    """
    # The constructor unpickles whatever path it is given; a copy of what was safely read is safe.
    buffer = io.BytesIO()
    state = read_state_dict(weights)
    check_finite(state, str(weights))
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DimoError(
            f"weights {weights} do not fit Inception: {reason[:300]}; "
            "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        ) from error
    return Inception(network, resize)


class TorchScriptInception(nn.Module):
    """uint8 images [B, 3, H, W] -> features [B, 2048].

    Args:
        network: The archive: maps images of any size, and its part `layers` normalised ones.
        resize: "tf1-bilinear", by the archive itself (clean-fid's `legacy_tensorflow`), or
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
                levels = r.pil_bicubic(images, _SIDE)
                layers = cast(nn.Module, self.network.layers)
                features = layers((levels - 128) / 128)
        return {"features": features.flatten(1)}


def load_inception_torchscript(weights: Path, resize: str) -> TorchScriptInception:
    """The network of NVIDIA's archive `inception-2015-12-05.pt`.

    Raises: DimoError: Unreadable file, or an archive of another network.
    """
    network = load_torchscript(weights)
    if not hasattr(network, "layers"):
        raise DimoError(
            f"{weights} has no part named 'layers'; give NVIDIA's inception-2015-12-05.pt"
        )
    return TorchScriptInception(network, resize)
