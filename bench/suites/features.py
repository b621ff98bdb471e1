"""Scores by features: images -> features -> distances from a reference -> record."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from bench import metrics as m
from bench.features import Features, extract, load_extractor
from bench.features.extraction import FeatureCache
from bench.features.pipeline import FeaturesOfSet, features_of_file, features_of_paths
from bench.features.references import load_reference, reference_conformity, reference_images
from bench.features.stats import compute_stats
from bench.images import Findings, npz_keys
from bench.images.checks import Content, Tally
from bench.metrics.base import Score
from bench.metrics.scores import score
from bench.records.record import MethodInfo
from bench.rows.rows import Job, method_info
from bench.suites.base import ImageOrigin, Measured, Suite, image_set_method
from dimo.errors import DimoError


class FeaturesSuite(Suite):
    """Fréchet distances, neighbours, kernels, and what else features decide."""

    rows_take = ("reference",)
    files_take: ClassVar[Collection[str]] = ("reference", "labels", "recursive")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        protocol, path = self.protocol, self.assets.reference
        self._cache = FeatureCache(self.assets.cache, self.runtime.warn)
        named = protocol.extractor
        self.extractor = load_extractor(
            named.name,
            resize=named.resize,
            sha256=named.sha256,
            weights=self.assets.extractor,
            device=self.runtime.device,
            allow_code=self.assets.allow_code,
        )
        if path is None:
            reference_images(protocol)  # complains before anything is extracted
        self.reference = load_reference(
            protocol, self.extractor, path=path, extract_paths=self._reference_features
        )
        self._reference_problems = reference_conformity(protocol, self.reference)
        if self._reference_problems and not self.nonconforming:
            raise DimoError(
                f"{'; '.join(self._reference_problems)}; give the protocol's reference, or score "
                "off-protocol with --nonconforming"
            )

    @property
    def evidence(self) -> Mapping[str, str]:
        return {
            "extractor": self.extractor.identity,
            "extractor_sha256": self.extractor.sha256,
            "reference": self.reference.name,
            "reference_sha256": self.reference.sha256,
        }

    def measure(self, row: Job, *, seed: int | None = None) -> Measured:
        start, seed = time.monotonic(), self.protocol.seeds.report if seed is None else seed
        if row.images is not None:
            assert row.labels is not None
            tally = Tally()
            batches = self._batches_of(row.images, row.labels, tally)
            features = extract(self.extractor, batches, count=len(row.images))
            return self._scored(features, tally.content(), method_info(row, None), start, seed=seed)
        maker = self._maker(row, seed, self.num_images)
        features = extract(self.extractor, maker.batches(), count=maker.num_images)
        method = method_info(row, maker.samples)
        content, speed = maker.tally.content(), maker.speed()
        return self._scored(features, content, method, start, speed=speed, seed=seed)

    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured | None:
        start = time.monotonic()
        if len(paths) == 1 and "features" in npz_keys(paths[0]):
            read = features_of_file(paths[0])
            self._accept(read.findings)
        else:
            read = self._features_of_paths(
                paths,
                count=self.protocol.images.num_images,
                balanced=self.protocol.images.labels == "balanced",
                recursive=origin.recursive,
                labels=origin.labels,
                accept=self._accept,
            )
        if read.features is None or not self.runtime.ranks.is_first:
            return None
        findings = read.findings
        content = Content(
            read.images_sha256,
            read.labels_sha256,
            findings.duplicates,
            tuple(map(str, paths)),
            tuple(findings.notes),
            tuple(findings.nonconforming),
        )
        others = self._other_scores(paths, origin)
        return self._scored(read.features, content, image_set_method(origin), start, others)

    def quality(self, row: Job, *, seed: int, num_images: int) -> float:
        """The Fréchet distance of the features."""
        maker = self._maker(row, seed, num_images)
        features = extract(self.extractor, maker.batches(), count=num_images)
        stats = compute_stats(features.features, extractor=self.extractor.identity)
        return m.frechet_distance(generated=stats, reference=self.reference.stats["features"])

    def _real_data(self) -> tuple[Tensor, Tensor] | None:
        return reference_images(self.protocol) if self.assets.reference is None else None

    def _other_scores(self, paths: Sequence[Path], origin: ImageOrigin) -> dict[str, Score]:
        """Scores of image files by other networks."""
        return {}

    def _scored(
        self,
        features: Features,
        content: Content,
        method: MethodInfo,
        start: float,
        others: Mapping[str, Score] | None = None,
        **made: Any,
    ) -> Measured:
        device, progress = self.runtime.device, self.runtime.progress
        scores = score(self.protocol, features, self.reference, device=device, progress=progress)
        scores |= others or {}
        problems = (*content.nonconforming, *self._reference_problems)
        content = dataclasses.replace(content, nonconforming=problems)
        counts = dict.fromkeys(scores, len(features.features))
        return self._measured(scores, counts, content, method, start, **made)

    def _accept(self, findings: Findings) -> None:
        self._refuse("the set", findings.nonconforming)

    def _features_of_paths(self, paths: Sequence[Path], **options: Any) -> FeaturesOfSet:
        """As `features_of_paths`, with this suite's extractor and cache."""
        images, cache, runtime = self.protocol.images, self._cache, self.runtime
        return features_of_paths(
            paths, images, self.extractor, cache=cache, runtime=runtime, **options
        )

    def _reference_features(self, paths: list[Path]) -> tuple[Features | None, str, int]:
        read = self._features_of_paths(paths, count=None, balanced=False)
        return read.features, read.images_sha256, read.count
