"""What a record says of the images themselves: hashes that name them, copies, conformity."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bench.images import content_sha256
from bench.images.codec import ImageInfo
from bench.images.labels import labels_sha256
from bench.records.record import MethodInfo, Section


def image_set_method(name: str, section: Section, num_steps: int | None) -> MethodInfo:
    """What is known of how images were made that were found in files.

    Args:
        name: Of the row.
        section: Block of the table.
        num_steps: Sampling steps, if known.
    """
    return MethodInfo(
        name=name,
        section=section,
        teacher=None,
        sampler=None,
        num_steps=num_steps,
        nfe=None,
        mask_schedule=None,
        token_counts=None,
        guidance_scale=None,
        temperature=None,
        choice_temperature=None,
        selected_by="not known",
        weights_sha256=None,
        training={},
    )


@dataclass(frozen=True)
class Content:
    """What is said of the images themselves in a record."""

    images_sha256: str
    labels_sha256: str
    copies: int
    paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    nonconforming: tuple[str, ...] = ()


class Tally:
    """Names images made in process on their way to the extractor, as an npz of them is named."""

    def __init__(self) -> None:
        self._infos: list[ImageInfo] = []
        self._labels: list[npt.NDArray[np.int64]] = []

    def add(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        for pixels in images.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
            self._infos.append(ImageInfo(digest, height, width, "RGB", "array", None))
        self._labels.append(labels.cpu().numpy())
        return images, labels

    def content(self) -> Content:
        labels = np.concatenate(self._labels)
        copies = len(self._infos) - len({info.sha256 for info in self._infos})
        return Content(content_sha256(self._infos, labels), labels_sha256(labels), copies)


@dataclass(frozen=True)
class Assets:
    """Files that a benchmark takes in place of the bundled or downloaded ones; None: those.

    Attributes:
        weights: Folder of the weights of teachers and students.
        extractor: Weights file of the feature extractor, scorer or detector.
        reference: File or folder of the reference statistics.
        prompts: File or folder of the protocol's prompts.
    """

    weights: Path | None = None
    extractor: Path | None = None
    reference: Path | None = None
    prompts: Path | None = None
