"""The embedded world `scenes`: its grammar, and that pictures show what prompts say."""

import pytest
import torch

from dimo.data.scenes import RGB, SIDE, batch, boxes_of, draw, render
from dimo.data.scenes.prompts import BACKGROUNDS, COLORS, RELATIONS, SHAPES, TAGS, Prompt, prompts
from dimo.errors import DimoError


@pytest.fixture(scope="module")
def held_out():
    return prompts("held-out")


@pytest.fixture(scope="module", params=[False, True], ids=["in steps", "free"])
def scenes(request):
    """Three pictures of each held-out prompt."""
    return draw(7, torch.arange(720), "held-out", free=request.param)


def test_held_out_prompts_are_balanced_and_not_in_training(held_out):
    assert [prompt.tag for prompt in held_out] == [tag for tag in TAGS for _ in range(40)]
    train = prompts("train")
    texts = {prompt.text for prompt in train}
    assert len(texts) == len(train)
    assert not texts & {prompt.text for prompt in held_out}
    assert {prompt.tag for prompt in train} == set(TAGS)


def test_held_out_relations_and_pairs_are_new_altogether(held_out):
    """No background and no colours make a position known, none a pair of coloured shapes."""

    def asked(prompt):
        colors = () if prompt.tag == "position" else prompt.colors
        return prompt.shapes, colors, prompt.relation

    for tag in ("position", "color_attr"):
        known = {asked(prompt) for prompt in prompts("train") if prompt.tag == tag}
        assert not known & {asked(prompt) for prompt in held_out if prompt.tag == tag}


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a large triangle",
        "a photo of an orange star",
        "a photo of two crosses on a dark background",
        "a photo of four hearts",
        "a photo of a square and a ring",
        "a photo of a red circle and an orange square",
        "a photo of a square right of a circle",
        "a photo of a red square above a blue circle",
    ],
)
def test_the_grammar_is_genevals(text, held_out):
    assert text in {prompt.text for prompt in (*prompts("train"), *held_out)}


def test_metadata_is_official(held_out):
    every = {prompt.text: prompt.metadata for prompt in (*prompts("train"), *held_out)}
    assert every["a photo of four hearts"] == {
        "tag": "counting",
        "include": [{"class": "heart", "count": 4}],
        "exclude": [{"class": "heart", "count": 5}],
        "prompt": "a photo of four hearts",
    }
    assert every["a photo of a red square above a blue circle"]["include"] == [
        {"class": "circle", "count": 1, "color": "blue"},
        {"class": "square", "count": 1, "color": "red", "position": ["above", 0]},
    ]
    assert every["a photo of a large triangle"]["include"] == [{"class": "triangle", "count": 1}]


def test_unknown_split():
    with pytest.raises(DimoError, match="unknown split of scenes 'test'; allowed: held-out, train"):
        prompts("test")


def test_pictures_depend_on_seed_and_index_alone():
    images, prompt = batch(3, torch.arange(40), "train")
    assert images.shape == (40, 3, SIDE, SIDE)
    assert images.dtype == torch.uint8
    parts = [batch(3, torch.arange(i, i + 5), "train") for i in range(0, 40, 5)]
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    assert torch.equal(torch.cat([part[1] for part in parts]), prompt)
    assert not torch.equal(batch(4, torch.arange(40), "train")[0], images)
    with pytest.raises(DimoError, match=r"indices have shape \[2, 2\]"):
        batch(0, torch.zeros(2, 2, dtype=torch.int64), "train")


def test_training_draws_every_tag_alike():
    _, prompt = batch(0, torch.arange(1400), "train")
    table = prompts("train")
    found = [table[i].tag for i in prompt.tolist()]
    for tag in TAGS:
        share = found.count(tag) / len(found)
        assert share == pytest.approx(2 / 7 if tag == "position" else 1 / 7, abs=0.03)


def test_objects_are_those_of_the_prompt(held_out, scenes):
    for row, number in enumerate(scenes.prompt.tolist()):
        prompt = held_out[number]
        assert row % 240 == number
        shapes = [shape for shape in scenes.shapes[row].tolist() if shape >= 0]
        assert tuple(shapes) == prompt.shapes
        for asked, shown in zip(prompt.colors, scenes.colors[row].tolist(), strict=False):
            assert asked in (-1, shown)


def test_objects_are_whole_and_apart(scenes):
    present = scenes.shapes >= 0
    coverage = scenes.coverage[present]
    assert coverage.sum(dim=(1, 2)).min() > 20  # pixels: a small cross
    assert float(scenes.coverage.sum(dim=1).max()) <= 1.3
    both = (scenes.coverage >= 0.5).sum(dim=1)
    assert int(both.max()) == 1
    edge = torch.cat([coverage[:, 0], coverage[:, -1], coverage[:, :, 0], coverage[:, :, -1]])
    assert float(edge.max()) < 0.7  # at most the tip of a star


def test_places_sizes_and_shades_come_in_steps_unless_free():
    index = torch.arange(400)
    stepped, free = (draw(7, index, "train", free=free) for free in (False, True))
    present = stepped.shapes >= 0
    assert torch.equal(stepped.shapes, free.shapes)
    assert torch.equal(stepped.colors, free.colors)
    assert len(stepped.radii[present].unique()) == 10
    assert not (stepped.centers[present] % 4).any()
    assert len(free.radii[present].unique()) > 500
    assert (free.centers[present] % 4).unique().numel() > 500
    assert (stepped.centers - free.centers)[present].abs().max() <= 4


def test_relations_hold(held_out, scenes):
    ours = torch.tensor([p.relation for p in held_out])[scenes.prompt]
    rows = ours >= 0
    offset = scenes.centers[rows, 1] - scenes.centers[rows, 0]  # second object to the first
    along = torch.where(ours[rows] < 2, offset[:, 0], offset[:, 1])
    across = torch.where(ours[rows] < 2, offset[:, 1], offset[:, 0])
    first = ours[rows] % 2 == 0  # "left of", "above"
    assert (along * torch.where(first, -1, 1) > 9).all()
    assert (across.abs() <= 5.01).all()
    assert RELATIONS == ("left of", "right of", "above", "below")


def test_colors_can_be_seen_on_their_background(scenes, held_out):
    images = scenes.images.float()
    foreground = scenes.coverage.sum(dim=1)
    for row in range(0, 720, 7):
        back = images[row][:, foreground[row] == 0].mean(dim=1)
        for slot in range(int((scenes.shapes[row] >= 0).sum())):
            inside = scenes.coverage[row, slot] == 1
            color = images[row][:, inside].mean(dim=1)
            assert float((color - back).norm()) > 60
            nearest = (torch.tensor(RGB) - color).norm(dim=1)
            assert float(nearest[scenes.colors[row, slot]]) < 75


def test_backgrounds_and_sizes_are_as_the_prompt_says():
    levels, areas = {}, {}
    for number, name in enumerate(BACKGROUNDS):
        scene = render(Prompt("", "single_object", (0,), (4,), background=number), 0, 1)
        levels[name] = float(scene.image[:, ~scene.masks[0]].float().mean())
    assert levels["light"] > 180 > 160 > levels["grey"] > 95 > 70 > levels["dark"]
    for size in (0, 1):
        masks = [
            render(Prompt("", "single_object", (1,), (-1,), size=size), 0, i).masks
            for i in range(5)
        ]
        areas[size] = [int(mask.sum()) for mask in masks]
    assert max(areas[0]) < min(areas[1])


def test_a_scene_says_what_is_where(held_out):
    prompt = next(p for p in held_out if p.tag == "color_attr")
    scene = render(prompt, 5, 17)
    assert scene.classes == tuple(SHAPES[i] for i in prompt.shapes)
    assert scene.colors == tuple(COLORS[i] for i in prompt.colors)
    assert scene.boxes.shape == (2, 4)
    for box, mask in zip(scene.boxes.tolist(), scene.masks, strict=True):
        x1, y1, x2, y2 = map(int, box)
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
        assert mask[y1].any()
        assert mask[y2 - 1].any()
        assert mask[:, x1].any()
        assert mask[:, x2 - 1].any()
    assert not torch.equal(render(prompt, 5, 18).image, scene.image)


def test_the_box_of_nothing_is_zero():
    assert boxes_of(torch.zeros(1, 4, 6, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]
