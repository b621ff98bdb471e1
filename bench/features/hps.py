"""Human Preference Score v2 (arXiv 2306.09341): a CLIP ViT-H/14 tuned on people's choices.

Versions 2.0 and 2.1 are two sets of weights whose scores do not compare. The published tables come
from a resize whose antialiasing changed with torchvision, so the preprocessing is named too.
"""

__all__ = ["HPS_VERSIONS", "HPSScorer", "load_hps"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.catalog import ANY, SCORERS
from bench.features.clip import CLIPPairs, load_pairs
from bench.metrics.clip_score import cosines
from dimo.errors import DimoError, unknown_name
from dimo.files import sha256_file

_ARCHITECTURE = SCORERS["hps"].model
HPS_VERSIONS: Mapping[str, str] = SCORERS["hps"].versions  # version -> its published file


@dataclass(frozen=True, eq=False)
class HPSScorer:
    """Scores images by how people would like them for a prompt.

    Attributes:
        clip: Both towers.
        version: A key of `HPS_VERSIONS`.
        sha256: Of the weights file.
    """

    clip: CLIPPairs
    version: str
    sha256: str

    def score(
        self, images: Iterable[npt.NDArray[np.uint8]], prompts: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """Cosine of each image with its own prompt, times 100: float64 [N].

        Args:
            images: uint8 [H, W, 3] each, one a prompt; taken one batch after the other.
            prompts: N texts.

        Raises:
            DimoError: Another number of images than of prompts, or no prompt.
        """
        if not prompts:
            raise DimoError("there is no prompt to score images with; give one an image")
        return 100 * cosines(images=self.clip.images(images), texts=self.clip.texts(prompts))


def load_hps(
    weights: Path, *, version: str, preprocessing: str, sha256: str, device: torch.device
) -> HPSScorer:
    """The scorer of a protocol.

    Args:
        weights: The published checkpoint, or another file with its keys.
        version: What the protocol declares, a key of `HPS_VERSIONS`.
        preprocessing: As for `bench.features.clip.CLIPPairs`.
        sha256: Of the weights file; "any" takes the published file by its name.
        device: Where the network shall be.

    Raises:
        DimoError: Unknown version or preprocessing; a missing or foreign file; one of the other
            version, or one that neither its name nor its hash tells to be of this version.
    """
    if version not in HPS_VERSIONS:
        raise unknown_name("HPS version", version, HPS_VERSIONS)
    if not weights.is_file():
        raise DimoError(
            f"HPS {version} finds no weights file at {weights}; fetch it with: "
            f"dimo weights fetch hps-{version}"
        )
    found = sha256_file(weights)
    _check_version(weights, version, found, sha256)
    clip = load_pairs(weights, _ARCHITECTURE, preprocessing).to(device)
    return HPSScorer(clip, version, found)


def _check_version(weights: Path, version: str, found: str, sha256: str) -> None:
    """
    Raises:
        DimoError: The file is not, or not known to be, of that version.
    """
    names = {name.removesuffix(".pt"): key for key, name in HPS_VERSIONS.items()}
    named = names.get(weights.name.partition(".pt")[0].removesuffix(".safetensors"))
    if named not in (None, version):
        raise DimoError(
            f"{weights} is the checkpoint of HPS {named}, but {version} is declared, and their "
            f"scores do not compare; give {HPS_VERSIONS[version]}"
        )
    if sha256 == ANY and named is None:
        raise DimoError(
            f"{weights} may be of any version of HPS; name it {HPS_VERSIONS[version]} if it is "
            "that file, or declare its sha256 in the protocol"
        )
    if sha256 not in (ANY, found):
        raise DimoError(
            f"{weights} has sha256 {found[:12]}..., but {sha256[:12]}... is declared for HPS "
            f"{version}; give the weights that belong to the protocol's version"
        )
