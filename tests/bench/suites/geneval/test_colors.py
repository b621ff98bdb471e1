"""The colour classifier through CLIP: what it looks at, and what it compares with."""

import numpy as np
import pytest
import torch

from bench.features.resize import pil_central_square
from bench.metrics.geneval import COLORS, Detected
from bench.suites.geneval.mask2former import ClipColors, load_clip_encoder, object_crop
from dimo.errors import DimoError

TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Recorder:
    """Encoders whose space has an axis a colour; keeps what it is asked."""

    def __init__(self):
        self.crops, self.asked = [], []

    def images(self, images):
        self.crops += images
        return np.eye(10, dtype=np.float32)[[int(image[0, 0, 0]) for image in images]] * 7

    def texts(self, texts):
        self.asked += texts
        number = next(i for i, color in enumerate(COLORS) if color in texts[0])
        return np.eye(10, dtype=np.float32)[[number] * len(texts)] * 3


def test_colors_are_those_of_the_nearest_texts():
    recorder = Recorder()
    colors = ClipColors(recorder.images, recorder.texts)
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    image[2:6, 3:9] = 8  # "black", as the recorder sees it
    image[10:15, 3:9] = 4
    boxes = np.array([[3, 2, 9, 6, 0.9], [3, 10, 9, 15, 0.8]], dtype=np.float32)
    masks = np.zeros((2, 20, 30), dtype=bool)
    masks[0, 2:6, 3:9] = True
    masks[1, 10:15, 3:9] = True
    masks[1, 12:, 5:] = False
    assert colors(image, "dog", Detected(boxes, masks)) == ["black", "blue"]
    assert [crop.shape for crop in recorder.crops] == [(4, 6, 3), (5, 6, 3)]
    assert (recorder.crops[1][2:, 2:] == 0x99).all()
    assert recorder.asked[:3] == [
        "a photo of a red dog",
        "a photo of a red-colored dog",
        "a photo of a red object",
    ]
    assert colors(image, "dog", Detected(boxes)) == ["black", "blue"]
    assert len(recorder.asked) == 30  # texts are encoded once


def test_the_mean_text_is_normalised_before_and_after():
    def texts(given):
        if given[0] == "a photo of a green x":
            return np.array([[100.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        return np.array([[-1.0, 0.0]] * 3)

    nearer = []

    def images(given):
        nearer.append(len(given))
        return np.array([[0.4, 1.0]])

    box = np.array([[0, 0, 2, 2, 1]], dtype=np.float32)
    assert ClipColors(images, texts)(np.zeros((4, 4, 3), np.uint8), "x", Detected(box)) == ["green"]
    assert nearer == [1]


def test_crops_are_never_empty():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    for box in ([0, 0, 0, 0], [8, 8, 8, 8], [-3, 2, 40, 2.4], [3.4, 3.6, 3.5, 3.7]):
        crop = object_crop(image, np.array([*box, 1], dtype=np.float32), None)
        assert min(crop.shape) >= 1


def test_the_central_square():
    image = np.zeros((10, 40, 3), dtype=np.uint8)
    image[:, 15:25] = 255
    square = pil_central_square(image, 20)
    assert square.shape == (20, 20, 3)
    assert square[:, 4:16].min() > 250
    assert pil_central_square(image.transpose(1, 0, 2).copy(), 20)[4:16].min() > 250


def test_open_clips_network(tmp_path):
    import open_clip

    torch.manual_seed(0)
    network = open_clip.CLIP(**TINY).eval()
    path = tmp_path / "tiny.pt"
    torch.save(network.state_dict(), path)
    encoder = load_clip_encoder(path, torch.device("cpu"), TINY)
    tokens = open_clip.get_tokenizer("ViT-L-14")(["a red dog", "a cat"])
    with torch.inference_mode():
        expected = network.encode_text(tokens).numpy()
    assert encoder.texts(["a red dog", "a cat"]) == pytest.approx(expected, abs=1e-6)
    image = np.random.RandomState(0).randint(0, 255, (28, 28, 3)).astype(np.uint8)
    levels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    with torch.inference_mode():
        expected = network.encode_image((levels - mean) / std).numpy()
    assert encoder.images([image]) == pytest.approx(expected, abs=1e-5)
    colors = ClipColors(encoder.images, encoder.texts)
    box = np.array([[2, 2, 20, 20, 1]], dtype=np.float32)
    assert colors(image, "dog", Detected(box))[0] in COLORS
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(DimoError):
        load_clip_encoder(path, torch.device("cpu"), TINY)
