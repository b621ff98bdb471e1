"""Inception's three outputs, against torch-fidelity's and clean-fid's own pipelines."""

import cleanfid.features
import cleanfid.fid
import cleanfid.inception_pytorch
import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorInceptionV3

from bench.features import load_extractor
from bench.features.inception import load_inception
from bench.protocol.catalog import ANY
from bench.protocol.networks import EXTRACTORS
from dimo.util.files import sha256_file
from dimo.weights.files import save_tensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def official(inception_weights):
    return FeatureExtractorInceptionV3(
        "official", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )


@pytest.fixture(scope="module")
def images(make_images):
    return make_images(12, 64, 64)


def _close(found, expected, tolerance=1e-6):
    """Within float32's rounding, which is in `expected` as well."""
    found, expected = (torch.as_tensor(values).double() for values in (found, expected))
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


@torch.inference_mode()
def test_one_pass_gives_what_torch_fidelity_gives(official, inception_weights, images):
    seen = []
    hook = official.Mixed_6d.register_forward_hook(lambda *call: seen.append(call[-1]))
    features, logits = official(images)
    hook.remove()
    (middle,) = seen  # [12, 768, 17, 17]
    extractor = load_extractor(
        "inception", sha256=sha256_file(inception_weights), weights=inception_weights, device=CPU
    )
    assert extractor.resize == "tf1-bilinear"
    found = extractor.network(images)
    assert tuple(found) == extractor.outputs
    _close(found["features"], features)
    _close(found["logits"], logits)
    spatial = [  # NHWC: the channel changes fastest
        middle[:, channel, row, column]
        for row in range(17)
        for column in range(17)
        for channel in range(7)
    ]
    _close(found["spatial"], torch.stack(spatial, 1), tolerance=2e-6)  # no average over pixels


@torch.inference_mode()
def test_we_are_as_exact_as_torch_fidelity(official, inception_weights, images):
    """Against float64 throughout, folding and layout cost nothing that matters."""
    few = images[:2]
    found, float32 = load_inception(inception_weights, "tf1-bilinear")(few), official(few)
    official.double().feature_extractor_internal_dtype = torch.float64
    try:
        float64 = official(few)
    finally:
        official.float().feature_extractor_internal_dtype = torch.float32
    for ours, theirs, exact in zip(
        (found["features"], found["logits"]), float32, float64, strict=True
    ):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@torch.inference_mode()
def test_haltons_resize_goes_through_bytes(official, inception_weights, images):
    resize = cleanfid.resize.build_resizer("clean")
    levels = [resize(image.permute(1, 2, 0).numpy()).astype(np.uint8) for image in images[:4]]
    features, logits = official(torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2))
    found = load_inception(inception_weights, "pil-bicubic-floor")(images[:4])
    _close(found["features"], features)
    _close(found["logits"], logits)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(images[:4]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision.models._utils")
@torch.inference_mode()
def test_torch_bilinear_is_cleanfids_legacy_pytorch(inception_weights, images, folder, monkeypatch):
    """Its own network (pytorch-fid's) with the same weights, over a folder."""
    monkeypatch.setattr(
        cleanfid.inception_pytorch,
        "load_state_dict_from_url",
        lambda *_, **__: torch.load(inception_weights),
    )
    network = cleanfid.features.build_feature_extractor("legacy_pytorch", CPU, False)
    expected = cleanfid.fid.get_folder_features(
        str(folder), network, num_workers=0, device=CPU, mode="legacy_pytorch", verbose=False
    )
    found = load_inception(inception_weights, "torch-bilinear")(images[:4])
    _close(found["features"], expected)


@torch.inference_mode()
def test_each_resize_has_its_own_features(inception_weights, images):
    found = [
        load_inception(inception_weights, resize)(images[:1])["features"]
        for resize in EXTRACTORS["inception"].resizes
    ]
    distances = torch.cdist(torch.cat(found), torch.cat(found)) / found[0].norm()
    assert (distances + torch.eye(len(found)) > 1e-4).all()


@torch.inference_mode()
def test_safetensors_do_as_well(inception_weights, images, tmp_path):
    save_tensors(tmp_path / "inception.safetensors", torch.load(inception_weights))
    extractor = load_extractor(
        "inception", sha256=ANY, weights=tmp_path / "inception.safetensors", device=CPU
    )
    expected = load_inception(inception_weights, "tf1-bilinear")(images[:1])
    assert torch.equal(extractor.network(images[:1])["features"], expected["features"])
    assert {"torch", "torch-fidelity", "pillow"} == extractor.packages.keys()
