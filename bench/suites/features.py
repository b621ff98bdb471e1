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
from bench.features.pipeline import (
    FeaturesOfSet,
    features_of_file,
    features_of_paths,
    real_images,
)
from bench.features.references import (
    images_named_by,
    load_reference,
    reference_conformity,
    reference_images,
)
from bench.features.stats import compute_stats
from bench.images import Findings, ImageSet, npz_keys
from bench.images.checks import Content
from bench.metrics.base import Score
from bench.metrics.scores import class_table, known_gaps, score
from bench.protocol.catalog import METRICS
from bench.records.record import MethodInfo
from bench.rows.generate import FixedImages, RealImages
from bench.rows.rows import Arrays, Job, Look, RowImages, image_set_method
from bench.suites.base import ImageOrigin, Measured, Suite
from dimo.errors import DimoError


class FeaturesSuite(Suite):
    """Fréchet distances, neighbours, kernels, and what else features decide."""

    rows_take = ("reference", "reference_images")
    files_take: ClassVar[Collection[str]] = ("reference", "labels", "recursive")

    def __init__(self, *args: Any, per_class: bool = False, **options: Any) -> None:
        """As of `Suite`; with `per_class` what it measures has the metrics of each class, too."""
        super().__init__(*args, **options)
        self.per_class, protocol = per_class, self.protocol
        self._path = path = self.assets.reference or protocol.reference_file
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
        self._reference_problems: list[str] = []
        self._reference_notes: list[str] = []
        self._gaps: dict[str, str] = {}
        self.reference = load_reference(
            protocol,
            self.extractor,
            path=path,
            extract_paths=self._reference_features,
            partly=self.nonconforming,
        )
        self._accept_reference(reference_conformity(protocol, self.reference))

    @property
    def evidence(self) -> Mapping[str, str]:
        return {
            "extractor": self.extractor.identity,
            "extractor_sha256": self.extractor.sha256,
            "reference": self.reference.name,
            "reference_sha256": self.reference.sha256,
        }

    def measure(self, row: Job, *, seed: int | None = None) -> Measured | None:
        def score(images: RowImages, found: Arrays, *about: Any, **made: Any) -> Measured:
            return self._scored(Features(**found, labels=images.labels), *about, **made)

        return self._score_row(row, seed, score)

    def look_at(self, images: RowImages) -> Look:
        """Every output of the extractor."""

        def look(pixels: Tensor, rows: range) -> Arrays:
            features = extract(self.extractor, [(pixels, None)], count=len(rows), first=rows.start)
            return {output: getattr(features, output) for output in self.extractor.outputs}

        return look

    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured | None:
        start, ranks = time.monotonic(), self.runtime.ranks
        self._gaps = ranks.synchronized(lambda: self._other_gaps(paths, origin))
        if len(paths) == 1 and "features" in npz_keys(paths[0]):
            read = features_of_file(paths[0])
            assert read.features is not None
            outputs = [name for name, values in vars(read.features).items() if values is not None]
            self._accept(read.findings, read.count, "labels" in outputs, outputs)
        else:
            read = self._features_of_paths(
                paths,
                count=self.protocol.images.num_images,
                balanced=self.protocol.images.labels == "balanced",
                recursive=origin.recursive,
                labels=origin.labels,
                accept=self._accept_images,
            )
        others, findings = self._other_scores(paths, origin), read.findings
        content = Content(
            read.images_sha256,
            read.labels_sha256,
            findings.duplicates,
            tuple(map(str, paths)),
            tuple(findings.notes),
            tuple(findings.nonconforming),
        )
        method = image_set_method(origin.name, origin.section, origin.num_steps)

        def scored() -> Measured:
            assert read.features is not None
            return self._scored(read.features, content, method, start, others)

        return self.on_first(scored)

    def quality(self, row: Job, *, seed: int, num_images: int) -> float:
        """The Fréchet distance of the features."""
        images = self.images_of(row, seed, num_images)
        collected = self._collect(images, self.look_at(images))

        def distance() -> float:
            if collected is None:
                return 0.0
            stats = compute_stats(collected.found["features"], extractor=self.extractor.identity)
            return m.frechet_distance(generated=stats, reference=self.reference.stats["features"])

        return self.runtime.ranks.all_gather(distance)[0]

    def _scores(self, images: RowImages, found: Arrays, gaps: dict[str, str]) -> dict[str, Score]:
        features, device = Features(**found, labels=images.labels), self.runtime.device
        return score(self.protocol, features, self.reference, device=device, gaps=gaps)

    def _real_images(self) -> RowImages | None:
        given, protocol = self.assets.reference_images, self.protocol
        if self._path is None:
            if given:
                raise DimoError(
                    f"--reference-images {given[0]} is not used under {protocol.name!r}, whose "
                    "real images come with dimo; leave it out"
                )
            return FixedImages(*reference_images(protocol))
        if not given:
            return None
        named = images_named_by(self._path, self.reference)
        real = real_images(given, protocol, self.runtime, reference=self._path, named=named)
        has_labels = real.labels is not None
        gaps = self._known_gaps(len(real.images), has_labels, self.extractor.outputs)
        if lines := self._left_out(gaps):
            raise DimoError(f"--reference-images {given[0]}: {'; '.join(lines)}; give more images")
        return RealImages(real)

    def _known_gaps(self, count: int, has_labels: bool, outputs: Collection[str]) -> dict[str, str]:
        """As `known_gaps`; the first rank alone has the whole reference."""
        return self.runtime.ranks.all_gather(
            lambda: known_gaps(
                self.protocol, self.reference, count=count, has_labels=has_labels, outputs=outputs
            )
        )[0]

    def _other_scores(self, paths: Sequence[Path], origin: ImageOrigin) -> dict[str, Score]:
        """Scores of image files by other networks, on the first rank."""
        return {}

    def _other_gaps(self, paths: Sequence[Path], origin: ImageOrigin) -> dict[str, str]:
        """Metrics that other networks cannot decide, and why, before anything is computed."""
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
        scores = score(
            self.protocol,
            features,
            self.reference,
            device=self.runtime.device,
            progress=self.runtime.progress,
            gaps=self._gaps if self.nonconforming else None,
        )
        scores |= others or {}
        problems = (*content.nonconforming, *self._reference_problems, *self._left_out(self._gaps))
        if not scores:
            raise DimoError(f"no metric can be computed: {'; '.join(problems)}; score other images")
        notes = (*content.notes, *self._reference_notes)
        content = dataclasses.replace(content, notes=notes, nonconforming=problems)
        counts = dict.fromkeys(scores, len(features.features))
        measured = self._measured(scores, counts, content, method, start, **made)
        if not self.per_class:
            return measured
        table = class_table(self.protocol, features, self.reference, device=self.runtime.device)
        return dataclasses.replace(measured, per_class=table)

    def _accept_images(self, findings: Findings, images: ImageSet) -> None:
        has_labels = images.labels is not None
        self._accept(findings, len(images), has_labels, self.extractor.outputs)

    def _accept(
        self, findings: Findings, count: int, has_labels: bool, outputs: Collection[str]
    ) -> None:
        """Refuses what is off-protocol or lacks what a metric needs; off-protocol it is told."""
        self._refuse("the set", findings.nonconforming)
        self._gaps |= self._known_gaps(count, has_labels, outputs)
        if self.per_class and not has_labels:
            raise DimoError(
                "--per-class: the images have no labels that count; name them with --labels"
            )
        gaps = self._left_out(self._gaps)
        if gaps and not self.nonconforming:
            labels = [note for note in findings.notes if note.startswith("labels")]
            raise DimoError(
                f"{'; '.join([*gaps, *labels])}; or score without, off-protocol, with "
                "--nonconforming"
            )
        for gap in gaps if self.runtime.ranks.is_first else ():
            self.runtime.warn(gap)

    def _left_out(self, gaps: Mapping[str, str]) -> list[str]:
        """A line for each metric that cannot be had, but for supplementary ones."""
        required = [metric.name for metric in self.protocol.metrics if not metric.supplementary]
        return [f"no {METRICS[n].label}: {gaps[n]}" for n in required if n in gaps]

    def _accept_reference(self, problems: Sequence[str]) -> None:
        self._reference_problems += problems
        if problems and not self.nonconforming:
            raise DimoError(
                f"{'; '.join(problems)}; give the protocol's reference, made with dimo reference "
                "where the protocol has none of its own, or score off-protocol with "
                "--nonconforming"
            )

    def _features_of_paths(self, paths: Sequence[Path], **options: Any) -> FeaturesOfSet:
        """As `features_of_paths`, with this suite's extractor and cache."""
        images, cache, runtime = self.protocol.images, self._cache, self.runtime
        return features_of_paths(
            paths, images, self.extractor, cache=cache, runtime=runtime, **options
        )

    def _reference_features(self, paths: list[Path]) -> tuple[Features | None, str, int]:
        def accept(findings: Findings, images: ImageSet) -> None:
            self._reference_notes += [f"reference: {note}" for note in findings.notes]
            self._accept_reference([f"reference: {line}" for line in findings.nonconforming])

        read = self._features_of_paths(
            paths, count=None, balanced=False, recursive=self.assets.recursive, accept=accept
        )
        return read.features, read.images_sha256, read.count
