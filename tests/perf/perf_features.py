"""Speed of the extractors beside their peers: `make perf`."""

import time

import pytest
import torch
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from bench.features import extract, load_extractor, resize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    small = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small.float(), size=256, mode="bilinear")
    return large.to(torch.uint8)


@torch.inference_mode()
def _milliseconds(count, *functions, repeats=3):
    """Per image, of each function: the fastest of `repeats` runs, which take turns."""
    fastest = [float("inf")] * len(functions)
    for _ in range(1 + repeats):  # the first one warms up, and is slower
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return [seconds / count * 1e3 for seconds in fastest]


def test_one_pass_against_torch_fidelity(inception_weights, images):
    """Theirs at its default batch size, and without sFID's features."""
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )
    ours = load_extractor("inception", sha256="any", weights=inception_weights, device=CPU)
    slow, fast = _milliseconds(
        len(images), lambda: theirs(images), lambda: extract(ours, [(images, None)])
    )
    print(f"\nInception {fast:.0f} ms an image, torch-fidelity {slow:.0f} ms: {slow / fast:.2f} x")
    assert slow >= 1.2 * fast


def test_tf1_bilinear_against_torch_fidelity(images):
    slow, fast = _milliseconds(
        len(images),
        lambda: interpolate_bilinear_2d_like_tensorflow1x(
            images.float(), size=(299, 299), align_corners=False
        ),
        lambda: resize.tf1_bilinear(images, 299),
    )
    print(f"\ntf1-bilinear {fast:.2f} ms an image, torch-fidelity {slow:.2f}: {slow / fast:.1f} x")
    assert slow >= 1.5 * fast
