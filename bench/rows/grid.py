"""Sample pictures: a captioned grid with one row per job, and the picture beside each record.

Each column of a grid has one label and the same noise in all rows.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.images.codec import encode_png, save_grid, to_uint8
from bench.rows.rows import Job
from bench.rows.settings import sample_images
from dimo.errors import DimoError
from dimo.util.files import write_atomic
from dimo.util.terminal import Progress, quiet
from dimo.zoo.generator import Generator
from dimo.zoo.teachers import Teacher

_FEW_CLASSES = 20  # up to this number of classes, each is drawn twice
_COLUMNS = 10  # number of classes to draw when there are more
_ENOUGH = 16  # minimum number of images in a record's picture
_GREY = 140  # between the images of a record's picture, visible on light and dark pages
_LARGEST = 128  # maximum side of an image in a record's picture, in pixels

Row: TypeAlias = tuple[str, Tensor]  # caption, and uint8 [C, 3, H, W] on the CPU


def shared_classes(teachers: Iterable[Teacher]) -> int:
    """The number of classes that all models share, given their teachers.

    Raises:
        DimoError: They have different classes, so one label would mean different things.
    """
    sizes = {teacher.num_classes: teacher.name for teacher in teachers}
    if len(sizes) > 1:
        numbers = ", ".join(f"{name} has {size}" for size, name in sizes.items())
        raise DimoError(
            f"models of different classes cannot share the columns of a picture ({numbers}); draw "
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
    progress: Progress = quiet,
    above: Sequence[Row] = (),
) -> None:
    """Writes a captioned PNG.

    An edit shows what is known of its image first.

    Args:
        jobs: Networks with their settings; column i is image i of `seed` in each row.
        labels: One class per column; empty: each class twice, or 10 spread over many classes.
        above: Rows of `sample_rows` with the same labels and seed, shown first.

    Raises:
        DimoError: The jobs do not share their classes.
    """
    shown, loaded = _shown(jobs, labels), jobs[0].loaded
    rows = sample_rows(
        jobs, shown, seed=seed, device=device, batch_size=batch_size, progress=progress
    )
    columns = [_condition(loaded, label) for label in shown]
    if loaded.known is not None:
        above = [("known tokens", _known(loaded).repeat(len(shown), 1, 1, 1)), *above]
    save_grid(out, [*above, *rows], columns=columns, sentences=loaded.teacher.text is not None)


@torch.inference_mode()
def _known(loaded: Generator) -> Tensor:
    """The known tokens of an edit as an image, uint8 [1, 3, H, W]; the others are grey."""
    assert loaded.known is not None
    tokens, mask = loaded.known.tokens[None], loaded.known.mask
    image = to_uint8(loaded.tokenizer.decode(tokens), "round").cpu()
    grid = math.isqrt(len(mask))
    patches = mask.view(1, 1, grid, grid).float().cpu()
    painted = F.interpolate(patches, image.shape[2:]).bool()
    return image.masked_fill(painted, _GREY)


def sample_rows(
    jobs: Sequence[Job],
    labels: Sequence[int],
    *,
    seed: int,
    device: torch.device,
    batch_size: int = 50,
    progress: Progress = quiet,
) -> list[Row]:
    """One row per job; arguments and errors as for `draw_samples`."""
    shown = _shown(jobs, labels)
    several = len({job.loaded.teacher.name for job in jobs}) > 1
    rows = []
    for number, job in enumerate(jobs, start=1):
        what = f"row {number}: {job.caption}"

        def on_done(done: int, what: str = what) -> None:
            progress(what, done, len(shown), "images")

        images, nfe = _row(job, shown, seed, device, batch_size, on_done)
        assert job.settings is not None
        steps = job.settings.num_steps
        method = f"{job.name} [{job.loaded.teacher.name}]" if several else job.name
        rows.append((f"{method}\n{steps} step{'s' if steps > 1 else ''}, NFE {nfe}", images))
    return rows


def write_picture(job: Job, folder: Path, run_id: str, *, seed: int, device: torch.device) -> None:
    """Writes `pictures/<run_id>.png` beside a record: images 0, 1, 2, ... of the seed, no captions.

    All records of a protocol have the same labels and seed, so pictures compare image by image. The
    text chunk `dimo` holds them as JSON: `seed`, `columns`, `labels` (names).
    """
    classes = job.loaded.num_conditions
    if classes <= _FEW_CLASSES:
        columns = classes
        labels = math.ceil(max(_ENOUGH, 2 * columns) / columns) * list(range(columns))
    else:
        columns, labels = _COLUMNS, _spread(classes, 2 * _COLUMNS)
    images, _ = _row(job, labels, seed, device, len(labels), lambda done: None)
    names = [_condition(job.loaded, label) for label in labels]
    text = json.dumps({"seed": seed, "columns": columns, "labels": names})
    picture = encode_png(_tiled(images, columns).numpy(), text=text)
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


def _shown(jobs: Sequence[Job], labels: Sequence[int]) -> list[int]:
    """The given labels, else those of `draw_samples`."""
    if labels:
        return list(labels)
    shared_classes(job.loaded.teacher for job in jobs)
    classes = jobs[0].loaded.num_conditions
    return 2 * list(range(classes)) if classes <= _FEW_CLASSES else _spread(classes, _COLUMNS)


def _spread(classes: int, count: int) -> list[int]:
    """`count` labels at equal distances."""
    return [(2 * i + 1) * classes // (2 * count) for i in range(count)]


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
