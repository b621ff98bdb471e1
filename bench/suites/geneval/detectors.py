"""Detectors of objects behind one interface, each pinned by the hash of its weights."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bench.metrics.geneval import Detected, Verdict, judge
from bench.protocol import Detector
from bench.protocol.catalog import ANY, load
from bench.protocol.networks import DETECTORS
from dimo.errors import DimoError, unknown_name

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]


class ObjectDetector(Protocol):
    """A detector as GenEval uses it."""

    sha256: str  # hash of its weights
    colors_sha256: str  # hash of the weights that classify colours; empty without such weights

    def detect(self, images: Sequence[Pixels]) -> list[dict[str, Detected]]:
        """What is on each image, by class name, in the order of the detector's classes."""

    def colors(self, image: Pixels, name: str, objects: Detected) -> Sequence[str]:
        """The colour of each object of one class."""


def load_detector(named: Detector, *, weights: Path | None, device: torch.device) -> ObjectDetector:
    """Loads the detector that a protocol names; without `weights`, those that come with dimo.

    Raises:
        DimoError: Unknown detector, one that does not run in dimo, missing weights, weights of
            another hash, or a package that is not installed.
    """
    if named.name not in DETECTORS:
        raise unknown_name("detector", named.name, DETECTORS)
    kind = DETECTORS[named.name]
    if kind.reads_results:
        raise DimoError(
            f"detector {named.name!r} is not run by dimo; give the results.jsonl that GenEval's "
            "evaluate_images.py wrote, or use a protocol with a detector that dimo runs"
        )
    if weights is None and kind.weights:
        raise DimoError(
            f"detector {named.name!r} needs its weights ({kind.weights}); fetch them and give the "
            "folder with --extractor-weights"
        )
    detector: ObjectDetector = load(kind.loader)(weights, device)
    for what, digest, expected in (
        (named.name, detector.sha256, named.sha256),
        (named.colors, detector.colors_sha256, named.colors_sha256 or ANY),
    ):
        if expected not in (ANY, digest):
            raise DimoError(
                f"weights of {what!r} have sha256 {digest[:12]}..., the protocol names "
                f"{expected[:12]}...; use the weights that belong to the protocol's version"
            )
    return detector


def verdicts(
    detector: ObjectDetector, images: Sequence[Pixels], metadata: Sequence[dict[str, Any]]
) -> list[Verdict]:
    """Judges images, uint8 [H, W, 3] each, by the official rules.

    Args:
        metadata: What each image is asked to show, in the official form.
    """
    return [
        judge(detected, asked, colors=functools.partial(detector.colors, image))
        for image, detected, asked in zip(images, detector.detect(images), metadata, strict=True)
    ]
