"""The detector of scenes: right on pictures that show what is asked for, and wrong on others."""

import numpy as np
import pytest
import torch

from bench.metrics.geneval import Detected, judge
from bench.protocol import load_protocol
from bench.suites.geneval.detectors import load_detector, verdicts
from bench.suites.geneval.scenes_detector import (
    SceneDetector,
    SceneNetwork,
    detection_loss,
    detector_accuracy,
    disturbed,
    load_scene_detector,
    scene_colors,
    spoilt,
    train_scene_network,
)
from dimo.data.scenes import RGB, draw, render
from dimo.data.scenes.prompts import COLORS, SHAPES, TAGS, prompts
from dimo.errors import DimoError
from dimo.weights.catalog import ASSETS
from dimo.weights.files import load_metadata

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def detector():
    return load_scene_detector(None, CPU)


def pixels(images):
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())


@pytest.mark.parametrize("disturb", [False, True])
def test_right_pictures_are_found_right(detector, disturb):
    found = detector_accuracy(detector, seed=11, per_prompt=4, disturb=disturb)
    assert list(found) == list(TAGS)
    assert min(found.values()) >= 0.98


def test_wrong_pictures_are_found_wrong(detector):
    """Each picture, asked for as another prompt of its tag of which the truth says it is wrong."""
    scenes = draw(12, torch.arange(480), "held-out")
    asked = prompts("held-out")
    images, questions = [], []
    for row in range(480):
        mine = asked[int(scenes.prompt[row])]
        others = [p for p in asked if p.tag == mine.tag]
        other = others[(row * 7 + 3) % len(others)]
        truth, colors = answers(scenes, row)
        if not judge(truth, other.metadata, colors=colors).correct:
            images.append(pixels(scenes.images[row : row + 1])[0])
            questions.append(other.metadata)
    found = verdicts(detector, images, questions)
    assert len(found) > 400
    for tag in TAGS:
        wrong = [
            not verdict.correct
            for verdict, question in zip(found, questions, strict=True)
            if question["tag"] == tag
        ]
        assert len(wrong) > 30
        assert np.mean(wrong) >= 0.95


def answers(scenes, row):
    """What is on a picture, as a detector without fault would say it."""
    truth, names = {}, {}
    for slot in range(4):
        shape = int(scenes.shapes[row, slot])
        if shape >= 0:
            mask = scenes.coverage[row, slot].numpy() >= 0.5
            y, x = mask.nonzero()
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1, 1.0]
            truth.setdefault(SHAPES[shape], []).append((box, mask))
            names[mask.tobytes()] = COLORS[int(scenes.colors[row, slot])]
    found = {
        name: Detected(
            np.array([box for box, _ in group], dtype=np.float32),
            np.stack([mask for _, mask in group]),
        )
        for name, group in truth.items()
    }
    return found, lambda name, objects: [names[mask.tobytes()] for mask in objects.masks]


def test_the_truth_passes_the_rules():
    scenes = draw(13, torch.arange(240), "held-out")
    for row, prompt in enumerate(prompts("held-out")):
        truth, colors = answers(scenes, row)
        assert judge(truth, prompt.metadata, colors=colors).correct, prompt.text


def test_nothing_is_found_where_nothing_is(detector):
    index = torch.arange(300)
    images = spoilt(draw(14, index, "held-out").images, 14, index)
    found = detector.detect(pixels(images))
    some = [any((d.boxes[:, 4] > 0.3).any() for d in picture.values()) for picture in found]
    assert np.mean(some) <= 0.05


def test_boxes_and_masks_are_those_of_the_objects(detector):
    overlaps = []
    for number in range(0, 240, 9):
        scene = render(prompts("held-out")[number], 15, number)
        found = detector.detect(pixels(scene.image[None]))[0]
        for name in set(scene.classes):
            rows = [i for i, other in enumerate(scene.classes) if other == name]
            sure = found[name].at(np.flatnonzero(found[name].boxes[:, 4] > 0.9).tolist())
            assert len(sure.boxes) == len(rows)
            for i in rows:
                mask = scene.masks[i].numpy()
                overlap = [(mask & m).sum() / (mask | m).sum() for m in sure.masks]
                overlaps.append(max(overlap))
                box = sure.boxes[int(np.argmax(overlap)), :4]
                assert np.abs(box - scene.boxes[i].numpy()).max() < 2.5
    assert min(overlaps) > 0.5
    assert np.mean(overlaps) > 0.8


@pytest.mark.usefixtures("two_threads")
def test_a_result_does_not_depend_on_the_batch(detector):
    images = pixels(draw(16, torch.arange(130), "held-out").images)
    together = detector.detect(images)
    for row in (0, 119, 120, 129):
        alone = detector.detect(images[row : row + 1])[0]
        assert list(alone) == list(together[row])
        for name, group in alone.items():
            assert group.boxes == pytest.approx(together[row][name].boxes, abs=1e-4)
    assert detector.detect([]) == []


def test_colors_of_plain_patches():
    mask = np.zeros((1, 32, 32), dtype=bool)
    mask[0, 8:16, 8:16] = True
    objects = Detected(np.array([[8, 8, 16, 16, 1]], dtype=np.float32), mask)
    for name, color in zip(COLORS, RGB, strict=True):
        for shade in (0.85, 1.0):
            image = np.full((32, 32, 3), 128, dtype=np.uint8)
            image[8:16, 8:16] = np.clip(np.array(color) * shade, 0, 255)
            assert scene_colors(image, objects) == [name]
    empty = Detected(objects.boxes, np.zeros_like(mask))
    assert scene_colors(np.zeros((32, 32, 3), dtype=np.uint8), empty) == ["black"]


def test_other_sizes_are_refused(detector):
    with pytest.raises(DimoError, match="takes images of 32 x 32, not 16 x 32"):
        detector.detect([np.zeros((16, 32, 3), dtype=np.uint8)])


def test_training_learns():
    losses = []
    network = train_scene_network(
        steps=20,
        batch_size=8,
        learning_rate=lambda step: 3e-3,
        weight_decay=0.01,
        seed=0,
        on_step=lambda step, loss: losses.append(loss),
    )
    assert max(losses[-3:]) < 0.8 * losses[0]
    index = torch.arange(4)
    scenes = draw(0, index, "train")
    outputs = network(disturbed(scenes.images, 0, index))
    assert outputs["features"].shape == (4, SceneNetwork.feature_dim)
    assert torch.isfinite(detection_loss(outputs, scenes))
    assert isinstance(SceneDetector(network, CPU).detect(pixels(scenes.images)), list)


def test_the_shipped_weights_are_the_protocols(detector):
    protocol = load_protocol("scenes-geneval")
    assert protocol.detector.sha256 == detector.sha256
    assert min(protocol.detector.accuracy.values()) >= 0.98
    path = ASSETS / "scenes-detector.safetensors"
    assert path.stat().st_size <= 2**20
    assert 'extractor = "scenes-detector"' in load_metadata(path)["recipe"]
    assert isinstance(load_detector(protocol.detector, weights=None, device=CPU), SceneDetector)
