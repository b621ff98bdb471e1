"""The chain on one screen: protocol + method -> images -> features -> metrics -> record.

The only module that sees both ends.
"""

__all__ = ["Workbench"]

import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bench import metrics as m
from bench.features import Features, extract, load_extractor
from bench.generate import generate, sample_tokens
from bench.jobs import Job
from bench.protocol import Metric, Protocol
from bench.record import MethodInfo, MetricValue, ResultRecord, Speed, new_record
from bench.references import load_reference
from bench.stats import compute_stats
from bench.uncertainty import bootstrap_frechet, bootstrap_inception_score, bootstrap_mean
from dimo.launch import device_name, peak_memory_bytes

Progress = Callable[[str, int, int], None]  # what is being done, images done, images in all


class Workbench:
    """Everything that the rows of one table share: protocol, extractor, reference features.

    Args:
        protocol: What is fixed.
        device: Where networks run.
        batch_size: Images at a time; changes speed, never a result.
        progress: Told how far the current row is.

    Raises:
        DimoError: Extractor or reference are missing or not those of the protocol.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        device: torch.device,
        batch_size: int = 500,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.protocol, self.device = protocol, device
        self.batch_size, self.progress = batch_size, progress
        self.extractor = load_extractor(
            protocol.extractor.name, sha256=protocol.extractor.sha256, device=device
        )
        self.reference = self._features(load_reference(protocol))
        self.reference_stats = compute_stats(self.reference.features, extractor=self.extractor.name)

    def measure(self, job: Job) -> ResultRecord:
        """Scores one job with the protocol's reporting seed and number of images."""
        start = time.monotonic()
        seed = self.protocol.seeds.report
        features, speed, cost = self._run(job, seed, self.protocol.images.num_images)
        metrics = self.score(features)
        return new_record(
            protocol=self.protocol,
            method=_method(job, cost),
            metrics=metrics,
            speed=speed,
            seed=seed,
            command=shlex.join(["dimo", *sys.argv[1:]]),
            seconds=time.monotonic() - start,
        )

    def fid(self, job: Job, *, seed: int, num_images: int) -> float:
        """Only the Fréchet distance, for choosing settings."""
        features, _, _ = self._run(job, seed, num_images)
        stats = compute_stats(features.features, extractor=self.extractor.name)
        return m.frechet_distance(generated=stats, reference=self.reference_stats)

    def score(self, features: Features) -> dict[str, MetricValue]:
        """Every metric of the protocol, with its interval."""
        memberships: dict[int, m.ManifoldMembership] = {}
        return {
            metric.name: self._score_one(metric, features, memberships)
            for metric in self.protocol.metrics
        }

    def _score_one(
        self, metric: Metric, found: Features, memberships: dict[int, m.ManifoldMembership]
    ) -> MetricValue:
        boot = dataclasses.asdict(self.protocol.uncertainty)
        count, extra = len(found.features), {}
        if metric.name == "fid":
            stats = compute_stats(found.features, extractor=self.extractor.name)
            value = m.frechet_distance(generated=stats, reference=self.reference_stats)
            interval = bootstrap_frechet(
                generated=found.features, reference=self.reference_stats, point=value, **boot
            )
        elif metric.name == "inception_score":
            splits, seed = metric.params["splits"], metric.params["seed"]
            score = m.inception_score(found.logits, splits=splits, seed=seed)
            value, extra = score.mean, {"std": score.std}
            boot["seed"] = seed  # the resamples use the metric's own shuffle
            interval = bootstrap_inception_score(found.logits, splits=splits, point=value, **boot)
        elif metric.name == "class_accuracy":
            hits = m.class_hits(found.logits, found.labels)
            value, interval = float(hits.mean()), bootstrap_mean(hits, **boot)
        else:  # precision, recall, density, coverage
            k = metric.params["k"]
            if k not in memberships:
                memberships[k] = m.manifold_membership(
                    generated=found.features, reference=self.reference.features, k=k
                )
            values = getattr(memberships[k], metric.name)
            value, interval = float(values.mean()), bootstrap_mean(values, **boot)
            if metric.name == "coverage":
                reference_count = len(self.reference.features)
                extra = {"ceiling": m.coverage_ceiling(count, reference_count, k)}
        return MetricValue(value, interval.low, interval.high, count, extra)

    def _run(self, job: Job, seed: int, num_images: int) -> tuple[Features, Speed, "_Cost | None"]:
        no_speed = Speed(None, None, None, None, device_name(self.device))
        if job.images is not None:
            return self._features((job.images, load_reference(self.protocol)[1])), no_speed, None
        assert job.settings is not None
        cost = self._warm_up(job, seed)
        seconds: list[float] = []
        done = 0

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal done
            stream = generate(
                job.loaded,
                job.settings,  # type: ignore[arg-type]
                seed=seed,
                num_images=num_images,
                batch_size=self.batch_size,
                uint8=self.protocol.images.uint8,
                device=self.device,
            )
            while True:
                start = time.perf_counter()
                batch = next(stream, None)
                if batch is None:
                    return
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds.append(time.perf_counter() - start)
                done += len(batch.images)
                self.progress(_caption(job), done, num_images)
                yield batch.images, batch.labels

        features = extract(self.extractor, batches())
        size = min(self.batch_size, num_images)
        full = seconds[: num_images // size]
        speed = Speed(
            images_per_second=size / statistics.median(full),
            seconds_per_batch=statistics.median(full),
            batch_size=size,
            peak_memory_bytes=peak_memory_bytes(self.device),
            device=device_name(self.device),
        )
        return features, speed, cost

    @torch.inference_mode()
    def _warm_up(self, job: Job, seed: int) -> "_Cost":
        """One small batch that is thrown away: warms the machine up and tells the costs."""
        assert job.settings is not None
        index = torch.arange(8, device=self.device)
        labels = index % job.loaded.teacher.num_classes
        samples = sample_tokens(job.loaded, job.settings, labels=labels, seed=seed, index=index)
        return _Cost(samples.nfe, tuple(samples.token_counts))

    def _features(self, labelled: tuple[Tensor, Tensor]) -> Features:
        images, labels = (t.to(self.device) for t in labelled)
        batches = DataLoader(TensorDataset(images, labels), batch_size=self.batch_size)
        return extract(self.extractor, batches)


@dataclass(frozen=True)
class _Cost:
    nfe: int
    token_counts: tuple[int, ...]


def _caption(job: Job) -> str:
    if job.settings is None or job.settings.sampler == "one_step":
        return job.name
    return f"{job.name}, {job.settings.num_steps} steps"


def _method(job: Job, cost: _Cost | None) -> MethodInfo:
    settings, student = job.settings, job.loaded.student
    training = {}
    if student is not None and settings is not None:
        training = {
            "recipe": student.recipe,
            "seconds": student.training_seconds,
            "images_seen": student.images_seen,
            "seed": student.seed,
        }
    return MethodInfo(
        name=job.name,
        section=job.section,
        teacher=job.loaded.teacher.name,
        sampler=settings.sampler if settings else None,
        num_steps=settings.num_steps if settings else None,
        nfe=cost.nfe if cost else None,
        mask_schedule=settings.mask_schedule if settings else None,
        token_counts=cost.token_counts if cost else None,
        guidance_scale=settings.guidance_scale if settings else None,
        temperature=settings.temperature if settings else None,
        choice_temperature=settings.choice_temperature if settings else None,
        selected_by=settings.selected_by if settings else "nothing to select",
        weights_sha256=job.loaded.weights_sha256 if settings else None,
        training=training,
    )
