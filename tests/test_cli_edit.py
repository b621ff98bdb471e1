"""`dimo sample --image --mask`: edits as a picture and as files, one line for each mistake."""

import json

import numpy as np
import pytest
from PIL import Image

from dimo.models import digits


@pytest.fixture
def files(tmp_path):
    """A digit, the mask of its lower half in three modes, and what cannot be used."""
    digit = digits.load()[0][3].permute(1, 2, 0).numpy()
    Image.fromarray(digit).save(tmp_path / "3.png")
    lower = Image.fromarray((np.arange(8)[:, None] >= 4).repeat(8, 1).astype(np.uint8) * 255)
    for mode in ("1", "L", "RGBA"):
        lower.convert(mode).save(tmp_path / f"{mode}.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (16, 8), 255).save(tmp_path / "wide.png")
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    clear.save(tmp_path / "clear.png")
    return tmp_path


def _pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def test_edits_of_a_digit(dimo, files):
    edit = ("sample", "--image", "3.png", "--mask")
    dimo(*edit, "L.png", "--steps", "1,16", "--labels", "3,3,8", "--out", "grid.png")
    dimo("sample", "--steps", "1,16", "--labels", "3,3,8", "--out", "plain.png")
    with Image.open(files / "grid.png") as grid, Image.open(files / "plain.png") as plain:
        assert grid.height == plain.height + 45  # a row of what is known

    for mode in ("1", "L", "RGBA"):
        dimo(*edit, f"{mode}.png", "--steps", "4", "--count", "12", "--out", mode)
    made = _pixels(files / "L")
    assert (made == _pixels(files / "1")).all()
    assert (made == _pixels(files / "RGBA")).all()
    assert (made[:, :4] == made[0, :4]).all()
    assert len(np.unique(made[:, 4:], axis=0)) == 12
    about = json.loads((files / "L" / "sampling.json").read_text())
    assert len(about["known_tokens"]) == 64

    dimo("sample", "--steps", "4", "--count", "12", "--out", "plain")
    assert (_pixels(files / "plain") != made).any()
    _, err = dimo("sample", "--steps", "4", "--count", "12", "--out", "L", code=2)
    assert "other settings (known_tokens)" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "3.png", "--mask", "L.png", "--model", "digits-dimo"), "cannot edit images"),
        (("--image", "3.png"), "--image needs --mask FILE"),
        (("--mask", "L.png"), "--mask needs --image FILE"),
        (("--image", "3.png", "--mask", "black.png"), "mask is empty"),
        (("--image", "3.png", "--mask", "wide.png"), "[8, 16]; allowed: bool [8, 8]"),
        (("--image", "wide.png", "--mask", "L.png"), "[3, 8, 16]; allowed: uint8 [3, 8, 8]"),
        (("--image", "3.png", "--mask", "clear.png"), "transparent pixels"),
        (("--image", "3.png", "--mask", "no.png"), "cannot read no.png"),
    ],
)
def test_mistakes_are_one_line(dimo, files, arguments, words):
    out, err = dimo("sample", "--out", "x.png", *arguments, code=2)
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert not (files / "x.png").exists()
