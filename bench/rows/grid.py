"""Pictures of what jobs make: one row a job, the same labels and noise down each column; and, for
the report, one picture a record, alike for all records of a protocol.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.images.codec import encode_png, save_grid
from bench.rows.rows import Job
from bench.rows.settings import sample_images
from dimo.errors import DimoError
from dimo.util.files import write_atomic
from dimo.zoo.loading import Generator
from dimo.zoo.teachers import Teacher

_FEW_CLASSES = 20  # of that many, each is drawn twice
_COLUMNS = 10  # of more classes, so many
_ENOUGH = 16  # images of a report's picture, or more
_GREY = 140  # between its images: no part of any of them, in light and in dark
_LARGEST = 128  # pixels of an image's side there: a page holds many pictures

Row: TypeAlias = tuple[str, Tensor]  # caption, and uint8 [C, 3, H, W] on the CPU


def shared_classes(teachers: Iterable[Teacher]) -> int:
    """The number of classes that all models have, given their teachers.

    Raises:
        DimoError: They do not share it, so that one label means different things.
    """
    sizes = {teacher.num_classes: teacher.name for teacher in teachers}
    if len(sizes) > 1:
        told = ", ".join(f"{name} has {size}" for size, name in sizes.items())
        raise DimoError(
            f"models of different classes cannot share the columns of a picture ({told}); draw "
            "one picture for each number of classes"
        )
    return next(iter(sizes))


def draw_samples(
    jobs: Sequence[Job],
    labels: Sequence[int],
    *,
    seed: int,
    out: Path,
    device: torch.device,
    batch_size: int = 50,
    progress: Callable[[str, int, int, str], None] = lambda what, done, total, unit: None,
    above: Sequence[Row] = (),
) -> None:
    """Writes a captioned PNG.

    Args:
        jobs: Networks with their settings; column i is image i of `seed` in each row.
        labels: One class a column; when empty every class, twice, or 10 spread over many classes.
        seed: Of the images.
        out: File to write, atomically.
        device: Where the networks are.
        batch_size: Images made at a time; has no influence on any image.
        progress: Told how far each row is.
        above: Rows of `sample_rows` with the same labels and seed, shown first.

    Raises:
        DimoError: The jobs do not share their classes.
    """
    rows = sample_rows(
        jobs, labels, seed=seed, device=device, batch_size=batch_size, progress=progress
    )
    wanted = list(labels) or _default_labels(_classes_of(jobs))
    loaded = jobs[0].loaded
    columns = [_condition(loaded, label) for label in wanted]
    save_grid(out, [*above, *rows], columns=columns, sentences=loaded.teacher.text is not None)


def sample_rows(
    jobs: Sequence[Job],
    labels: Sequence[int],
    *,
    seed: int,
    device: torch.device,
    batch_size: int = 50,
    progress: Callable[[str, int, int, str], None] = lambda what, done, total, unit: None,
) -> list[Row]:
    """A row for each job; arguments and errors as of `draw_samples`."""
    classes = _classes_of(jobs)
    wanted = list(labels) or _default_labels(classes)
    several = len({job.loaded.teacher.name for job in jobs}) > 1
    rows = []
    for number, job in enumerate(jobs, start=1):
        what = f"row {number}: {job.caption}"

        def on_done(done: int, what: str = what) -> None:
            progress(what, done, len(wanted), "images")

        images, nfe = _row(job, wanted, seed, device, batch_size, on_done)
        rows.append((_caption(job, nfe, name_teacher=several), images))
    return rows


def _classes_of(jobs: Sequence[Job]) -> int:
    shared_classes(job.loaded.teacher for job in jobs)
    return jobs[0].loaded.num_conditions


def write_picture(job: Job, folder: Path, run_id: str, *, seed: int, device: torch.device) -> None:
    """Writes `pictures/<run_id>.png` beside a record: images 0, 1, 2, ... of the seed, no captions.

    Labels and seed are those of every other record of the protocol, so that pictures compare image
    by image. A text chunk `dimo` holds them, as JSON: `seed`, `columns`, `labels` (their names).

    Args:
        job: A network with its settings.
        folder: Of the results.
        run_id: Of the record.
        seed: Of the images: the protocol's reporting seed.
        device: Where the network is.
    """
    classes = job.loaded.num_conditions
    if classes <= _FEW_CLASSES:
        columns = classes
        labels = math.ceil(max(_ENOUGH, 2 * columns) / columns) * list(range(columns))
    else:
        columns, count = _COLUMNS, 2 * _COLUMNS
        labels = [(2 * i + 1) * classes // (2 * count) for i in range(count)]
    images, _ = _row(job, labels, seed, device, len(labels), lambda done: None)
    names = [_condition(job.loaded, label) for label in labels]
    told = json.dumps({"seed": seed, "columns": columns, "labels": names})
    picture = encode_png(_tiled(images, columns).numpy(), text=told)
    write_atomic(folder / "pictures" / f"{run_id}.png", picture)


def _condition(loaded: Generator, label: int) -> str:
    """The prompt, or the first name of a class."""
    name = loaded.condition_names[label]
    return name.partition(",")[0] if loaded.teacher.text is None else name


def _tiled(images: Tensor, columns: int) -> Tensor:
    """uint8 [C, 3, H, W] as one picture, uint8 [H', W', 3]; large images are reduced."""
    factor = max(1, images.shape[-1] // _LARGEST)
    small = F.avg_pool2d(images.float(), factor).round().to(torch.uint8)
    gap = 1 + small.shape[-1] // 32
    framed = F.pad(small, (0, gap, 0, gap), value=_GREY)
    rows = math.ceil(len(framed) / columns)
    empty = framed.new_full((rows * columns - len(framed), *framed.shape[1:]), _GREY)
    tiles = torch.cat([framed, empty])
    grid = tiles.reshape(rows, columns, *tiles.shape[1:])  # [rows, columns, 3, h, w]
    return grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-gap, :-gap]


def _default_labels(classes: int) -> list[int]:
    if classes <= _FEW_CLASSES:
        return 2 * list(range(classes))
    return [(2 * i + 1) * classes // (2 * _COLUMNS) for i in range(_COLUMNS)]


def _row(
    job: Job,
    labels: Sequence[int],
    seed: int,
    device: torch.device,
    batch_size: int,
    on_done: Callable[[int], None],
) -> tuple[Tensor, int]:
    """Images 0..C-1 under `labels`, uint8 [C, 3, H, W] on the CPU, and their NFE."""
    assert job.settings is not None
    condition, index = torch.tensor(labels, device=device), torch.arange(len(labels), device=device)
    parts, nfe = [], 0
    for start in range(0, len(labels), batch_size):
        rows = slice(start, start + batch_size)
        batch = sample_images(
            job.loaded,
            job.settings,
            labels=condition[rows],
            seed=seed,
            index=index[rows],
            uint8="round",
        )
        parts.append(batch.images.cpu())
        nfe = batch.nfe
        on_done(min(start + batch_size, len(labels)))
    return torch.cat(parts), nfe


def _caption(job: Job, nfe: int, *, name_teacher: bool) -> str:
    """Method, steps and NFE; with `name_teacher` also which teacher it is, or is of."""
    assert job.settings is not None
    steps = job.settings.num_steps
    method = f"{job.name} [{job.loaded.teacher.name}]" if name_teacher else job.name
    return f"{method}\n{steps} step{'s' if steps > 1 else ''}, NFE {nfe}"
