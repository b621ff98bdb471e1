"""GenEval's rules against the official evaluator's decisions, and its geometry by hand."""

import itertools
import json

import numpy as np
import pytest

from bench.metrics.geneval import (
    COLORS,
    RELATIONS,
    TAGS,
    Detected,
    Rules,
    box_overlap,
    judge,
    keep_detections,
    relations,
    summarize,
)
from dimo.errors import DimoError


@pytest.fixture(scope="module")
def official(golden):
    return json.loads((golden / "geneval.data.json").read_text())


def detected(case, names):
    """Detections in the order of the detector's classes, and the colours the stub gives."""
    found = {
        name: Detected(np.array(case["detections"][name], dtype=np.float32))
        for name in sorted(case["detections"], key=names.index)
    }

    def colors(name, objects):
        boxes = found[name].boxes.tolist()
        return [case["colors"][name][boxes.index(box)] for box in objects.boxes.tolist()]

    return found, colors


def same_reason(ours, theirs, ambiguous):
    if not ambiguous:
        return ours == theirs
    return sorted(ours.replace("\n", " ").split()) == sorted(theirs.replace("\n", " ").split())


def test_every_official_decision(official):
    checked = 0
    for case in official["cases"]:
        found, colors = detected(case, official["class_names"])
        options = Rules(**case["options"])
        verdict = judge(found, case["metadata"], colors=colors, rules=options)
        if "raises" in case:
            assert not verdict.correct
            assert verdict.reason == "no target for dog to be left of"
            continue
        assert verdict.correct == case["correct"], case
        assert same_reason(verdict.reason, case["reason"], case["reason_order_ambiguous"]), case
        kept = {name: group.boxes.tolist() for name, group in verdict.kept.items()}
        assert kept == case["kept"]
        assert list(kept) == list(case["kept"])
        checked += 1
    assert checked >= 140


def test_the_defaults_are_official(official):
    assert {key: getattr(Rules(), key) for key in official["defaults"]} == official["defaults"]
    assert list(COLORS) == official["colors"]


def test_official_boxes_and_relations(official):
    for unit in official["units"]["compute_iou"]:
        assert box_overlap(unit["a"], unit["b"]) == pytest.approx(unit["iou"], abs=1e-12)
    for unit in official["units"]["relative_position"]:
        assert set(relations(unit["a"], unit["b"])) == set(unit["relations"])


def test_the_official_summary(official, golden):
    lines = (golden / "geneval_results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = summarize(
        [row["tag"] for row in rows],
        [row["metadata"] for row in rows],
        [row["correct"] for row in rows],
    )
    expected = official["summary"]
    for key in ("total_images", "total_prompts"):
        assert getattr(found, key) == expected[key]
    for key in ("correct_images", "correct_prompts", "overall"):
        assert getattr(found, key) == pytest.approx(expected[key], abs=1e-12)
    assert list(found.tags) == list(expected["tags"])
    for tag, score in expected["tags"].items():
        assert vars(found.tags[tag]) == pytest.approx(score)


@pytest.mark.parametrize(("dx", "dy"), list(itertools.product((-40, 0, 40), repeat=2)))
def test_relations_of_equal_boxes(dx, dy):
    a, b = (100 + dx, 100 + dy, 110 + dx, 110 + dy), (100, 100, 110, 110)
    expected = [("left of", dx < 0), ("right of", dx > 0), ("above", dy < 0), ("below", dy > 0)]
    assert relations(a, b) == tuple(name for name, holds in expected if holds)
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert set(relations(b, a)) == {turned[name] for name in relations(a, b)}


def test_an_offset_along_one_axis_hides_a_small_one_along_the_other():
    box = (0.0, 0.0, 10.0, 10.0)
    assert relations((100, 20, 110, 30), box) == ("right of",)
    assert relations((3, 0, 13, 10), box) == ()  # 3 of 0.1 * 20 leaves a third of the distance
    assert relations((5, 0, 15, 10), box) == ("right of",)
    assert relations((5, 0, 15, 10), box, position_threshold=0.2) == ()
    assert relations(box, box) == ()


def no_color(name, objects):
    raise AssertionError(f"nobody asked for the colour of {name}")


def test_of_equal_scores_the_first_is_kept():
    boxes = np.array([[0, 0, 1, 1, 0.5], [2, 2, 3, 3, 0.5], [4, 4, 5, 5, 0.6]], dtype=np.float32)
    kept = keep_detections({"dog": Detected(boxes)}, "colors", Rules(max_objects=2))
    assert kept["dog"].boxes[:, 0].tolist() == [4, 0]


def test_masks_follow_their_boxes():
    boxes = np.array([[0, 0, 1, 1, 0.4], [2, 2, 3, 3, 0.2], [4, 4, 5, 5, 0.6]], dtype=np.float32)
    masks = np.eye(3, dtype=bool)[:, None]
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    seen = []

    def colors(name, objects):
        seen.append(objects.masks[:, 0].argmax(axis=1).tolist())
        return ["red", "red"]

    assert judge({"dog": Detected(boxes, masks)}, metadata, colors=colors).correct
    assert seen == [[2, 0]]


def test_excluded_objects():
    dogs = np.array([[0, 0, 1, 1, 0.95], [2, 2, 3, 3, 0.94], [4, 4, 5, 5, 0.5]], dtype=np.float32)
    include = [{"class": "dog", "count": 2}]
    exclude = [{"class": "dog", "count": 3}]
    found = {"dog": Detected(dogs)}
    question = {"tag": "counting", "include": include, "exclude": exclude}
    assert judge(found, question, colors=no_color).correct
    verdict = judge(found, question | {"tag": "two_object"}, colors=no_color)
    assert (verdict.correct, verdict.reason) == (False, "expected dog<3, found 3")


def test_two_relations_are_named_in_one_order():
    found = {
        "cat": Detected(np.array([[200, 200, 300, 300, 0.9]], dtype=np.float32)),
        "dog": Detected(np.array([[310, 310, 410, 410, 0.8]], dtype=np.float32)),
    }
    clause = {"class": "dog", "count": 1, "position": ["left of", 0]}
    metadata = {"tag": "position", "include": [{"class": "cat", "count": 1}, clause]}
    verdict = judge(found, metadata, colors=no_color)
    assert verdict.reason == "expected dog left of target, found right of and below target"
    clause["position"] = ["left of", 1]  # a group that is not there yet
    assert judge(found, metadata, colors=no_color).reason == "no target for dog to be left of"


def test_overall_counts_every_tag_the_same():
    found = summarize(["colors"] * 3 + ["counting"], ["a", "a", "b", "c"], [True, False, True, 0])
    assert found.overall == pytest.approx((2 / 3 + 0) / 2)
    assert (found.correct_images, found.correct_prompts) == (0.5, pytest.approx(2 / 3))
    with pytest.raises(DimoError, match="3 tags, 2 prompts and 3 decisions"):
        summarize(["a"] * 3, ["p"] * 2, [True] * 3)
    with pytest.raises(DimoError, match="one image or more"):
        summarize([], [], [])


def test_tags_and_relations_are_the_official_ones(official):
    tags = {case["metadata"]["tag"] for case in official["cases"]}
    assert set(TAGS) == tags - {"custom"}
    clauses = [c for case in official["cases"] for c in case["metadata"]["include"]]
    assert {c["position"][0] for c in clauses if "position" in c} == set(RELATIONS)
