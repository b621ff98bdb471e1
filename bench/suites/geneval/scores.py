"""Correctness of images -> GenEval's metrics; FID and CLIP score of the same images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.features import Extractor, Features, extract, load_extractor
from bench.features.references import ReferenceSet, bundled_reference
from bench.metrics.base import Score
from bench.metrics.geneval import summarize
from bench.metrics.scores import score
from bench.protocol import Protocol
from bench.protocol.catalog import METRICS, NONE
from bench.rows.rows import Arrays
from bench.suites.captions import CLIPScorer, load_clip_scorer, pair_scores


def geneval_scores(
    protocol: Protocol, tags: Sequence[str], prompts: Sequence[int], correct: Sequence[bool]
) -> dict[str, Score]:
    """Each metric of the protocol that a detector decides; intervals resample prompts.

    Images of one prompt are not independent samples, so a contribution is the fraction of correct
    images of a prompt. The overall score is resampled within tags, whose numbers of prompts are
    fixed. `tags`, `prompts` (numbers) and `correct` are given per image.
    """
    summary = summarize(tags, prompts, correct)
    numbers, first, row = np.unique(np.asarray(prompts), return_index=True, return_inverse=True)
    fractions = np.bincount(row, weights=np.asarray(correct, dtype=np.float64)) / np.bincount(row)
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
            contributions = fractions * len(numbers) / (len(sizes) * sizes[tag])
            scores[metric.name] = Score(summary.overall, contributions, labels=tag, extra=extra)
        elif kind.tag in summary.tags:
            extra = {"detector_accuracy": accuracy[kind.tag]} if kind.tag in accuracy else {}
            ours: npt.NDArray[np.float64] = fractions[tag == names.index(kind.tag)]
            scores[metric.name] = Score(summary.tags[kind.tag].score, ours, extra=extra)
    return scores


def image_counts(metrics: Sequence[str], tags: Sequence[str]) -> dict[str, int]:
    """Number of images that each metric is computed from: those of its tag, or all."""
    counts = Counter(tags)
    kinds = {name: METRICS[name].tag for name in metrics}
    return {name: counts[tag] if tag else len(tags) for name, tag in kinds.items()}


@dataclass(frozen=True, eq=False)
class Secondary:
    """Networks of a GenEval protocol beside the detector; None where the protocol has none."""

    extractor: Extractor | None = None
    reference: ReferenceSet | None = None  # given if there is an extractor
    scorer: CLIPScorer | None = None

    @property
    def evidence(self) -> Mapping[str, str]:
        """Fields of `bench.records.record.Evidence`."""
        fields = {} if self.scorer is None else {"scorer_sha256": self.scorer.sha256}
        if self.extractor is None or self.reference is None:
            return fields
        return {
            **fields,
            "extractor": self.extractor.identity,
            "extractor_sha256": self.extractor.sha256,
            "reference": self.reference.name,
            "reference_sha256": self.reference.sha256,
        }

    def look(self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str]) -> Arrays:
        """Outputs of the extractor, and CLIP scores `fits` [B], of images uint8 [H, W, 3] each."""
        found: Arrays = {}
        if self.extractor is not None:
            batches = ((torch.tensor(i).permute(2, 0, 1)[None], None) for i in images)
            features = extract(self.extractor, batches, count=len(images))
            found |= {output: getattr(features, output) for output in self.extractor.outputs}
        if self.scorer is not None:
            found["fits"] = self.scorer.score(images, prompts)
        return found

    def scores(
        self,
        protocol: Protocol,
        features: Features | None,
        fits: npt.NDArray[np.float64] | None,
        prompts: Sequence[int],
        tags: Sequence[str],
        gaps: dict[str, str] | None = None,
    ) -> dict[str, Score]:
        """Each metric of the protocol that these networks decide; `gaps` as of `score`.

        `fits`, `prompts` (numbers) and `tags` are given per image.
        """
        scores: dict[str, Score] = {}
        if self.extractor is not None and self.reference is not None:
            assert features is not None
            scores |= score(
                protocol, features, self.reference, device=self.extractor.device, gaps=gaps
            )
        if fits is not None:
            scores |= pair_scores(protocol, fits, prompts, tags)
        return scores


def load_secondary(protocol: Protocol, device: torch.device) -> Secondary:
    """Loads what the protocol names, and extracts the features of its reference."""
    extractor = reference = scorer = None
    if protocol.extractor.name != NONE:
        extractor = load_extractor(
            protocol.extractor.name,
            resize=protocol.extractor.resize,
            sha256=protocol.extractor.sha256,
            device=device,
        )
        reference = bundled_reference(protocol, extractor)
    if protocol.scorer is not None:
        scorer = load_clip_scorer(protocol.scorer, None, device)
    return Secondary(extractor, reference, scorer)
