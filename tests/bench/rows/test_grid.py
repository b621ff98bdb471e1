"""Pictures of samples: tiles and captions, and rows that do not depend on how they are made."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bench.images.codec import save_grid
from bench.rows.grid import draw_samples, shared_classes, write_picture
from bench.rows.rows import jobs_of
from bench.rows.settings import sample_images
from dimo.errors import DimoError
from dimo.zoo.loading import load

CPU = torch.device("cpu")
LONG = [
    "golden retriever",
    "American Staffordshire terrier",
    "black-and-tan coonhound",
    "Supercalifragilisticexpialidociousness in one word and then more of them",
]


@pytest.fixture(scope="module")
def jobs():
    teacher, student = (load(name, device=CPU) for name in ("digits", "digits-dimo"))
    return [*jobs_of(teacher, [1, 2]), *jobs_of(student, [1])]


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def noise(side):
    return torch.randint(0, 255, (len(LONG), 3, side, side), dtype=torch.uint8)


def find_tile(picture, tile):
    """Top left corner of the only place where the pixels of `tile` are."""
    height, width, _ = tile.shape
    starts = np.argwhere((picture[: 1 - height, : 1 - width] == tile[0, 0]).all(-1))
    found = [(y, x) for y, x in starts if (picture[y : y + height, x : x + width] == tile).all()]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("side", [8, 32, 256])
def test_captions_stay_over_their_column(side, tmp_path):
    """The strip above the gap between two columns is empty, whatever the names."""
    images = noise(side)
    save_grid(tmp_path / "x.png", [("one\n1 step, NFE 1", images), ("two", images)], columns=LONG)
    picture = read(tmp_path / "x.png")
    scale = max(1, 40 // side)
    tiles = images.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)
    upper = picture[: picture.shape[0] * 2 // 3]  # the second row shows the same tiles
    corners = [find_tile(upper, tile) for tile in tiles]
    top = corners[0][0]
    assert (picture[:top] < 128).any(), "there are captions"
    assert {y for y, _ in corners} == {top}
    for (_, left), (_, right) in itertools.pairwise(corners):
        assert (picture[:top, left + side * scale : right] == 255).all()


def test_rows_of_other_sizes_share_a_grid(tmp_path):
    rows = [("large", noise(64)), ("small", noise(16))]
    save_grid(tmp_path / "x.png", rows, columns=LONG)
    picture = read(tmp_path / "x.png")
    for (_, images), scale in zip(rows, (1, 2), strict=True):
        for image in images:
            tile = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
            find_tile(picture, tile)


def test_captions_have_letters_for_greek_names(tmp_path):
    for name in ("τ-leaping", "tau-leaping"):
        save_grid(tmp_path / f"{name}.png", [(name, torch.zeros(1, 3, 8, 8).byte())], columns=["é"])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_the_batch_size_changes_no_picture_and_progress_is_told(jobs, tmp_path):
    told = []
    for size in (3, 50):
        draw_samples(
            jobs,
            [],
            seed=3,
            out=tmp_path / f"{size}.png",
            device=CPU,
            batch_size=size,
            progress=lambda *said: told.append(said),
        )
    assert (tmp_path / "3.png").read_bytes() == (tmp_path / "50.png").read_bytes()
    assert len({what for what, *_ in told}) == len(jobs)
    assert [said[1:] for said in told[:7]] == [
        (done, 20, "images") for done in (3, 6, 9, 12, 15, 18, 20)
    ]


def test_models_of_other_classes_do_not_share_columns(jobs):
    teacher = dataclasses.replace(jobs[0].loaded.teacher, name="five", num_classes=5)
    own = [job.loaded.teacher for job in jobs]
    assert shared_classes(own) == 10
    with pytest.raises(DimoError, match=r"digits has 10, five has 5.*one picture for each"):
        shared_classes([*own, teacher])


def test_rows_of_two_teachers_name_them(jobs, tmp_path):
    teacher = dataclasses.replace(jobs[0].loaded.teacher, name="a-teacher-with-a-long-name")
    other = dataclasses.replace(
        jobs[0], loaded=dataclasses.replace(jobs[0].loaded, teacher=teacher)
    )
    widths = []
    for name, rows in (("one", jobs), ("two", [*jobs, other])):
        draw_samples(rows, [3], seed=3, out=tmp_path / f"{name}.png", device=CPU)
        widths.append(read(tmp_path / f"{name}.png").shape[1])
    assert widths[1] > widths[0] + 100


def test_a_picture_for_the_report_holds_the_images_of_the_seed(jobs, tmp_path):
    """Tile i is image i of label i modulo 10, whatever the method; text says so."""
    teacher = jobs[1]
    write_picture(teacher, tmp_path, "ab", seed=1000, device=CPU)
    path = tmp_path / "pictures" / "ab.png"
    with Image.open(path) as picture:
        told = json.loads(picture.text["dimo"])
    assert told == {"seed": 1000, "columns": 10, "labels": [str(i % 10) for i in range(20)]}
    pixels = read(path)
    assert pixels.shape == (2 * 9 - 1, 10 * 9 - 1, 3)
    index = torch.arange(20)
    images = sample_images(
        teacher.loaded, teacher.settings, labels=index % 10, seed=1000, index=index, uint8="round"
    ).images
    for i in (0, 9, 10, 19):
        y, x = 9 * (i // 10), 9 * (i % 10)
        assert (pixels[y : y + 8, x : x + 8] == images[i].permute(1, 2, 0).numpy()).all()
