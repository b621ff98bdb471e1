"""Loading by hash, running third-party code, and features that do not depend on batches."""

import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from bench.features import FORWARD_BATCH, extract, load_extractor
from bench.protocol.catalog import ANY, load
from bench.protocol.networks import EXTRACTORS
from dimo.errors import DimoError
from dimo.models import digits
from dimo.util.files import sha256_file
from dimo.weights.catalog import ASSETS

CPU = torch.device("cpu")
SHIPPED = ASSETS / "digits-cnn.safetensors"

# Its features tell the size of the batch and the images' place in it, besides the images.
FOREIGN = """
import torch

class Means(torch.nn.Module):
    outputs = ("features", "logits")

    def forward(self, images):
        batch = torch.full((len(images),), len(images))
        place = torch.arange(len(images))
        levels = images.double().mean((2, 3))
        features = torch.cat([torch.stack([batch, place], 1), levels], 1)
        return {"features": features, "logits": levels.log()}

def load(weights):
    return Means()

def load_one_output(weights):
    network = Means()
    network.outputs = ("features", "spatial")
    return network

def load_nothing(weights):
    return weights

number = 1
"""


@pytest.fixture(autouse=True)
def foreign(tmp_path, monkeypatch):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("foreign", None)


@pytest.fixture
def means():
    return load_extractor("foreign:load", sha256=ANY, device=CPU, allow_code=True)


@pytest.fixture(scope="module")
def cnn():
    return load_extractor("digits-cnn", sha256=ANY, device=CPU)


def _batches(images, labels, sizes):
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        yield images[rows], None if labels is None else labels[rows]
        start += size
    assert start == len(images)


def test_every_extractor_of_the_catalog_can_be_loaded():
    for kind in EXTRACTORS.values():
        assert callable(load(kind.loader))
        assert (kind.shipped is None) == bool(kind.weights)


@pytest.mark.usefixtures("two_threads")
def test_features_do_not_depend_on_batches(cnn):
    images, labels = (rows[:75] for rows in digits.load())
    whole = extract(cnn, [(images, labels)], count=75)
    odd = extract(cnn, _batches(images, labels, [1, 33, 7, 0, 34]))
    assert whole.features.shape == (75, 64)
    assert whole.logits.shape == (75, 10)
    assert whole.spatial is None
    for name in ("features", "logits", "labels"):
        assert np.array_equal(getattr(whole, name), getattr(odd, name))
    assert whole.features.dtype == whole.logits.dtype == np.float32
    assert whole.labels.dtype == np.int64
    last = extract(cnn, [(images[64:], None)])
    assert np.array_equal(last.features, whole.features[64:])
    assert last.labels is None


@pytest.mark.parametrize("sizes", [[70], [32, 38], [1] * 70, [69, 1]], ids=str)
@pytest.mark.parametrize("count", [70, None])
def test_the_network_always_sees_full_batches_in_order(means, make_images, sizes, count):
    images = make_images(70, 4, 6)
    found = extract(means, _batches(images, None, sizes), count=count).features
    assert (found[:, 0] == FORWARD_BATCH).all()
    assert found[:, 1].tolist() == [i % FORWARD_BATCH for i in range(70)]
    assert np.array_equal(found[:, 2:], images.double().mean((2, 3)).float().numpy())


def test_extraction_leaves_precision_as_it_was(means, make_images):
    seen = []
    means.network.register_forward_hook(
        lambda *_: seen.append(
            (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        )
    )
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    try:
        extract(means, [(make_images(1, 4, 4), None)])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert seen == [("highest", False)]
    assert torch.backends.cudnn.allow_tf32 == before[1]


@pytest.mark.parametrize("count", [69, 71])
def test_another_number_of_images_is_refused(means, make_images, count):
    with pytest.raises(DimoError, match=rf"got 70 images .* allowed: {count};"):
        extract(means, [(make_images(70, 4, 4), None)], count=count)


def test_no_images_are_refused(means):
    with pytest.raises(DimoError, match=r"got 0 images .* at least 1"):
        extract(means, [])


def test_features_that_are_not_finite_are_refused(means, make_images):
    images = make_images(50, 4, 4)
    images[41] = 0  # its logarithm is minus infinity
    with pytest.raises(DimoError, match="logits that are not finite, first for image 41;"):
        extract(means, [(images, None)])


def test_images_of_two_sizes_are_refused(means, make_images):
    batches = [(make_images(2, 4, 4), None), (make_images(2, 4, 6), None)]
    with pytest.raises(DimoError, match="got images of 4 x 6 pixels; allowed here: 4 x 4"):
        extract(means, batches)


def test_images_of_the_wrong_size_are_refused(cnn, make_images):
    with pytest.raises(DimoError, match="got images of 8 x 9 pixels; allowed here: 8 x 8"):
        extract(cnn, [(make_images(2, 8, 9), None)])


def test_hash_and_versions_are_recorded(cnn, means, tmp_path):
    digest = sha256_file(SHIPPED)
    assert (cnn.name, cnn.resize, cnn.sha256) == ("digits-cnn", "", digest)
    assert cnn.outputs == ("features", "logits")
    assert cnn.packages == {"torch": version("torch")}
    assert load_extractor("digits-cnn", sha256=digest, device=CPU).sha256 == digest
    assert (means.name, means.image_size) == ("foreign:load", None)
    (tmp_path / "weights").write_bytes(b"1")
    given = load_extractor(
        "foreign:load", sha256=ANY, weights=tmp_path / "weights", device=CPU, allow_code=True
    )
    of_weights = sha256_file(tmp_path / "weights")
    assert len({means.sha256, given.sha256, of_weights}) == 3  # with the code's


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("inceptoin", {}, "unknown extractor 'inceptoin'.* did you mean 'inception'"),
        ("digits-cnn", {"sha256": "0" * 64}, "have sha256 0eadf6.* protocol names 000000000000"),
        ("digits-cnn", {"resize": "pil-bicubic"}, "unknown resize of .*allowed: none"),
        ("inception", {"resize": "bicubic"}, "unknown resize of .*'bicubic'.*pil-bicubic-floor"),
        ("inception", {}, "weights-inception-2015-12-05-6726825d.pth.*--extractor-weights FILE"),
        (
            "inception",
            {"weights": "nowhere"},
            "no weights file at .*nowhere.*--extractor-weights FILE",
        ),
        ("inception", {"weights": SHIPPED}, "do not fit Inception.*Missing key"),
        ("dinov2-vit-l-14", {}, "dinov2_vitl14_pretrain.pth.*--extractor-weights FILE"),
        ("dinov2-vit-l-14", {"weights": SHIPPED}, "do not fit VisionTransformer"),
        ("clip-vit-l-14-336", {}, "ViT-L-14-336px.pt.*--extractor-weights FILE"),
        ("clip-vit-l-14-336", {"weights": SHIPPED}, "no keys that begin with 'visual.'"),
        ("inception-torchscript", {}, "inception-2015-12-05.pt.*--extractor-weights FILE"),
        ("inception-torchscript", {"weights": SHIPPED}, "cannot read the TorchScript archive"),
        ("foreign:load", {"allow_code": False}, "not dimo's.*--allow-code"),
        ("foreign:load", {"resize": "tf1-bilinear"}, "resizes by itself, not 'tf1-bilinear'"),
        ("foreign:load", {"sha256": "0" * 64}, "no weights file.*names sha256 0000"),
        ("foreign:load", {"weights": SHIPPED, "sha256": "0" * 64}, "have sha256 0eadf646"),
        ("foreign:lod", {}, "cannot load extractor 'foreign:lod': .*no attribute 'lod'"),
        ("nowhere.at.all:load", {}, "No module named 'nowhere'.*PYTHONPATH"),
        ("foreign:", {}, "cannot load extractor"),
        ("foreign:load_nothing", {}, "gave a NoneType; allowed: torch.nn.Module"),
    ],
)
def test_what_cannot_be_loaded(name, changes, message, tmp_path):
    arguments = {"sha256": ANY, "device": CPU, "allow_code": True} | changes
    if changes.get("weights") == "nowhere":
        arguments["weights"] = tmp_path / "nowhere"
    with pytest.raises(DimoError, match=message) as caught:
        load_extractor(name, **arguments)
    assert "\n" not in str(caught.value)


def test_an_output_that_is_not_there_is_named(make_images):
    extractor = load_extractor("foreign:load_one_output", sha256=ANY, device=CPU, allow_code=True)
    with pytest.raises(DimoError, match="gave no 'spatial', only features, logits"):
        extract(extractor, [(make_images(1, 4, 4), None)])


@pytest.mark.parametrize("package", ["timm", "torch_fidelity"])
def test_a_missing_library_is_named(package, monkeypatch):
    name = {"timm": "dinov2-vit-l-14", "torch_fidelity": "inception"}[package]
    monkeypatch.delitem(sys.modules, f"bench.features.{name.partition('-')[0]}", raising=False)
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_Refusal(package), *sys.meta_path])
    with pytest.raises(DimoError, match=rf"needs the package '{package}.*pip install"):
        load_extractor(name, sha256=ANY, weights=SHIPPED, device=CPU)


class _Refusal:
    """An import finder for a machine without `package`."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
