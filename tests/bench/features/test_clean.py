"""clean-fid's pipelines over a folder, with an archive built like NVIDIA's."""

import cleanfid.fid
import pytest
import torch
import torch.nn.functional as F
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import nn

from bench.features import is_torchscript, load_extractor
from bench.protocol.catalog import ANY
from dimo.errors import DimoError
from dimo.util.files import sha256_file
from dimo.weights.catalog import ASSETS

CPU = torch.device("cpu")

# PyTorch advises against TorchScript, which clean-fid reads all the same.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


class _Archive(nn.Module):
    """NVIDIA's interface: resizes and normalises itself, or lets `layers` be used alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 13, 13), nn.ReLU(), nn.Conv2d(64, 2048, 3), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=True)
        return self.layers((x - 128) / 128).flatten(1)


@pytest.fixture(scope="module")
def folder(make_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    for i, image in enumerate(make_images(20, 48, 64)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"  # the name that clean-fid looks for
    torch.manual_seed(0)
    torch.jit.script(_Archive().eval()).save(path)
    return path


def _load(archive, resize, **changes):
    arguments = {"sha256": ANY, "weights": archive, "device": CPU, "allow_code": True} | changes
    return load_extractor("inception-torchscript", resize=resize, **arguments)


@pytest.mark.parametrize(
    ("resize", "mode"), [("pil-bicubic", "clean"), ("tf1-bilinear", "legacy_tensorflow")]
)
@torch.inference_mode()
def test_a_folder_has_cleanfids_features(archive, folder, make_images, resize, mode):
    network = InceptionV3W(
        str(archive.parent), download=False, resize_inside=mode == "legacy_tensorflow"
    )
    expected = torch.from_numpy(
        cleanfid.fid.get_folder_features(
            str(folder), network, num_workers=0, device=CPU, mode=mode, verbose=False
        )
    )
    found = _load(archive, resize).network(make_images(20, 48, 64))["features"]
    assert found.shape == (20, 2048)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    other = {"pil-bicubic": "tf1-bilinear", "tf1-bilinear": "pil-bicubic"}[resize]
    elsewhere = _load(archive, other).network(make_images(20, 48, 64))["features"]
    assert (elsewhere - expected).norm() > 1e-3 * expected.norm()


@torch.inference_mode()
def test_features_stay_the_same_from_call_to_call(archive, make_images):
    network = _load(archive, "tf1-bilinear").network
    first, *others = [network(make_images(4, 32, 32))["features"] for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)


def test_only_the_official_archive_runs_unasked(archive):
    with pytest.raises(DimoError, match=r"brings its own code.*--allow-code"):
        _load(archive, "pil-bicubic", allow_code=False)
    with pytest.raises(DimoError, match=r"brings its own code.*--allow-code"):
        _load(archive, "", allow_code=False, sha256=sha256_file(archive))
    found = _load(archive, "")
    assert (found.resize, found.outputs) == ("tf1-bilinear", ("features",))
    assert found.sha256 == sha256_file(archive)


def test_an_archive_of_something_else_is_refused(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "linear.pt")
    with pytest.raises(DimoError, match="has no part named 'layers'"):
        _load(tmp_path / "linear.pt", "")


def test_archives_are_told_from_checkpoints(archive, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "state.pth")
    assert is_torchscript(archive)
    assert not is_torchscript(tmp_path / "state.pth")
    assert not is_torchscript(ASSETS / "digits-cnn.safetensors")


def test_a_truncated_archive_is_refused(archive, tmp_path):
    content = archive.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(DimoError, match=r"cannot read the TorchScript archive .*cut\.pt"):
        _load(tmp_path / "cut.pt", "")
