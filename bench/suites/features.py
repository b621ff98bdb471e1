"""The chain on one screen: protocol + images -> features -> metrics -> record.

The only module that sees both ends.
"""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import metrics as m
from bench.features import Features, extract, load_extractor
from bench.features.cache import FeatureCache
from bench.features.pipeline import FeaturesOfSet, features_of_file, features_of_paths
from bench.features.references import load_reference, reference_conformity, reference_images
from bench.features.stats import compute_stats
from bench.images import Findings, npz_keys
from bench.metrics.scores import metric_values, score
from bench.protocol import Protocol
from bench.records.compare import pack_contributions
from bench.records.record import Evidence, MethodInfo, ResultRecord, Section, Speed, new_record
from bench.rows.generate import Maker, no_speed
from bench.rows.rows import Cost, Job, method_info
from bench.suites.base import Content, Tally, image_set_method
from dimo.engine.distributed import ALONE, Ranks
from dimo.errors import DimoError
from dimo.util.files import sha256_bytes
from dimo.util.terminal import Progress


@dataclass(frozen=True)
class Measured:
    """A record, and what each sample contributes to its metrics (an npz,
    `bench.records.compare`)."""

    record: ResultRecord
    contributions: bytes


class Workbench:
    """Everything that the rows of one table share: protocol, extractor, reference features.

    Args:
        protocol: What is fixed.
        device: Where networks run.
        batch_size: Images made at a time; changes speed, never a result.
        weights: Weights file of the extractor; None: the shipped one.
        reference: File or folder of the reference; None: the embedded one.
        cache: Folder of cached features; None: no cache.
        allow_code: Whether a protocol may name an extractor of one's own.
        nonconforming: Whether what is not as the protocol asks is scored all the same.
        ranks: The processes that share reading and extraction of files.
        progress: Told how far the current row is.
        say: Told in one line what is worth knowing.

    Raises:
        DimoError: Extractor or reference are missing or not those of the protocol.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        device: torch.device,
        batch_size: int = 500,
        weights: Path | None = None,
        reference: Path | None = None,
        cache: Path | None = None,
        allow_code: bool = False,
        nonconforming: bool = False,
        ranks: Ranks = ALONE,
        progress: Progress = lambda what, done, total, unit: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if protocol.detector is not None:
            raise DimoError(
                f"protocol {protocol.name!r} is decided by a detector, not by features; score with "
                "dimo bench or dimo eval, or name another protocol"
            )
        self.protocol, self.device, self.batch_size = protocol, device, batch_size
        self.ranks, self.progress = ranks, progress
        self.nonconforming = nonconforming
        self._cache = FeatureCache(cache, say)
        self.extractor = load_extractor(
            protocol.extractor.name,
            resize=protocol.extractor.resize,
            sha256=protocol.extractor.sha256,
            weights=weights,
            device=device,
            allow_code=allow_code,
        )
        if reference is None:
            reference_images(protocol)  # complains before anything is extracted
        self.reference = load_reference(
            protocol,
            self.extractor,
            path=reference,
            extract_paths=self._reference_features,
        )
        self._reference_problems = reference_conformity(protocol, self.reference)
        if self._reference_problems and not nonconforming:
            raise DimoError(
                f"{'; '.join(self._reference_problems)}; give the protocol's reference, or score "
                "outside the protocol with --nonconforming"
            )

    def measure(self, job: Job) -> Measured:
        """Scores one job with the protocol's reporting seed and number of images."""
        start = time.monotonic()
        seed = self.protocol.seeds.report
        if job.images is not None:
            assert job.labels is not None
            features, content = self._features_of_images(job.images, job.labels)
            speed, cost = no_speed(self.device), None
        else:
            features, content, speed, cost = self._run(job, seed, self.protocol.images.num_images)
        return self._record(features, method_info(job, cost), speed, seed, start, content=content)

    def measure_paths(
        self,
        paths: Sequence[Path],
        *,
        name: str,
        section: Section = "Image sets",
        num_steps: int | None = None,
        recursive: bool = False,
        labels: str = "",
    ) -> Measured | None:
        """Scores a set of image files; None on every rank but the first.

        Args:
            paths: Folders or archives: shards of one set, in order.
            name: Of the row.
            section: Block of the table.
            num_steps: Sampling steps the images were made with, if known.
            recursive: Whether folders are read with their subfolders.
            labels: Where labels come from, see `bench.images.open_images`.

        Raises:
            DimoError: The set cannot be read, or does not conform to the protocol.
        """
        start = time.monotonic()
        if len(paths) == 1 and "features" in npz_keys(paths[0]):
            found = features_of_file(paths[0])
            self._accept(found.findings)
            return self._record_of_paths(found, paths, name, section, num_steps, start)
        found = self._features_of_paths(
            paths,
            count=self.protocol.images.num_images,
            balanced=self.protocol.images.labels == "balanced",
            recursive=recursive,
            labels=labels,
            accept=self._accept,
        )
        return self._record_of_paths(found, paths, name, section, num_steps, start)

    def _record_of_paths(
        self,
        found: FeaturesOfSet,
        paths: Sequence[Path],
        name: str,
        section: Section,
        num_steps: int | None,
        start: float,
    ) -> Measured | None:
        if found.features is None or not self.ranks.is_first:
            return None
        method = image_set_method(name, section, num_steps)
        content = Content(
            found.images_sha256,
            found.labels_sha256,
            found.findings.duplicates,
            tuple(map(str, paths)),
            tuple(found.findings.notes),
            tuple(found.findings.nonconforming),
        )
        return self._record(
            found.features, method, no_speed(self.device), None, start, content=content
        )

    def quality(self, job: Job, *, seed: int, num_images: int) -> float:
        """Only the Fréchet distance of the features, for choosing settings."""
        features = self._run(job, seed, num_images)[0]
        stats = compute_stats(features.features, extractor=self.extractor.identity)
        return m.frechet_distance(generated=stats, reference=self.reference.stats["features"])

    def _record(
        self,
        features: Features,
        method: MethodInfo,
        speed: Speed,
        seed: int | None,
        start: float,
        *,
        content: Content,
    ) -> Measured:
        scores = score(
            self.protocol, features, self.reference, device=self.device, progress=self.progress
        )
        contributions = pack_contributions(scores)
        evidence = Evidence(
            images=content.paths,
            images_sha256=content.images_sha256,
            labels_sha256=content.labels_sha256,
            extractor=self.extractor.identity,
            extractor_sha256=self.extractor.sha256,
            reference=self.reference.name,
            reference_sha256=self.reference.sha256,
            copies=content.copies,
            notes=content.notes,
            nonconforming=(*content.nonconforming, *self._reference_problems),
            contributions_sha256=sha256_bytes(contributions),
        )
        record = new_record(
            protocol=self.protocol,
            method=method,
            metrics=metric_values(scores, self.protocol, len(features.features)),
            speed=speed,
            seed=seed,
            command=shlex.join(["dimo", *sys.argv[1:]]),
            seconds=time.monotonic() - start,
            evidence=evidence,
        )
        return Measured(record, contributions)

    def _accept(self, findings: Findings) -> None:
        if findings.nonconforming and not self.nonconforming:
            raise DimoError(
                f"the set does not conform to protocol {self.protocol.name!r}: "
                f"{'; '.join(findings.nonconforming)}; make it as the protocol asks, or score it "
                "outside the protocol with --nonconforming"
            )

    def _features_of_paths(
        self,
        paths: Sequence[Path],
        *,
        count: int | None,
        balanced: bool,
        recursive: bool = False,
        labels: str = "",
        accept: Callable[[Findings], None] = lambda findings: None,
    ) -> FeaturesOfSet:
        return features_of_paths(
            paths,
            self.protocol.images,
            self.extractor,
            cache=self._cache,
            count=count,
            balanced=balanced,
            device=self.device,
            ranks=self.ranks,
            recursive=recursive,
            labels=labels,
            accept=accept,
            progress=self.progress,
        )

    def _reference_features(self, paths: list[Path]) -> tuple[Features | None, str, int]:
        found = self._features_of_paths(paths, count=None, balanced=False)
        return found.features, found.images_sha256, found.count

    def _features_of_images(self, images: Tensor, labels: Tensor) -> tuple[Features, Content]:
        tally = Tally()
        batches = (
            tally.add(images[i : i + self.batch_size], labels[i : i + self.batch_size])
            for i in range(0, len(images), self.batch_size)
        )
        features = extract(self.extractor, batches, count=len(images))
        return features, tally.content()

    def _run(self, job: Job, seed: int, num_images: int) -> tuple[Features, Content, Speed, Cost]:
        maker = Maker(
            job,
            seed=seed,
            num_images=num_images,
            batch_size=self.batch_size,
            uint8=self.protocol.images.uint8,
            device=self.device,
            progress=self.progress,
        )
        features = extract(self.extractor, maker.batches(), count=num_images)
        return features, maker.tally.content(), maker.speed(), maker.cost
