"""Verdicts -> the metrics of a protocol; their intervals resample prompts, not images.

What a protocol with a detector measures beside verdicts: FID and CLIP score of the images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.features import Extractor, Features, extract, join_features, load_extractor
from bench.features.references import ReferenceSet, embedded_reference
from bench.metrics.base import Score
from bench.metrics.geneval import summarize
from bench.metrics.scores import metric_values, score
from bench.protocol import Protocol
from bench.protocol.catalog import METRICS, NONE
from bench.records.record import MetricValue
from bench.suites.captions import CLIPScorer, clip_scores, load_clip_scorer


def geneval_scores(
    protocol: Protocol,
    tags: Sequence[str],
    prompts: Sequence[int],
    correct: Sequence[bool],
) -> dict[str, Score]:
    """Each metric that a detector decides, of those the protocol names.

    Images of one prompt are no independent samples, so a contribution is that of a prompt, its
    share of correct images; the overall score is resampled within tags, whose numbers of prompts
    are fixed.

    Args:
        protocol: Names the metrics.
        tags: Of each image.
        prompts: Number of each image's prompt.
        correct: Of each image.
    """
    summary = summarize(tags, prompts, correct)
    numbers, first, row = np.unique(np.asarray(prompts), return_index=True, return_inverse=True)
    shares = np.bincount(row, weights=np.asarray(correct, dtype=np.float64)) / np.bincount(row)
    names = list(summary.tags)
    tag = np.array([names.index(tags[i]) for i in first])  # of each prompt
    sizes = np.bincount(tag)
    accuracy = protocol.detector.accuracy if protocol.detector else {}
    scores: dict[str, Score] = {}
    for metric in protocol.metrics:
        kind = METRICS[metric.name]
        if kind.needs != "detections":
            continue
        if not kind.tag:
            extra = {"images": summary.correct_images, "prompts": summary.correct_prompts}
            if accuracy:
                extra["detector_accuracy"] = sum(accuracy.values()) / len(accuracy)
            contributions = shares * len(numbers) / (len(sizes) * sizes[tag])
            scores[metric.name] = Score(summary.overall, contributions, labels=tag, extra=extra)
        elif kind.tag in summary.tags:
            extra = {"detector_accuracy": accuracy[kind.tag]} if kind.tag in accuracy else {}
            ours: npt.NDArray[np.float64] = shares[tag == names.index(kind.tag)]
            scores[metric.name] = Score(summary.tags[kind.tag].score, ours, extra=extra)
    return scores


def geneval_values(
    scores: dict[str, Score], protocol: Protocol, tags: Sequence[str]
) -> dict[str, MetricValue]:
    """The entries of a record; each stands on the images of its tag.

    Args:
        scores: From `geneval_scores`.
        protocol: Gives the bootstrap's settings.
        tags: Of each image.
    """
    values: dict[str, MetricValue] = {}
    for name, found in scores.items():
        tag = METRICS[name].tag
        values |= metric_values(
            {name: found}, protocol, list(tags).count(tag) if tag else len(tags)
        )
    return values


@dataclass(frozen=True, eq=False)
class Beside:
    """Networks beside the detector, loaded once for all rows; None where the protocol has none.

    Attributes:
        extractor: From images to features.
        reference: What the features are compared with; there is one if there is an extractor.
        scorer: From images and their prompts to scores.
    """

    extractor: Extractor | None = None
    reference: ReferenceSet | None = None
    scorer: CLIPScorer | None = None


def load_beside(protocol: Protocol, device: torch.device) -> Beside:
    """Loads what the protocol names, and extracts the features of its reference.

    Raises:
        DimoError: Weights or reference are not those of the protocol.
    """
    extractor = reference = scorer = None
    if protocol.extractor.name != NONE:
        extractor = load_extractor(
            protocol.extractor.name,
            resize=protocol.extractor.resize,
            sha256=protocol.extractor.sha256,
            device=device,
        )
        reference = embedded_reference(protocol, extractor)
    if protocol.scorer is not None:
        scorer = load_clip_scorer(protocol.scorer, None, device)
    return Beside(extractor, reference, scorer)


class Looks:
    """Gathers features and scores of the images of one row, batch after batch.

    Args:
        beside: The networks.
    """

    def __init__(self, beside: Beside) -> None:
        self.beside = beside
        self._features: list[Features] = []
        self._fits: list[npt.NDArray[np.float64]] = []

    def add(self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        """Looks at the next images.

        Args:
            images: uint8 [H, W, 3] each, B of them.
            prompts: B texts.

        Raises:
            DimoError: Images that a network does not take, or a word that it does not know.
        """
        if self.beside.extractor is not None:
            batches = ((torch.tensor(i).permute(2, 0, 1)[None], None) for i in images)
            self._features.append(extract(self.beside.extractor, batches, count=len(images)))
        if self.beside.scorer is not None:
            self._fits.append(self.beside.scorer.score(images, prompts))

    def scores(
        self, protocol: Protocol, prompts: Sequence[int], tags: Sequence[str]
    ) -> dict[str, Score]:
        """Each metric of the protocol that these networks decide.

        Args:
            protocol: Names the metrics.
            prompts: Number of each image's prompt.
            tags: Of each image.

        Raises:
            DimoError: Too few images for a metric.
        """
        scores: dict[str, Score] = {}
        extractor, reference = self.beside.extractor, self.beside.reference
        if extractor is not None and reference is not None:
            features = join_features(self._features)
            scores |= score(protocol, features, reference, device=extractor.device)
        if self.beside.scorer is not None:
            scores |= clip_scores(protocol, np.concatenate(self._fits), prompts, tags)
        return scores
