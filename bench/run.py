"""The chain on one screen: protocol + method -> images -> features -> metrics -> record.

The only module that sees both ends.
"""

__all__ = ["TUNABLE", "Job", "Workbench", "parse_grid", "reference_jobs", "student_job", "teacher_jobs", "tune"]

import dataclasses
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import metrics as m
from bench.features import Features, extract, load_extractor
from bench.generate import SamplerSettings, generate, sample_tokens
from bench.images import to_uint8
from bench.protocol import Metric, Protocol
from bench.record import MethodInfo, MetricValue, ResultRecord, Section, Speed, new_record
from bench.references import load_reference
from bench.stats import compute_stats
from bench.uncertainty import bootstrap_frechet, bootstrap_inception_score, bootstrap_mean
from dimo.errors import DimoError
from dimo.launch import device_name, peak_memory_bytes
from dimo.masking import tokens_per_step
from dimo.teachers import Loaded

Progress = Callable[[str, int, int], None]  # what is being done, images done, images in all


@dataclass(frozen=True)
class Job:
    """One row to be: a network with sampler settings, or a fixed set of images.

    Attributes:
        name: Name in tables.
        section: Block of the table.
        loaded: The network; for a fixed set, whose tokenizer and teacher it belongs to.
        settings: Sampler settings; None for a fixed set.
        images: The fixed set, uint8 [N, 3, H, W]; None for a network.
    """

    name: str
    section: Section
    loaded: Loaded
    settings: SamplerSettings | None = None
    images: Tensor | None = None


def teacher_jobs(loaded: Loaded, steps: Sequence[int], overrides: Mapping[str, float]) -> list[Job]:
    """The teacher at each number of steps, with its defaults unless `overrides` say otherwise.

    Raises:
        DimoError: A number of steps that the grid does not take.
    """
    defaults = dataclasses.asdict(loaded.teacher.defaults) | dict(overrides)
    if overrides:
        defaults["selected_by"] = "given on the command line"
    jobs = []
    for num_steps in steps:
        tokens_per_step(defaults["mask_schedule"], num_steps, loaded.model.num_tokens)
        settings = SamplerSettings(sampler="confidence", num_steps=num_steps, **defaults)
        jobs.append(Job("MaskGIT", "Teacher", loaded, settings))
    return jobs


def student_job(loaded: Loaded, temperature: float | None) -> Job:
    """A one-step student at the temperature its run chose, or at the given one."""
    assert loaded.student is not None
    chosen = (loaded.student.temperature, loaded.student.temperature_selected_by)
    if temperature is not None:
        chosen = (temperature, "given on the command line")
    settings = SamplerSettings(sampler="one_step", temperature=chosen[0], selected_by=chosen[1])
    return Job(loaded.name, "Distill.", loaded, settings)


def reference_jobs(loaded: Loaded, protocol: Protocol) -> list[Job]:
    """Real data, and real data through the tokenizer: the best any model on its tokens can do."""
    images, _ = load_reference(protocol)
    with torch.inference_mode():
        decoded = loaded.tokenizer.decode(loaded.tokenizer.encode(images))
    again = to_uint8(decoded, protocol.images.uint8).cpu()
    return [
        Job("Real data", "Reference", loaded, images=images),
        Job("Tokenizer reconstruction", "Reference", loaded, images=again),
    ]


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
        self.reference_stats = compute_stats(
            self.reference.features, extractor=self.extractor.name
        )

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
        size = self.batch_size
        return extract(
            self.extractor, zip(images.split(size), labels.split(size), strict=True)
        )


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


TUNABLE = ("temperature", "guidance_scale", "choice_temperature")


def tune(workbench: Workbench, job: Job, grid: Mapping[str, Sequence[float]]) -> Job:
    """The job with the settings of lowest FID on the protocol's selection seed.

    Settings that the job's sampler does not have are left out of its grid. The reporting seed is
    never looked at.

    Args:
        workbench: Where to score.
        job: A network's job.
        grid: Setting -> values to try, all combinations.

    Raises:
        DimoError: A setting that cannot be tuned, or a value out of range.
    """
    seeds = workbench.protocol.seeds
    settings = job.settings
    if settings is None:
        return job
    axes = {key: values for key, values in grid.items() if getattr(settings, key) is not None}
    best: tuple[float, SamplerSettings] | None = None
    for values in itertools.product(*axes.values()):
        tried = dataclasses.replace(settings, **dict(zip(axes, values, strict=True)))
        found = workbench.fid(
            dataclasses.replace(job, settings=tried), seed=seeds.select, num_images=seeds.n_select
        )
        if best is None or found < best[0]:
            best = (found, tried)
    assert best is not None
    tried_text = " x ".join(f"{key} in {_numbers(values)}" for key, values in axes.items())
    selected_by = f"lowest FID on seed {seeds.select}, {seeds.n_select} images, over {tried_text}"
    return dataclasses.replace(job, settings=dataclasses.replace(best[1], selected_by=selected_by))


def parse_grid(options: Iterable[str]) -> dict[str, list[float]]:
    """`["temperature=0.8,1"]` -> `{"temperature": [0.8, 1.0]}`.

    Raises:
        DimoError: Not of that form, an unknown setting, or a value that is not positive.
    """
    grid: dict[str, list[float]] = {}
    for option in options:
        key, _, text = option.partition("=")
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if key not in TUNABLE or not values or min(values) <= 0:
            raise DimoError(
                f"--tune {option!r} is not SETTING=VALUE,VALUE,... with positive values; "
                f"settings: {', '.join(TUNABLE)}; e.g. --tune temperature=0.8,1"
            )
        grid[key] = values
    return grid


def _numbers(values: Sequence[float]) -> str:
    return "{" + ", ".join(f"{value:g}" for value in values) + "}"
