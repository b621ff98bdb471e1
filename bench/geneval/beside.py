"""What a protocol with a detector measures beside verdicts: FID and CLIP score of the images."""

__all__ = ["Beside", "Looks", "load_beside"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.catalog import NONE
from bench.features import Extractor, Features, extract, join_features, load_extractor
from bench.features.clip_score import CLIPScorer
from bench.pairs.captions import clip_scores, load_clip_scorer
from bench.protocol import Protocol
from bench.references import ReferenceSet, embedded_reference
from bench.scores import Score, score


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
