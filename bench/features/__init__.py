"""uint8 images -> features: the table of extractors, each pinned by the hash of its weights."""

__all__ = ["Extractor", "Features", "extract", "load_extractor"]

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.features.digits import DigitsCNN
from dimo.errors import DimoError, unknown_name
from dimo.files import sha256_file
from dimo.weights import ASSETS, load_state_dict

# name -> network and the weights file shipped for it
_EXTRACTORS: dict[str, tuple[type[DigitsCNN], Path]] = {
    "digits-cnn": (DigitsCNN, ASSETS / "digits-cnn.safetensors"),
}


@dataclass(frozen=True)
class Extractor:
    """A network that maps uint8 images [B, 3, H, W] to features [B, D] and logits [B, C]."""

    name: str
    network: nn.Module
    sha256: str


@dataclass(frozen=True)
class Features:
    """Of one set of images: features float32 [N, D], logits float32 [N, C], labels int64 [N]."""

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


def load_extractor(name: str, *, sha256: str, device: torch.device) -> Extractor:
    """Loads an extractor whose weights have the hash that the protocol names.

    Raises:
        DimoError: Unknown extractor; missing weights, or weights of another hash.
    """
    if name not in _EXTRACTORS:
        raise unknown_name("extractor", name, _EXTRACTORS)
    network_type, path = _EXTRACTORS[name]
    if not path.is_file():
        raise DimoError(f"extractor {name!r} needs {path}; install dimo again")
    found = sha256_file(path)
    if found != sha256:
        raise DimoError(
            f"extractor {name!r} has sha256 {found[:12]}..., the protocol names {sha256[:12]}...; "
            "use the weights that belong to the protocol's version"
        )
    network = network_type()
    load_state_dict(network, path)
    return Extractor(name, network.to(device).eval(), found)


@torch.inference_mode()
def extract(extractor: Extractor, batches: Iterable[tuple[Tensor, Tensor]]) -> Features:
    """Features of all batches of (uint8 images [B, 3, H, W], labels [B]), in order."""
    parts = [
        (*(t.cpu().numpy() for t in extractor.network(images)), labels.cpu().numpy())
        for images, labels in batches
    ]
    features, logits, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Features(features, logits, labels)
