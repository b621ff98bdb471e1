"""What all suites share: `Suite`, `load_suite`, and the one place where records are made."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bench.images.checks import Content
from bench.metrics.base import Score
from bench.metrics.reconstruction import Reconstruction
from bench.metrics.scores import load_comparisons, metric_values, reconstruction_scores
from bench.protocol import Protocol, protocol_sha256
from bench.protocol.catalog import NONE, load
from bench.protocol.checks import check_num_images
from bench.protocol.networks import DETECTORS, SCORERS
from bench.records.compare import pack_contributions
from bench.records.provenance import code_sha256, package_versions
from bench.records.record import (
    Evidence,
    MethodInfo,
    MetricValue,
    ResultRecord,
    Section,
    Speed,
    new_record,
)
from bench.rows.generate import (
    LARGEST_BATCH,
    Collected,
    Reconstructed,
    SampledImages,
    Shelf,
    collect,
)
from bench.rows.rows import Arrays, Job, Look, RowImages, method_info
from dimo.engine.distributed import Runtime, device_name
from dimo.errors import DimoError
from dimo.util.files import sha256_bytes
from dimo.util.schema import canonical_json
from dimo.zoo.generator import Generator
from dimo.zoo.loading import weights_file

T = TypeVar("T")

# ways to score, as "module:class" of a `Suite`
SUITES: dict[str, str] = {
    "features": "bench.suites.features:FeaturesSuite",
    "captions": "bench.suites.captions:CaptionsSuite",
    "hps": "bench.suites.hps:HPSSuite",
    "preferences": "bench.suites.preferences:PreferencesSuite",
    "geneval": "bench.suites.geneval.suite:GenEvalSuite",
    "answers": "bench.suites.answers:AnswersSuite",
}


@dataclass(frozen=True)
class Assets:
    """Files that replace bundled or downloaded ones; None: those."""

    weights: Path | None = None  # folder with the weights of teachers and students
    extractor: Path | None = None  # weights of feature extractor, detector or preference scorer
    clip: Path | None = None  # weights of the CLIP that scores captions beside an extractor
    reference: Path | None = None  # file or folder of the reference statistics
    reference_images: tuple[Path, ...] = ()  # real images of the reference, shards of one set
    prompts: Path | None = None
    cache: Path | None = None  # folder of cached features; None: no cache
    recursive: bool = False  # whether a folder of reference images is read with its subfolders
    allow_code: bool = False  # whether a protocol may import a custom extractor: arbitrary code


@dataclass(frozen=True)
class ImageOrigin:
    """What the user says about a set of image files."""

    name: str = ""  # of the row; "": that of the path
    section: Section = "Image sets"
    num_steps: int | None = None  # sampling steps the images were made with; None: unknown
    labels: str = ""  # as in `bench.images.open_images`; "": those beside the images
    recursive: bool = False  # whether folders are read with their subfolders


@dataclass(frozen=True)
class Measured:
    """The result of scoring one row."""

    record: ResultRecord
    contributions: bytes  # per sample and metric, see `bench.records.compare`
    files: Mapping[str, bytes] = field(default_factory=dict)  # ending -> content, in verdicts/
    per_class: str = ""  # of `bench.metrics.scores.class_table`, where it was asked for


class Suite(ABC):
    """One way to score rows under a protocol; networks and reference are shared by all rows.

    Args:
        batch_size: Images generated at a time, 0: as many as memory holds; changes speed, never a
            result.
        nonconforming: Whether off-protocol sets and references are scored, too.
        num_images: Images made per row; None: as many as the protocol asks for.

    Raises:
        DimoError: Networks, reference or prompts are missing, or not those of the protocol.
    """

    one_folder: ClassVar[str] = ""  # what a set of images must be, where it is a single path
    rows_take: ClassVar[Collection[str]] = ()  # of reference(_images), prompts, clip: rows use
    files_take: ClassVar[Collection[str]] = ()  # of these, labels, recursive: what sets use

    def __init__(
        self,
        protocol: Protocol,
        runtime: Runtime,
        assets: Assets,
        *,
        batch_size: int = 500,
        nonconforming: bool = False,
        command: str = "",
        num_images: int | None = None,
    ) -> None:
        self.protocol, self.runtime, self.assets = protocol, runtime, assets
        self.batch_size, self.nonconforming, self.command = batch_size, nonconforming, command
        on_gpu = runtime.device.type == "cuda"
        self._shard_size = batch_size or (LARGEST_BATCH if on_gpu else 500)
        self.num_images = num_images or protocol.images.num_images
        self._shelves: list[Shelf] = []

    @property
    def off_protocol(self) -> tuple[str, ...]:
        """Why rows made here are off-protocol: another number of images; empty if they are not."""
        asked = self.protocol.images.num_images
        if self.num_images == asked:
            return ()
        return (f"{self.num_images:,} images; the protocol asks for {asked:,}",)

    @property
    def prompts(self) -> Sequence[str] | None:
        """What text-conditioned models draw, image i prompt i modulo their number; else None."""
        return None

    @property
    @abstractmethod
    def evidence(self) -> Mapping[str, str]:
        """Fields of `bench.records.record.Evidence` that hold for all rows."""

    @abstractmethod
    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured | None:
        """Scores folders or archives, the shards of one set; None on every rank but the first.

        Raises:
            DimoError: The set cannot be read, or is off-protocol.
        """

    def measure(self, row: Job, *, seed: int | None = None) -> Measured | None:
        """Scores one row on `num_images` images of a seed; None: the protocol's reporting seed.

        The result is None on every rank but the first.
        """
        raise self._files_only()

    def look_at(self, images: RowImages) -> Look:
        """What the networks of the suite find out about images of a row."""
        raise self._files_only()

    def quality(self, row: Job, *, seed: int, num_images: int) -> float:
        """The metric that settings are chosen by, see `criterion_of`; the same on all ranks."""
        raise self._files_only()

    def qualities(self, row: Job, *, seed: int, num_images: int) -> dict[str, float]:
        """Every metric that so many images give but supplementary ones; with that of `quality`."""
        images = self.images_of(row, seed, num_images)
        collected = self._collect(images, self.look_at(images))

        def values() -> dict[str, float]:
            left_out = {m.name: "supplementary" for m in self.protocol.metrics if m.supplementary}
            scores = {} if collected is None else self._scores(images, collected.found, left_out)
            return {name: score.value for name, score in scores.items()}

        return self.runtime.ranks.all_gather(values)[0]

    def _scores(self, images: RowImages, found: Arrays, gaps: dict[str, str]) -> dict[str, Score]:
        """The metrics of images of a row by what was found of them; `gaps` as of `score`."""
        raise self._files_only()

    def reference_rows(self, loaded: Generator) -> list[Job]:
        """Real data, also through the tokenizer: the best any model on its tokens can do.

        Empty if the real data are neither bundled nor given as `Assets.reference_images`.

        Raises:
            DimoError: Given images are not those of the reference, or LPIPS lacks its weights.
        """
        if (real := self._real_images()) is None:
            return []
        names = [metric.name for metric in self.protocol.metrics]
        comparisons = load_comparisons(names, self.assets.weights)
        made = Reconstructed(real, loaded.tokenizer, self.protocol.images.uint8, comparisons)
        row = Job("Real data", "Reference", loaded, images=real)
        return [row, replace(row, name=made.caption, images=made)]

    def _real_images(self) -> RowImages | None:
        """Images that a perfect model matches."""
        return None

    def images_of(self, row: Job, seed: int, num_images: int) -> RowImages:
        """The images of a row: those it has, or those that its network makes."""
        if row.images is not None:
            return row.images
        return SampledImages(
            row,
            seed=seed,
            count=num_images,
            batch_size=self.batch_size,
            uint8=self.protocol.images.uint8,
            runtime=self.runtime,
        )

    def _collect(
        self, images: RowImages, look: Look, *, what: str = "", batch_size: int = 0
    ) -> Collected | None:
        """As `bench.rows.generate.collect`; what was found is kept until `forget`.

        `what` tells apart what a suite looks for in images of the same row.
        """
        shelf = Shelf(self._shelf_folder(images, what), self.runtime.warn)
        self._shelves += [shelf] if shelf.folder is not None and self.runtime.ranks.is_first else []
        size = batch_size or self._shard_size
        return collect(images, look, runtime=self.runtime, batch_size=size, shelf=shelf)

    def _score_row(
        self, row: Job, seed: int | None, score: Callable[..., Measured]
    ) -> Measured | None:
        """As `measure`; `score` is called on the first rank with what was found of the images."""
        start, seed = time.monotonic(), self.protocol.seeds.report if seed is None else seed
        images = self.images_of(row, seed, self.num_images)
        collected = self._collect(images, self.look_at(images))

        def scored() -> Measured:
            assert collected is not None
            found = collected.found
            lost = images.take(found) if isinstance(images, Reconstructed) else None
            return score(
                images,
                found,
                collected.content,
                method_info(row, images.samples),
                start,
                speed=collected.speed,
                seed=seed,
                reconstruction=lost,
            )

        return self.on_first(scored)

    def forget(self, row: Job | None = None) -> None:
        """Removes what was kept of rows that are recorded now, and of one that was before."""
        if row is not None:  # it was killed between its record and this
            images = self.images_of(row, self.protocol.seeds.report, self.num_images)
            self._shelves += [Shelf(self._shelf_folder(images, ""), self.runtime.warn)]
        for shelf in self._shelves:
            shelf.remove()
        self._shelves.clear()

    def _shelf_folder(self, images: RowImages, what: str) -> Path | None:
        """By the hash of all that what is found depends on; None: nothing is kept."""
        if self.assets.cache is None or (own := images.identity) is None:
            return None
        paths = list[Path]()
        if isinstance(images, SampledImages):
            teacher = images.job.loaded.teacher
            roles = teacher.weights.keys() - {"transformer"}  # which a student does not need
            paths = [weights_file(teacher, role, self.assets.weights) for role in sorted(roles)]
        identity = {
            **own,
            "files": [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, paths)],
            "what": [type(self).__name__, what],
            "evidence": dict(self.evidence),
            "device": self.runtime.device.type,
            "packages": package_versions(),
            "code": code_sha256(),
        }
        return self.assets.cache / "rows" / sha256_bytes(canonical_json(identity).encode())

    def on_first(self, function: Callable[[], T]) -> T | None:
        """Runs `function` on the first rank alone; its error is raised on all."""
        ranks = self.runtime.ranks
        return ranks.synchronized(lambda: function() if ranks.is_first else None)

    def is_same(self, record: ResultRecord, row: Job) -> bool:
        """Whether a record is of this row, measured as it would be measured now."""
        method = replace(record.method, nfe=None, token_counts=None, student=None, tuning=None)
        evidence = {} if record.evidence is None else vars(record.evidence)
        notes = () if row.images is None else row.images.notes
        return (
            record.protocol.sha256 == protocol_sha256(self.protocol)
            and record.revision.code_sha256 == code_sha256()
            and record.packages == package_versions()
            and record.speed.device == device_name(self.runtime.device)
            and record.seed == self.protocol.seeds.report
            and record.off_protocol == self.off_protocol
            and method == replace(method_info(row, None), student=None, tuning=None)
            and all(evidence.get(key) == value for key, value in self.evidence.items())
            and set(notes) <= set(evidence.get("notes", ()))
        )

    def _files_only(self) -> DimoError:
        name = self.protocol.name
        return DimoError(
            f"protocol {name!r} scores images in files, not models; make them with dimo sample and "
            f"score them with: dimo eval IMAGES --protocol {name}"
        )

    def _refuse(self, path: object, problems: Sequence[str]) -> None:
        """Raises a DimoError if there are problems and off-protocol sets are not scored."""
        if problems and not self.nonconforming:
            raise DimoError(
                f"{path} does not conform to protocol {self.protocol.name!r}: "
                f"{'; '.join(problems)}; make it as the protocol asks, or score it off-protocol "
                "with --nonconforming"
            )

    def _measured(
        self,
        scores: Mapping[str, Score],
        counts: Mapping[str, int],
        content: Content,
        method: MethodInfo,
        start: float,
        *,
        speed: Speed | None = None,
        seed: int | None = None,
        evidence: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        reconstruction: Reconstruction | None = None,
    ) -> Measured:
        """Makes the record of one row, whose work began at `time.monotonic() == start`.

        Args:
            counts: Number of images that each metric is computed from.
            speed: None, like `seed`: the images were not made here.
            evidence: In place of that of the suite.
            files: As in `Measured`.
            reconstruction: What the tokenizer made, in its row alone.
        """
        if reconstruction is not None:
            lost = reconstruction_scores(self.protocol, reconstruction)
            scores = {**scores, **lost}
            counts = {**counts, **dict.fromkeys(lost, len(reconstruction.tokens))}
        ordered = {m.name: scores[m.name] for m in self.protocol.metrics if m.name in scores}
        contributions = pack_contributions(ordered)
        metrics: dict[str, MetricValue] = {}
        for name, score in ordered.items():
            metrics |= metric_values({name: score}, self.protocol, counts[name])
        fields: dict[str, Any] = {
            "extractor": NONE,
            "extractor_sha256": "",
            "reference": NONE,
            "reference_sha256": "",
            **(evidence or self.evidence),
        }
        record = new_record(
            protocol=self.protocol,
            method=method,
            metrics=metrics,
            speed=speed or Speed(None, None, None, None, device_name(self.runtime.device)),
            seed=seed,
            command=self.command,
            seconds=time.monotonic() - start,
            evidence=Evidence(
                images=content.paths,
                images_sha256=content.images_sha256,
                labels_sha256=content.labels_sha256,
                copies=content.copies,
                notes=content.notes,
                nonconforming=(*content.nonconforming, *self.off_protocol),
                contributions_sha256=sha256_bytes(contributions),
                **fields,
            ),
        )
        return Measured(record, contributions, files or {})


def load_suite(
    protocol: Protocol,
    runtime: Runtime,
    assets: Assets | None = None,
    *,
    num_images: int | None = None,
    **options: Any,
) -> Suite:
    """The suite of a protocol, with its networks, reference and prompts; `options` of `Suite`."""
    if num_images is not None:
        check_num_images(protocol, num_images)
    options = {"num_images": num_images, **options}
    suite: Suite = suite_class(protocol)(protocol, runtime, assets or Assets(), **options)
    return suite


def suite_class(protocol: Protocol) -> Any:
    """The class of a protocol's suite, which knows what it takes without loading anything."""
    detector, scorer = protocol.detector, protocol.scorer
    if detector is not None:
        return load(SUITES["answers" if DETECTORS[detector.name].reader else "geneval"])
    return load(SUITES["features" if scorer is None else SCORERS[scorer.name].suite])


def check_inputs(
    protocol: Protocol,
    assets: Assets,
    paths: Sequence[Path] = (),
    origin: ImageOrigin | None = None,
) -> None:
    """Refuses what the suite of a protocol does not use, before anything is loaded.

    Raises:
        DimoError: Files or options without a use, or more than one path where one is allowed.
    """
    suite = suite_class(protocol)
    takes = suite.rows_take if origin is None else suite.files_take
    names = ("reference", "reference_images", "prompts", "clip")
    given = {name: getattr(assets, name) for name in names}
    if origin is not None:
        given |= {"labels": origin.labels, "recursive": origin.recursive}
    for name, value in given.items():
        if value and name not in takes:
            option = "--clip-weights" if name == "clip" else f"--{name.replace('_', '-')}"
            shown = map(str, value if isinstance(value, tuple) else [value])
            option += "" if value is True else f" {' '.join(shown)}"
            raise DimoError(f"{option} is not used under {protocol.name!r}; leave it out")
    if suite.one_folder and len(paths) > 1:
        raise DimoError(
            f"{len(paths)} paths; allowed: one under {protocol.name!r}, {suite.one_folder}"
        )
