"""Detectors of objects behind one interface, each pinned by the hash of its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bench.metrics.geneval import Detected, Verdict, judge
from bench.protocol import Detector
from bench.protocol.catalog import ANY, DETECTORS, load
from dimo.errors import DimoError, unknown_name

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]


class ObjectDetector(Protocol):
    """What GenEval asks of a detector.

    Attributes:
        sha256: Of its weights.
        colors_sha256: Of the weights that tell colours apart; empty where there are none.
    """

    sha256: str
    colors_sha256: str

    def detect(self, images: Sequence[Pixels]) -> list[dict[str, Detected]]:
        """What is on each image, by class name, in the order of the detector's classes."""
        ...

    def colors(self, image: Pixels, name: str, objects: Detected) -> Sequence[str]:
        """The colour of each object of one class."""
        ...


def load_detector(
    wanted: Detector, *, weights: Path | None, device: torch.device
) -> ObjectDetector:
    """Loads the detector of a protocol.

    Args:
        wanted: Its name and the hashes of its weights.
        weights: Where they are; None: they come with dimo.
        device: Where the networks shall be.

    Raises:
        DimoError: Unknown detector, one that is not run here, missing weights, weights of another
            hash, or a package that is not installed.
    """
    if wanted.name not in DETECTORS:
        raise unknown_name("detector", wanted.name, DETECTORS)
    kind = DETECTORS[wanted.name]
    if kind.reads_results:
        raise DimoError(
            f"detector {wanted.name!r} is not run by dimo; give the results.jsonl that GenEval's "
            "evaluate_images.py wrote, or use a protocol with a detector that dimo runs"
        )
    if weights is None and kind.weights:
        raise DimoError(
            f"detector {wanted.name!r} needs its weights ({kind.weights}); fetch them and give the "
            "folder with --weights"
        )
    detector: ObjectDetector = load(kind.loader)(weights, device)
    for what, found, named in (
        (wanted.name, detector.sha256, wanted.sha256),
        (wanted.colors, detector.colors_sha256, wanted.colors_sha256 or ANY),
    ):
        if named not in (ANY, found):
            raise DimoError(
                f"weights of {what!r} have sha256 {found[:12]}..., the protocol names "
                f"{named[:12]}...; use the weights that belong to the protocol's version"
            )
    return detector


def verdicts(
    detector: ObjectDetector,
    images: Sequence[Pixels],
    metadata: Sequence[dict[str, Any]],
) -> list[Verdict]:
    """Decides each image by the official rules.

    Args:
        detector: Loaded.
        images: uint8 [H, W, 3] each.
        metadata: What each is asked to show.
    """
    found = []
    for image, detected, asked in zip(images, detector.detect(images), metadata, strict=True):

        def colors(name: str, objects: Detected, image: Pixels = image) -> Sequence[str]:
            return detector.colors(image, name, objects)

        found.append(judge(detected, asked, colors=colors))
    return found
