"""A metric and a feature extractor added from outside the package: code, a row, a protocol."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from bench.metrics.base import Score
from bench.protocol import protocol_text
from bench.protocol.catalog import METRICS, MetricKind, Param
from bench.protocol.networks import EXTRACTORS, ExtractorKind
from dimo.cli import main
from dimo.models import digits


def mean_shift(samples, power):
    """Distance of the means in the first feature, to a power, times 100."""
    generated, reference = samples.sides()
    shifts = np.abs(generated[:, 0].astype(float) - reference[:, 0].mean(dtype=float))
    value = float(100 * shifts.mean() ** power)
    return Score(value, 100 * shifts, extra={"power": float(power)})


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """`call("eval", ...)` -> stdout of a `dimo` command, run in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dimo", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        return out

    return run


def write_protocol(path, metrics, extractor=None):
    """The protocol `digits` with 20 images and other metrics."""
    text = protocol_text("digits").replace('name = "digits"', f'name = "{path.stem}"')
    head, tail = text[: text.index("[[metrics]]")], text[text.index("[uncertainty]") :]
    head = head.replace("num_images = 5000", "num_images = 20").replace("2000\n\n", "20\n\n")
    if extractor:
        named = f'name = "{extractor}"\nsha256 = "any"'
        head = re.sub('name = "digits-cnn"\nsha256 = ".*"', named, head)
    path.write_text(head + metrics + tail)


def save_images(path):
    images, labels = digits.load()
    order = [int((labels == i % 10).nonzero()[i // 10]) for i in range(20)]
    np.savez(path, arr_0=images[order].permute(0, 2, 3, 1).numpy(), labels=labels[order].numpy())


def test_a_metric_of_ones_own(tmp_path, monkeypatch, call):
    row = MetricKind(
        "Shift",
        higher_is_better=False,
        compares_with="samples",
        compute=f"{__name__}:mean_shift",
        params={"power": Param(1, lambda generated, reference: 3)},
        decimals=1,
    )
    monkeypatch.setitem(METRICS, "mean_shift", row)
    metrics = '[[metrics]]\nname = "mean_shift"\nhigher_is_better = false\npower = 1\n\n'
    write_protocol(tmp_path / "toy.toml", metrics)
    save_images(tmp_path / "samples.npz")
    record = json.loads(call("eval", "samples.npz", "--protocol", "toy.toml", "--json"))
    score = record["metrics"]["mean_shift"]
    assert score["extra"] == {"power": 1.0}
    assert score["low"] < score["value"] < score["high"]
    table = call("report", "-f", "markdown", "--protocol", "toy.toml")
    assert "Shift (↓)" in table
    assert f"{score['value']:.1f}" in table
    assert f"{score['value']:.2f}" not in table


class Means(torch.nn.Module):
    """Mean brightness of rows and columns."""

    def forward(self, images):
        grey = images.double().mean(1)
        return {"features": torch.cat([grey.mean(1), grey.mean(2)], 1).float()}


def load_means(weights, resize):
    assert weights.read_bytes() == b"toy"
    return Means()


def test_an_extractor_of_ones_own(tmp_path, monkeypatch, call):
    weights = tmp_path / "means.bin"
    weights.write_bytes(b"toy")
    row = ExtractorKind(("features",), f"{__name__}:load_means", shipped=weights, image_size=(8, 8))
    monkeypatch.setitem(EXTRACTORS, "means", row)
    metrics = '[[metrics]]\nname = "fid"\nhigher_is_better = false\n\n'
    write_protocol(tmp_path / "toy.toml", metrics, extractor="means")
    save_images(tmp_path / "samples.npz")
    record = json.loads(call("eval", "samples.npz", "--protocol", "toy.toml", "--json"))
    assert record["evidence"]["extractor"].startswith("means")
    assert record["metrics"]["fid"]["value"] > 0
    table = call("report", "-f", "markdown", "--protocol", "toy.toml")
    assert "FID (↓)" in table
