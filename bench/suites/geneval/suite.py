"""`dimo bench` under a protocol with prompts: jobs -> images -> verdicts -> records."""

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.images.codec import to_uint8
from bench.metrics.geneval import summarize
from bench.protocol import Protocol
from bench.records.record import Speed
from bench.rows.generate import Maker, no_speed
from bench.rows.rows import Cost, Job, method_info
from bench.suites.base import Content, Tally
from bench.suites.geneval.detectors import load_detector, verdicts
from bench.suites.geneval.layout import ImageResult
from bench.suites.geneval.measure import Measurement, Verdicts, record_verdicts
from bench.suites.geneval.prompts import EMBEDDED, Metadata
from bench.suites.geneval.scores import Beside, Looks, load_beside
from dimo.data import scenes
from dimo.util.terminal import Progress
from dimo.zoo.loading import Generator


class DetectorBench:
    """Everything that the rows of one table share: protocol, prompts, detector, reference.

    Args:
        protocol: With prompts and a detector.
        prompts: The protocol's, see `bench.suites.geneval.prompts.prompts_of`; image i shows
        prompt i
            modulo their number.
        device: Where networks run.
        batch_size: Images made at a time; changes speed, never a result.
        weights: Of the detector; None: those shipped.
        progress: Told how far the current row is.

    Raises:
        DimoError: The detector is none that runs here, or its weights are missing or others.
    """

    def __init__(
        self,
        protocol: Protocol,
        prompts: Sequence[Metadata],
        *,
        device: torch.device,
        batch_size: int = 500,
        weights: Path | None = None,
        progress: Progress = lambda what, done, total, unit: None,
    ) -> None:
        assert protocol.detector is not None
        self.protocol, self.prompts, self.device = protocol, prompts, device
        self.batch_size, self.progress = batch_size, progress
        self.detector = load_detector(protocol.detector, weights=weights, device=device)

    @functools.cached_property
    def beside(self) -> Beside:
        """Loaded where a row is measured; choosing settings needs the detector alone."""
        return load_beside(self.protocol, self.device)

    def measure(self, job: Job) -> Measurement:
        """Scores one job with the protocol's reporting seed and number of images.

        Raises:
            DimoError: Before an image is made: weights or reference of what is measured beside the
                verdicts are missing or others than the protocol's.
        """
        start, seed = time.monotonic(), self.protocol.seeds.report
        speed, cost = no_speed(self.device), None
        looks = Looks(self.beside)
        if job.images is not None:
            assert job.labels is not None
            results, content = self._judge_set(job.images, job.labels, looks)
        else:
            num_images = self.protocol.images.num_images
            results, content, speed, cost = self._make(job, seed, num_images, looks)
        found = Verdicts(
            results,
            [i % len(self.prompts) for i in range(len(results))],
            content.images_sha256,
            content.copies,
            self.detector.sha256,
            problems=[],
            notes=[],
            looks=looks,
        )
        return record_verdicts(
            found,
            self.protocol,
            images=(),
            method=method_info(job, cost),
            speed=speed,
            seed=seed,
            start=start,
        )

    def quality(self, job: Job, *, seed: int, num_images: int) -> float:
        """Only the overall GenEval score, for choosing settings."""
        results = self._make(job, seed, num_images, Looks(Beside()))[0]
        tags = [result.metadata["tag"] for result in results]
        numbers = [i % len(self.prompts) for i in range(len(results))]
        return summarize(tags, numbers, [result.correct for result in results]).overall

    def _make(
        self, job: Job, seed: int, num_images: int, looks: Looks
    ) -> tuple[list[ImageResult], Content, Speed, Cost]:
        maker = Maker(
            job,
            seed=seed,
            num_images=num_images,
            batch_size=self.batch_size,
            uint8=self.protocol.images.uint8,
            device=self.device,
            progress=self.progress,
        )
        results = self._judge(maker.batches(), looks)
        return results, maker.tally.content(), maker.speed(), maker.cost

    def _judge_set(
        self, images: Tensor, labels: Tensor, looks: Looks
    ) -> tuple[list[ImageResult], Content]:
        tally = Tally()
        size = self.batch_size
        parts = (
            tally.add(images[i : i + size], labels[i : i + size])
            for i in range(0, len(images), size)
        )
        return self._judge(parts, looks), tally.content()

    def _judge(self, batches: Iterator[tuple[Tensor, Tensor]], looks: Looks) -> list[ImageResult]:
        results: list[ImageResult] = []
        for images, labels in batches:
            asked = [self.prompts[number] for number in labels.tolist()]
            pixels = list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
            looks.add(pixels, [metadata["prompt"] for metadata in asked])
            for metadata, found in zip(asked, verdicts(self.detector, pixels, asked), strict=True):
                prompt, image = len(results) % len(self.prompts), len(results) // len(self.prompts)
                details = {name: group.boxes.tolist() for name, group in found.kept.items()}
                name = f"{prompt:05d}/samples/{image:04d}.png"
                results.append(ImageResult(name, found.correct, found.reason, metadata, details))
        return results


def rendered_jobs(loaded: Generator, protocol: Protocol) -> list[Job]:
    """Rendered scenes, and these through the tokenizer: the best any model on its tokens can do.

    None where the prompts are not those of `scenes`.
    """
    assert protocol.prompts is not None
    if protocol.prompts.name != EMBEDDED:
        return []
    index = torch.arange(protocol.images.num_images)
    images, labels = scenes.batch(protocol.seeds.report, index, "held-out")
    with torch.inference_mode():
        decoded = loaded.tokenizer.decode(loaded.tokenizer.encode(images))
    again = to_uint8(decoded, protocol.images.uint8).cpu()
    return [
        Job("Real data", "Reference", loaded, images=images, labels=labels),
        Job("Tokenizer reconstruction", "Reference", loaded, images=again, labels=labels),
    ]
