"""Verdicts -> the metrics of a protocol; their intervals resample prompts, not images."""

__all__ = ["geneval_scores", "geneval_values"]

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bench.catalog import METRICS
from bench.metrics.geneval import summarize
from bench.protocol import Protocol
from bench.record import MetricValue
from bench.scores import Score, metric_values


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
