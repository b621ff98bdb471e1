"""LPIPS: how different two images look, from the activations of AlexNet.

Zhang, Isola, Efros, Shechtman & Wang, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", arXiv 1801.03924, eq. 1, with the weights of version 0.1.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.util.files import sha256_file
from dimo.weights.catalog import get_official, locate
from dimo.weights.files import load_state_dict, read_state_dict

LPIPS_SIDE = 32  # pixels, the least that the metric is offered for; AlexNet's pools need 31
# The numbers of the published code, for channels from -1 to 1; nearly ImageNet's means and spreads.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_NO_NORM = 1e-10  # added to the length of a place's features
_FILES = ("lpips", "alexnet")  # rows of OFFICIAL; the first brings the second when it is fetched
_WIDTHS = (64, 192, 384, 256, 256)  # channels after each ReLU


class LPIPS(nn.Module):
    """Two images -> their distance.

    The network is AlexNet as torchvision lays it out, up to its fifth ReLU, and one weight per
    channel of each ReLU; the keys of its state dict are those of the two published files.
    """

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(3, _WIDTHS[0], 11, stride=4, padding=2)]
        for (before, after), side in zip(pairwise(_WIDTHS), (5, 3, 3, 3), strict=True):
            convolutions.append(nn.Conv2d(before, after, side, padding=side // 2))
        layers: list[nn.Module] = []
        for stage, convolution in enumerate(convolutions):
            pool = [nn.MaxPool2d(3, stride=2)] if stage in (1, 2) else []
            layers += [*pool, convolution, nn.ReLU()]
        self.features = nn.Sequential(*layers)
        for stage, width in enumerate(_WIDTHS):
            layer = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})
            self.add_module(f"lin{stage}", nn.ModuleDict({"model": layer}))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """`[B]`, 0 for equal images.

        At each place after each ReLU the features are divided by their length; the squared
        differences, weighted by channel and added up, are averaged over places, and the sum over
        the five is the distance.

        Args:
            first: Levels from 0 to 255, `[B, 3, H, W]`, of the dtype of the weights.
            second: The same shape.

        Raises:
            DimoError: Another number of channels, or images below 32 x 32 pixels.
        """
        channels, height, width = first.shape[-3:]
        if channels != 3 or min(height, width) < LPIPS_SIDE:
            raise DimoError(
                f"images of {channels} x {height} x {width} have no LPIPS; allowed: 3 channels, "
                f"{LPIPS_SIDE} x {LPIPS_SIDE} pixels or more; leave lpips out"
            )
        shift, scale = (first.new_tensor(row).view(-1, 1, 1) for row in (_SHIFT, _SCALE))
        hidden = (torch.cat([first, second]) / 127.5 - 1 - shift) / scale
        total, stage = first.new_zeros(len(first)), 0
        for layer in self.features:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                length = torch.linalg.vector_norm(hidden, dim=1, keepdim=True)
                a, b = (hidden / (length + _NO_NORM)).chunk(2)
                weights = self.get_parameter(f"lin{stage}.model.1.weight").flatten()
                total = total + (a - b).square().mean((2, 3)) @ weights
                stage += 1
        return total


def load_lpips(folder: Path | None) -> LPIPS:
    """The network in float64 on the CPU, with the published weights.

    Args:
        folder: As for `dimo.weights.catalog.locate`, which finds both files.

    Raises:
        DimoError: A file that is missing, is not the published one or does not fit.
    """
    paths = {name: locate(name, folder) for name in _FILES}
    for name, path in paths.items():
        if (found := sha256_file(path)) != (known := get_official(name).sha256):
            raise DimoError(
                f"{path} has sha256 {found[:12]}..., but LPIPS is defined by the file with "
                f"{known[:12]}...; remove it and run: dimo weights fetch {name}"
            )
    network = LPIPS().double().requires_grad_(False)
    state = {key: value for path in paths.values() for key, value in read_state_dict(path).items()}
    where = " and ".join(map(str, paths.values()))
    load_state_dict(network, state, name=where, ignore=("classifier.",))
    return network
