"""A scanned set against a protocol: what is an error, what is not the protocol's, what is told."""

from dataclasses import replace

import numpy as np
import pytest

from bench.images import content_sha256, find_problems
from bench.images.codec import ImageInfo

COUNT = 40
GOOD = [ImageInfo(f"{i:064x}", 8, 9, "RGB", "png", None) for i in range(COUNT)]
NAMES = [f"{i:03d}.png" for i in range(COUNT)]
LABELS = np.arange(COUNT) % 10
NO_LABELS = object()


def _find(changes=None, *, infos=None, labels=LABELS, **options):
    """Findings for the good set, with the images in `changes` altered."""
    infos = list(GOOD if infos is None else infos)
    for number, change in (changes or {}).items():
        infos[number] = replace(infos[number], **change)
    rules = {
        "names": NAMES[: len(infos)],
        "ignored": [],
        "count": COUNT,
        "resolution": (8, 9),
        "channels": 3,
        "num_classes": 10,
        "balanced": True,
    }
    labels = None if labels is NO_LABELS else labels[: len(infos)]
    return find_problems(infos, labels, **(rules | options))


def _lines(found):
    return found.errors, found.nonconforming, found.notes


def test_a_good_set_is_found_good():
    found = _find()
    assert (*_lines(found), found.duplicates) == ([], [], [], 0)


ALL = range(COUNT)
CASES = {  # what differs, where it must be told, what the line must say
    "unreadable": (
        {"changes": {3: {"problem": "cut short"}, 5: {"problem": "zero bytes"}}},
        "errors",
        "2 of 40 images cannot be scored (cut short: '003.png'; zero bytes: '005.png'); allowed",
    ),
    "mixed sizes": (
        {"changes": {7: {"height": 16}}, "resolution": (8, 9)},
        "errors",
        "2 sizes (height x width): 8 x 9 in 39 images ('000.png', '001.png', '002.png', and 36 "
        "more), 16 x 9 in 1 image ('007.png'); allowed: one size",
    ),
    "nothing": ({"infos": [], "count": 0}, "errors", "0 images; allowed: at least 1"),
    "too few": ({"infos": GOOD[:30]}, "nonconforming", "30 images; allowed: 40 (10 missing)"),
    "too many": ({"count": 30}, "nonconforming", "40 images; allowed: 30 (10 too many)"),
    "size": (
        {"resolution": (9, 8)},
        "nonconforming",
        "size 8 x 9 in 40 images ('000.png', '001.png', '002.png', and 37 more); allowed: 9 x 8",
    ),
    "grey": (
        {"changes": {2: {"mode": "L"}}},
        "nonconforming",
        "mode L in 1 image ('002.png'); allowed: RGB of 8 bits",
    ),
    "opaque alpha": ({"changes": {2: {"mode": "RGBA"}}}, "nonconforming", "mode RGBA in 1"),
    "palette where grey is asked for": (
        {"changes": {2: {"mode": "P"}}, "channels": 1},
        "nonconforming",
        "mode P in 1 image ('002.png'); allowed: L or RGB of 8 bits",
    ),
    "jpeg": (
        {"changes": {i: {"codec": "jpeg"} for i in ALL}},
        "nonconforming",
        "lossy codec jpeg in 40 images ('000.png', '001.png', '002.png', and 37 more); allowed",
    ),
    "webp": ({"changes": {1: {"codec": "webp"}}}, "nonconforming", "lossy codec webp in 1 image"),
    "labels too large": (
        {"labels": LABELS + 1},
        "nonconforming",
        "labels from 1 to 10, out of range in 4 images ('009.png', '019.png', '029.png', and 1 "
        "more); allowed: 0 to 9",
    ),
    "labels too small": ({"labels": LABELS - 1}, "nonconforming", "labels from -1 to 8"),
    "unbalanced": (
        {"labels": np.where(LABELS == 4, 3, LABELS)},
        "nonconforming",
        "labels are not balanced: 0 images of label 4, 8 of label 3; allowed: equally many of",
    ),
    "many copies": (
        {"changes": {i: {"sha256": GOOD[0].sha256} for i in range(6)}},
        "nonconforming",
        "5 of 40 images are exact copies of others ('001.png' of '000.png', '002.png' of "
        "'000.png', '003.png' of '000.png'); allowed: 10%",
    ),
    "a few copies": (
        {"changes": {i: {"sha256": GOOD[0].sha256} for i in range(5)}},
        "notes",
        "4 of 40 images are exact copies of others ('001.png' of '000.png',",
    ),
    "no labels": ({"labels": NO_LABELS}, "notes", "labels are unknown, so their balance is not"),
    "ignored": (
        {"ignored": ["grid.gif", "log.txt"]},
        "notes",
        "2 other files left out ('grid.gif', 'log.txt')",
    ),
    "unpadded names": (
        {"names": ["1.png", "10.png", "2.png", *NAMES[3:]]},
        "notes",
        "sorted by name '10.png' comes before '2.png'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_finding_is_one_line_in_its_place(case):
    options, place, expected = CASES[case]
    found = _find(**options)
    (line,) = getattr(found, place)
    assert expected in line
    assert "\n" not in line
    assert sum(map(len, _lines(found))) == 1 + (case == "mixed sizes")


def test_what_must_not_be_complained_about():
    assert _find({1: {"codec": "webp-lossless"}}).nonconforming == []
    assert _find({1: {"mode": "L"}}, channels=1).nonconforming == []
    assert _find(labels=np.zeros(COUNT, dtype=np.int64), balanced=False).nonconforming == []
    assert _find(labels=NO_LABELS, num_classes=None).notes == []
    assert _find(labels=LABELS + 99, num_classes=None).nonconforming == []
    for names in (["b9/0.png", "c8/1.png"], ["10ab.png", "1b.png"], ["v2_09.png", "v2_10.png"]):
        assert _find(names=[*names, *NAMES[2:]]).notes == []


def test_a_bad_image_is_neither_a_copy_nor_of_a_size():
    broken = {"sha256": "", "height": 0, "width": 0, "mode": "", "codec": "", "problem": "gone"}
    found = _find({1: broken, 2: broken})
    assert found.duplicates == 0
    assert (found.nonconforming, found.notes) == ([], [])


def test_thousands_of_bad_images_are_counted_and_twenty_named():
    infos = [replace(info, problem="cut short") for info in GOOD * 100]
    names = [f"{i:04d}.png" for i in range(len(infos))]
    (line,) = _find(infos=infos, labels=NO_LABELS, names=names, num_classes=None).errors
    assert "4,000 of 4,000 images cannot be scored" in line
    assert "'0019.png'; and 3,980 more" in line
    assert "'0020.png'" not in line


def test_all_is_told_at_once():
    found = _find(
        {0: {"problem": "zero bytes"}, 1: {"mode": "L"}, 2: {"codec": "jpeg"}},
        count=50,
        resolution=(8, 8),
        labels=LABELS // 2,
    )
    assert [len(lines) for lines in _lines(found)] == [1, 5, 0]


def test_content_hash_depends_on_images_their_order_and_labels():
    turned = [GOOD[1], GOOD[0], *GOOD[2:]]
    variants = [
        content_sha256(GOOD, None),
        content_sha256(turned, None),
        content_sha256(GOOD[:-1], None),
        content_sha256(GOOD, LABELS),
        content_sha256(GOOD, LABELS[::-1]),
        content_sha256([], None),
    ]
    assert len(set(variants)) == len(variants)
    assert content_sha256(list(GOOD), LABELS.astype(np.int32)) == content_sha256(GOOD, LABELS)
    other = [replace(info, codec="array", mode="L") for info in GOOD]
    assert content_sha256(other, None) == content_sha256(GOOD, None)
