"""A detector from outside the package: one class, one row of `DETECTORS`, a protocol."""

import pytest
import torch

from bench.images.codec import encode_png
from bench.metrics.geneval import Detected
from bench.protocol import protocol_text, validate_file
from bench.protocol.networks import DETECTORS, DetectorKind
from bench.suites.base import ImageOrigin, load_suite
from bench.suites.geneval.prompts import bundled_prompts
from dimo.data import scenes
from dimo.engine.distributed import Runtime


class CircleSeer:
    """Sees one circle on every image, which is enough for one kind of prompt."""

    sha256, colors_sha256 = "ab" * 32, ""

    def detect(self, images):
        box = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.99]]).numpy()
        return [{"circle": Detected(box)} for _ in images]

    def colors(self, image, name, objects):
        return ["red"] * len(objects.boxes)


def load(weights, device):
    return CircleSeer()


def test_a_toy_detector_scores_images(tmp_path, monkeypatch, write_prompts):
    monkeypatch.setitem(DETECTORS, "circle-seer", DetectorKind(f"{__name__}:load"))
    text = protocol_text("scenes-geneval")
    start, end = text.index("[detector]"), text.index("[extractor]")
    text = text[:start] + TOY + text[end:]
    text = text.replace("num_images = 960", "num_images = 240")
    text = text.replace("images_per_prompt = 4", "images_per_prompt = 1")
    (tmp_path / "toy.toml").write_text(text.replace('name = "scenes-geneval"', 'name = "toy"'))
    protocol = validate_file(tmp_path / "toy.toml")
    prompts = bundled_prompts()
    write_prompts(tmp_path / "set", prompts)
    images, _ = scenes.batch(21, torch.arange(240), "held-out")
    for number, pixels in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        (tmp_path / "set" / f"{number:05d}" / "samples").mkdir()
        file = tmp_path / "set" / f"{number:05d}" / "samples" / "0000.png"
        file.write_bytes(encode_png(pixels))
    suite = load_suite(protocol, Runtime(torch.device("cpu")))
    record = suite.measure_paths([tmp_path / "set"], ImageOrigin("x")).record
    single = [p for p in prompts if p["tag"] == "single_object"]
    circles = [p for p in single if p["include"][0]["class"] == "circle"]
    assert record.metrics["geneval_single_object"].value == pytest.approx(
        len(circles) / len(single)
    )
    assert record.metrics["geneval_counting"].value == 0
    assert (record.evidence.detector, record.evidence.detector_sha256) == ("circle-seer", "ab" * 32)


TOY = """
[detector]
name = "circle-seer"
sha256 = "any"
colors = "none"

"""
