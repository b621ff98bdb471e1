"""Generates the images of a row and measures speed and cost."""

import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.images.checks import Tally
from bench.records.record import Speed
from bench.rows.rows import Job
from bench.rows.settings import generate, sample_tokens
from dimo.engine.distributed import device_name, peak_memory_bytes
from dimo.samplers.base import Samples
from dimo.util.terminal import Progress, quiet, stop_if_asked


class Maker:
    """Generates the images of one row as `generate` does; `tally` hashes them."""

    def __init__(
        self,
        job: Job,
        *,
        seed: int,
        num_images: int,
        batch_size: int,
        uint8: str,
        device: torch.device,
        progress: Progress = quiet,
    ) -> None:
        self.job, self.seed, self.num_images, self.device = job, seed, num_images, device
        self.batch_size = min(batch_size, num_images)
        self.uint8, self.progress, self.tally = uint8, progress, Tally()
        self.samples = self._warm_up()
        self._seconds: list[float] = []

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order: uint8 [B, 3, H, W] and labels int64 [B]."""
        assert self.job.settings is not None
        stream = generate(
            self.job.loaded,
            self.job.settings,
            seed=self.seed,
            num_images=self.num_images,
            batch_size=self.batch_size,
            uint8=self.uint8,
            device=self.device,
        )
        done = 0
        while True:
            start = time.perf_counter()
            batch = next(stream, None)
            if batch is None:
                return
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._seconds.append(time.perf_counter() - start)
            done += len(batch.images)
            self.progress(self.job.caption, done, self.num_images, "images")
            stop_if_asked("run the same command again")
            yield self.tally.add(batch.images, batch.labels)

    def speed(self) -> Speed:
        """Speed of the median full batch."""
        seconds = statistics.median(self._seconds[: self.num_images // self.batch_size])
        return Speed(
            images_per_second=self.batch_size / seconds,
            seconds_per_batch=seconds,
            batch_size=self.batch_size,
            peak_memory_bytes=peak_memory_bytes(self.device),
            device=device_name(self.device),
        )

    @torch.inference_mode()
    def _warm_up(self) -> Samples:
        """One small batch, to warm up and to know the cost."""
        job = self.job
        assert job.settings is not None
        index = torch.arange(8, device=self.device)
        labels = index % job.loaded.num_conditions
        return sample_tokens(job.loaded, job.settings, labels=labels, seed=self.seed, index=index)


def no_speed(device: torch.device) -> Speed:
    """Speed of images that were read from files."""
    return Speed(None, None, None, None, device_name(device))
