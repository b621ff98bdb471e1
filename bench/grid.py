"""A picture of what jobs make: one row a job, the same labels and noise down each column."""

__all__ = ["draw_samples"]

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.generate import sample_tokens
from bench.images import save_grid, to_uint8
from bench.jobs import Job
from dimo.errors import DimoError

_SIDE = 40  # pixels of one image in the grid, at least


@torch.inference_mode()
def draw_samples(
    jobs: Sequence[Job], labels: Sequence[int], *, seed: int, out: Path, device: torch.device
) -> None:
    """Writes a captioned PNG.

    Args:
        jobs: Networks with their settings; column i is image i of `seed` in each row.
        labels: One class a column; every class, twice, when empty.
        seed: Of the images.
        out: File to write, atomically.
        device: Where the networks are.

    Raises:
        DimoError: Nothing to draw.
    """
    if not jobs:
        raise DimoError("there is nothing to draw; name step counts with --steps or a --student")
    teacher = jobs[0].loaded.teacher
    wanted = list(labels) or [i % teacher.num_classes for i in range(2 * teacher.num_classes)]
    condition = torch.tensor(wanted, device=device)
    index = torch.arange(len(wanted), device=device)
    rows = []
    for job in jobs:
        assert job.settings is not None
        found = sample_tokens(job.loaded, job.settings, labels=condition, seed=seed, index=index)
        images = to_uint8(job.loaded.tokenizer.decode(found.tokens), "round")
        count = job.settings.num_steps
        rows.append((f"{job.name}, {count} step{'s' if count > 1 else ''}", images))
    scale = max(1, _SIDE // rows[0][1].shape[-1])
    save_grid(out, rows, columns=[teacher.class_names[label] for label in wanted], scale=scale)
