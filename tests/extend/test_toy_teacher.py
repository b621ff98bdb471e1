"""A teacher added from outside the package: distilled, benchmarked and reported by the commands."""

import json

import pytest
import torch
from torch import nn

import dimo
from dimo.cli import app
from dimo.models import MaskedModel
from dimo.models.digits import DigitsTokenizer
from dimo.weights.catalog import ASSETS, OFFICIAL, OfficialFile
from dimo.weights.files import save_tensors
from dimo.zoo.teachers import TEACHERS, SamplerDefaults, Teacher


class ToyNetwork(MaskedModel):
    """Every token from the mean embedding of the grid, its own position and the class."""

    def __init__(self, *, width=8, dropout=0.0):
        super().__init__()
        self.codebook_size, self.num_tokens, self.num_classes = 256, 16, 10
        self.hidden_dim, self.depth = width, 1
        self.words = nn.Embedding(257, width)
        self.places = nn.Parameter(torch.randn(16, width))
        self.classes = nn.Embedding(11, width)
        self.head = nn.Linear(width, 257)

    def forward(self, tokens, labels, *, drop=None, embedding_noise=0.0, noise=None):
        if drop is not None:
            labels = labels.masked_fill(drop, 10)
        x = self.words(tokens)
        if embedding_noise:
            x = embedding_noise * noise + (1 - embedding_noise**2) ** 0.5 * x
        x = x + x.mean(1, keepdim=True) + self.places + self.classes(labels)[:, None]
        return self.head(torch.tanh(x))


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The row and its weights, in the folder where fetched files are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMO_WEIGHTS", str(tmp_path / "weights"))
    torch.manual_seed(0)
    network = ToyNetwork()
    path = tmp_path / "weights" / "toy.pth"
    path.parent.mkdir()
    torch.save(network.state_dict(), path)
    tokenizer = ASSETS / "digits-tokenizer.safetensors"
    row = Teacher(
        name="toy",
        title="Toy",
        architecture=ToyNetwork,
        network={"width": 8},
        tokenizer=DigitsTokenizer.from_file,
        weights={"transformer": "toy", "tokenizer": str(tokenizer)},
        image_size=8,
        num_tokens=16,
        num_classes=10,
        names=lambda: tuple("0123456789"),
        label_smoothing=0.0,
        defaults=SamplerDefaults("confidence", "arccos", 1.0, 1.0, "a toy"),
        protocol="digits",
        recipe="digits",
    )
    monkeypatch.setitem(TEACHERS, "toy", row)
    known = OfficialFile("https://example.org", "toy.pth", "a toy network", "MIT")
    monkeypatch.setitem(OFFICIAL, "toy", known)
    return row


def _run(*arguments):
    app(list(map(str, arguments)), standalone_mode=False)


def test_the_commands_take_a_teacher_from_outside(toy, tmp_path, capsys):
    _run("distill", "--teacher", "toy", "--out", "run", "--set", "steps=3", "--set", "batch_size=4",
         "--device", "cpu", "--sample-every", 0, "--score-every", 0)  # fmt: skip
    _run("bench", "--student", "run", "--steps", "2", "--results", "results",
         "--device", "cpu", "--cache", "none")  # fmt: skip
    capsys.readouterr()
    _run("report", "--results", "results")
    table = capsys.readouterr().out
    assert "Toy" in table
    assert "Di[M]O" in table
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert {record["method"]["teacher"] for record in records} == {"toy"}
    assert {record["protocol"]["name"] for record in records} == {"digits"}


def test_its_weights_are_listed_checked_and_converted(toy, tmp_path, capsys):
    _run("weights", "list")
    assert "a toy network; here: toy.pth" in capsys.readouterr().out
    _run("weights", "verify", "toy")
    assert "every key and shape of the ToyNetwork" in capsys.readouterr().out
    _run("weights", "convert", "weights/toy.pth", "-o", "out", "--json")
    assert json.loads(capsys.readouterr().out)["kind"] == "ToyNetwork"
    _run("weights", "verify", "out/toy.safetensors")
    assert "every key and shape of the ToyNetwork" in capsys.readouterr().out


def test_the_api_takes_it_too(toy, tmp_path):
    network = ToyNetwork.from_official(tmp_path / "weights" / "toy.pth", width=8)
    images = dimo.load("toy", device="cpu").sample([3, 1], steps=2)
    assert images.shape == (2, 3, 8, 8)
    state = {key: value + 1 for key, value in network.state_dict().items()}
    save_tensors(tmp_path / "other" / "toy.safetensors", state)
    other = dimo.load("toy", device="cpu", weights=tmp_path / "other").sample([3, 1], steps=2)
    assert not torch.equal(images, other)
