"""Prompt lists and the official layout: what is read, and what each mistake is told."""

import hashlib
import json

import pytest

from bench.images.codec import encode_png
from bench.protocol import Prompts, load_protocol
from bench.suites.geneval.layout import read_folder
from bench.suites.geneval.prompts import (
    bundled_prompts,
    list_sha256,
    read_prompts,
    same_list,
    tag_counts,
)
from dimo.errors import DimoError

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
CATS = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 2}],
    "exclude": [{"class": "cat", "count": 3}],
    "prompt": "two cats",
}
LEFT = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]},
    ],
    "prompt": "a red cat left of a dog",
}


def write(path, prompts):
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def test_a_list_is_named_by_its_bytes(tmp_path):
    path = write(tmp_path / "list.jsonl", [DOG, CATS, LEFT])
    found = read_prompts(path)
    assert found == (DOG, CATS, LEFT)
    assert list_sha256(found) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_prompts(path, sha256=list_sha256(found)) == found
    path.write_bytes(path.read_bytes()[:-1])  # no end to the last line
    assert read_prompts(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()) == found
    assert not same_list((CATS, DOG, LEFT), list_sha256(found))
    assert tag_counts(found) == {"single_object": 1, "counting": 1, "position": 1}


def test_another_list_than_the_official_one_is_refused(tmp_path):
    wanted = load_protocol("geneval").prompts
    path = write(tmp_path / "evaluation_metadata.jsonl", [DOG])
    with pytest.raises(DimoError, match=r"1 prompts have sha256 .* names 5c48e0813e81"):
        read_prompts(path, sha256=wanted.sha256)


def test_no_lines_and_no_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DimoError, match="no prompts: the file is empty"):
        read_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(DimoError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colour"}, "line 1: unknown tag 'colour'; allowed: single_object, "),
        ({"prompt": ""}, "'prompt' must be a text"),
        ({"include": ["dog"]}, r"'include\[0\]' must be a table"),
        ({"include": [{"class": "dog", "count": 0}]}, "needs a 'count' of 1 or more, not 0"),
        ({"include": [{"class": "d", "count": 1, "color": "teal"}]}, "unknown color 'teal'"),
        ({"include": [{"class": "d", "count": 1, "position": ["at", 0]}]}, "the position"),
        ({"include": [{"class": "d", "count": 1, "position": ["above", 0]}]}, "the target 0"),
        ({"exclude": [{"class": "d", "count": 1, "color": "red"}]}, "unknown key 'color'"),
    ],
)
def test_each_mistake_in_a_prompt_is_told(tmp_path, change, message):
    path = write(tmp_path / "list.jsonl", [DOG | change])
    with pytest.raises(DimoError, match=message) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_lines_that_are_no_json(tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps(DOG) + "\n{\n")
    with pytest.raises(DimoError, match="line 2 is not valid JSON"):
        read_prompts(tmp_path / "list.jsonl")


def test_any_text_may_be_a_prompt(tmp_path, write_prompts):
    odd = [DOG | {"prompt": "either/or a ../dog"}, DOG | {"prompt": "dog " * 80}]
    assert read_prompts(write(tmp_path / "list.jsonl", odd)) == tuple(odd)
    write_prompts(tmp_path / "set", odd)
    wanted = Prompts("odd", list_sha256(odd), 1, {"single_object": 2})
    for folder in (tmp_path / "set").iterdir():
        add_images(folder, 1)
    folders, problems = read_folder(tmp_path / "set", wanted)
    assert ([folder.metadata for folder in folders], problems) == (odd, [])


def add_images(folder, count):
    import numpy as np

    (folder / "samples").mkdir()
    for number in range(count):
        png = encode_png(np.zeros((4, 4, 3), dtype=np.uint8))
        (folder / "samples" / f"{number:04d}.png").write_bytes(png)


@pytest.fixture
def layout(tmp_path, write_prompts):
    """Three prompts of four images each, and what a protocol says of them."""
    prompts = [DOG, CATS, LEFT]
    write_prompts(tmp_path / "set", prompts)
    for number in range(3):
        add_images(tmp_path / "set" / f"{number:05d}", 4)
    tags = {"single_object": 1, "counting": 1, "position": 1}
    return tmp_path / "set", Prompts("three", list_sha256(prompts), 4, tags)


def test_the_official_layout(layout):
    path, wanted = layout
    (path / "00000" / "grid.png").write_bytes(b"no sample")
    (path / "notes").mkdir()
    folders, problems = read_folder(path, wanted)
    assert problems == []
    assert [folder.number for folder in folders] == [0, 1, 2]
    assert [file.name for file in folders[2].images] == [f"{i:04d}.png" for i in range(4)]


def test_images_of_another_format_and_none_at_all(layout):
    path, wanted = layout
    for file in path.glob("*/samples/*.png"):
        file.rename(file.with_suffix(".JPG"))
    folders, problems = read_folder(path, wanted)
    assert (problems, [len(folder.images) for folder in folders]) == ([], [4, 4, 4])
    (path / "00000" / "samples" / "0.png").touch()
    with pytest.raises(DimoError, match="two images of one number in 00000/samples: 0000"):
        read_folder(path, wanted)
    for file in path.glob("*/samples/*"):
        file.unlink()
    with pytest.raises(DimoError, match="no images in the folders of its prompts"):
        read_folder(path, wanted)


def test_the_order_of_keys_makes_no_other_list(layout):
    path, wanted = layout
    file = path / "00001" / "metadata.jsonl"
    file.write_text("\ufeff" + json.dumps(CATS, sort_keys=True) + "\n\n")
    assert read_folder(path, wanted)[1] == []


def test_what_is_missing_is_named(layout):
    import shutil

    path, wanted = layout
    shutil.rmtree(path / "00001")
    (path / "00002" / "samples" / "0003.png").unlink()
    _, problems = read_folder(path, wanted)
    assert problems == [
        "1 of 3 prompt folders are missing: 00001",
        "not 4 images: 00002 has 3",
    ]
    shutil.rmtree(path / "00002" / "samples")
    assert "not 4 images: 00002 has 0" in read_folder(path, wanted)[1]


def test_other_prompts_and_too_many(layout, write_prompts):
    path, wanted = layout
    (path / "00001" / "metadata.jsonl").write_text(json.dumps(CATS | {"prompt": "2 cats"}))
    assert read_folder(path, wanted)[1] == ["the prompts are not those of the list three"]
    write_prompts(path / "more", [DOG])
    (path / "more" / "00000").rename(path / "00007")
    assert "1 folders in excess of the 3 prompts: 00007" in read_folder(path, wanted)[1]


def test_folders_that_are_no_set(layout, tmp_path):
    path, wanted = layout
    with pytest.raises(DimoError, match="no such folder"):
        read_folder(tmp_path / "nowhere", wanted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DimoError, match="no folder of a prompt in it"):
        read_folder(tmp_path / "empty", wanted)
    (path / "1").mkdir()
    with pytest.raises(DimoError, match="two folders of one prompt: 00001"):
        read_folder(path, wanted)
    (path / "1").rmdir()
    (path / "00002" / "metadata.jsonl").unlink()
    with pytest.raises(DimoError, match=r"00002/metadata\.jsonl cannot be read"):
        read_folder(path, wanted)


def test_the_embedded_list_is_the_protocols():
    wanted = load_protocol("scenes-geneval").prompts
    prompts = bundled_prompts()
    assert same_list(prompts, wanted.sha256)
    assert tag_counts(prompts) == wanted.tags
    assert len(prompts) * wanted.images_per_prompt == 960


def test_official_protocols_fix_the_official_list():
    for name in ("geneval", "geneval-hf"):
        protocol = load_protocol(name)
        assert sum(protocol.prompts.tags.values()) == 553
        assert protocol.images.num_images == 2212
        assert protocol.prompts.sha256.startswith("5c48e0813e812e3c")
