"""Mask2Former's output read as mmdet reads it, against a plain re-computation."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.suites.geneval.mask2former import (
    HFMask2Former,
    check_names,
    coco_names,
    instances,
    load_hf_detector,
    load_mask2former,
    prepared,
)
from dimo.errors import DimoError

CPU = torch.device("cpu")


def plain(class_logits, mask_logits, padded, resized, original, most):
    """One query and class after the other, in double loops."""
    probabilities = torch.softmax(class_logits, dim=1).tolist()
    pairs = [
        (p, query, label)
        for query, row in enumerate(probabilities)
        for label, p in enumerate(row[:-1])
    ]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:most]:
        logits = F.interpolate(mask_logits[None, query : query + 1], size=padded, mode="bilinear")
        logits = logits[:, :, : resized[0], : resized[1]]
        logits = F.interpolate(logits, size=original, mode="bilinear")[0, 0].numpy()
        mask = logits > 0
        values = 1 / (1 + np.exp(-logits[mask].astype(np.float64)))
        score = probability * values.sum() / (mask.sum() + 1e-6)
        box = [0, 0, 0, 0]
        if mask.any():
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        found.append((label, [*map(float, box), score], mask))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    class_logits = 3 * torch.randn(6, 5, generator=generator)
    mask_logits = 4 * torch.randn(6, 8, 8, generator=generator) - 3
    mask_logits[0] = -5  # an empty mask
    sizes = {"padded": (32, 32), "resized": (27, 32), "original": (19, 23)}
    classes, boxes, masks = instances(class_logits, mask_logits, **sizes, most=11)
    expected = plain(class_logits, mask_logits, **sizes, most=11)
    assert classes.tolist() == [label for label, _, _ in expected]
    for row, (_, box, mask) in enumerate(expected):
        assert boxes[row].tolist() == pytest.approx(box, abs=1e-5)
        assert np.array_equal(masks[row].numpy(), mask)


def test_at_most_as_many_as_there_are():
    classes, boxes, masks = instances(
        torch.randn(2, 4), torch.randn(2, 4, 4), padded=(8, 8), resized=(8, 8), original=(8, 8)
    )
    assert (len(classes), boxes.shape, masks.shape) == (6, (6, 5), (6, 8, 8))


@pytest.mark.parametrize(
    ("size", "resized"),
    [((512, 512), (800, 800)), ((400, 800), (667, 1333)), ((1024, 1024), (800, 800))],
)
def test_images_are_resized_in_proportion_and_padded(size, resized):
    image = np.full((*size, 3), 200, dtype=np.uint8)
    pixels, inner = prepared(image)
    assert inner == resized
    assert pixels.shape[2:] == tuple(math.ceil(side / 32) * 32 for side in resized)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx(
        [
            (200 - m) / s
            for m, s in zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), strict=True)
        ]
    )
    assert float(pixels[0, :, resized[0] :].abs().sum()) == 0


def test_class_names_are_genevals(golden):
    names = json.loads((golden / "geneval.data.json").read_text())["class_names"]
    assert list(coco_names()) == names
    theirs = dict(enumerate(names)) | {3: "motorbike", 57: "sofa", 64: "mouse"}
    check_names(theirs, "x")
    with pytest.raises(DimoError, match="class 0 of the network in x is 'cat'; allowed: COCO's"):
        check_names(theirs | {0: "cat"}, "x")
    with pytest.raises(DimoError, match="has 79 classes"):
        check_names({k: v for k, v in theirs.items() if k < 79}, "x")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A Mask2Former of a few channels with random weights, as `transformers` saves it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra t2i")
    names = dict(enumerate(coco_names()))
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_the_network_of_transformers(tiny_folder, monkeypatch):
    monkeypatch.setattr("bench.suites.geneval.mask2former._SHORT", 64)
    network = load_mask2former(tiny_folder)

    def colors(image, name, objects):
        return ["red"] * len(objects.boxes)

    detector = HFMask2Former(network, coco_names(), colors, device=CPU)
    image = np.random.RandomState(0).randint(0, 255, (40, 60, 3)).astype(np.uint8)
    (found,) = detector.detect([image])
    assert sum(len(group.boxes) for group in found.values()) == 100
    assert set(found) <= set(coco_names())
    for group in found.values():
        assert group.masks.shape == (len(group.boxes), 40, 60)
        assert group.boxes[:, 4].min() >= 0
        assert group.boxes[:, 4].max() <= 1
    (again,) = detector.detect([image])
    assert all(np.array_equal(found[name].boxes, again[name].boxes) for name in found)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_do_not_fit(tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(DimoError, match=r"no config\.json, model\.safetensors, ViT-L-14\.pt in"):
        load_hf_detector(tmp_path, CPU)
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DimoError, match=r"no ViT-L-14\.pt in"):
        load_hf_detector(tmp_path, CPU)
    with pytest.raises(DimoError, match="cannot load Mask2Former from"):
        load_mask2former(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DimoError, match=r"Mask2Former needs the package transformers; .*\[t2i\]"):
        load_mask2former(tmp_path)
