"""FDr6 as a user runs it, from real digits and six tiny random networks."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from bench.features.stats import compute_stats, load_stats
from bench.features.vision import VISION, make_vision
from bench.metrics import mind
from bench.metrics.base import Samples
from bench.metrics.frechet import score_fdr6
from bench.protocol.catalog import SIX
from bench.protocol.networks import EXTRACTORS
from dimo.util.files import sha256_bytes, sha256_file
from dimo.weights.catalog import destination
from dimo.weights.files import read_state_dict, save_tensors

VIT = {"embed_dim": 12, "depth": 1, "num_heads": 2, "img_size": 28}
SIZES = {
    "convnextv2-b": {"dims": (4, 4, 8, 10), "depths": (1, 1, 1, 1)},
    "dinov2-vit-l-14": VIT,
    "mae-vit-l-16": VIT | {"img_size": 32},
    "siglip2-so400m-16": VIT | {"img_size": 32},
    "clip-vit-l-14": VIT,
}


class Inception(torch.nn.Module):
    """In place of the large network: mean levels of rows."""

    width = 8

    def forward(self, images):
        return {"features": images.float().mean((1, 3))}


def load_tiny(name, weights, resize):
    if name == "inception":
        return Inception()
    kind = replace(VISION[name], side=32)
    return make_vision(read_state_dict(weights), kind, name=str(weights), **SIZES[name])


load_inception, load_convnextv2, load_dinov2, load_mae, load_siglip2, load_clip = (
    functools.partial(load_tiny, row) for row, _ in SIX.values()
)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of the six files under their official names, and loaders of tiny networks."""
    folder = tmp_path / "weights"
    folder.mkdir()
    names = ("inception", "convnextv2", "dinov2", "mae", "siglip2", "clip")
    for name, (row, _) in zip(names, SIX.values(), strict=True):
        path = destination(row, folder).with_suffix(".safetensors")
        state = {"x": torch.zeros(1)}
        if row in SIZES:
            torch.manual_seed(0)
            network = timm.create_model(VISION[row].architecture, num_classes=0, **SIZES[row])
            state = {k: v + 0.02 * torch.randn(v.shape) for k, v in network.state_dict().items()}
        save_tensors(path, state)
        loader = f"{__name__}:load_{name}"
        monkeypatch.setitem(EXTRACTORS, row, replace(EXTRACTORS[row], loader=loader))
    return folder


@pytest.fixture
def six(tmp_path, tiny_protocol, real_digits, write_folder):
    """The protocol `six`, forty images to score and sixty real ones."""
    mind_of = 'name = "mind_{}"\nhigher_is_better = false\nsupplementary = true\n'
    metrics = ['name = "fdr6"\nhigher_is_better = false\n']
    metrics += [mind_of.format(name) + "projections = 50\nseed = 1\n" for name in SIX]
    head, _, tail = tiny_protocol.partition("[[metrics]]")
    start, _, _ = head.partition("[extractor]")
    named = '[extractor]\nname = "six"\nsha256 = "any"\n'
    named += '[reference]\nname = "real.npz"\nsha256 = "any"\ncount = 60\n'
    text = start.replace('"tiny"', '"six"') + named
    text += "".join(f"[[metrics]]\n{metric}" for metric in metrics)
    (tmp_path / "six.toml").write_text(text + tail[tail.index("[uncertainty]") :])
    write_folder(tmp_path / "real", *real_digits(60, start=20))
    return write_folder(tmp_path / "samples", *real_digits(40))


def features_of(images, weights):
    """Features by network, each loaded and run alone."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    found = {}
    for name, (row, resize) in SIX.items():
        path = destination(row, weights).with_suffix(".safetensors")
        network = load_tiny(row, path, resize).eval()
        with torch.inference_mode():
            found[name] = network(pixels)["features"].numpy()
    return found


def test_reference_and_eval(dimo, weights, six, tmp_path, real_digits):
    given = ("--protocol", "six.toml", "--extractor-weights", "weights")
    out, _ = dimo("reference", "real", *given, "-o", "real.npz")
    assert "60 images" in out
    real, generated = (features_of(real_digits(*a)[0], weights) for a in ((60, 20), (40, 0)))
    stats = load_stats(tmp_path / "real.npz", extractor="six", outputs=list(SIX))
    for name, features in real.items():
        np.testing.assert_allclose(stats[name].mu, features.mean(0), rtol=1e-4, atol=1e-5)
    with np.load(tmp_path / "real.npz") as file:
        assert file["features"].shape == (60, 8 + 10 + 4 * 12)
        assert "sigma" not in file
        assert file["sigma_siglip2"].shape == (12, 12)

    evaluate = ("eval", "samples", *given, "--labels", "filename", "--json", "--reference")
    record = json.loads(dimo(*evaluate, "real.npz")[0])
    assert list(record["metrics"]) == ["fdr6", *(f"mind_{name}" for name in SIX)]
    parts = {
        name: Samples(generated[name], statistics=compute_stats(real[name], extractor="six"))
        for name in SIX
    }
    expected = score_fdr6(Samples(generated["clip"], parts=parts))
    found = record["metrics"]["fdr6"]
    assert found["value"] == pytest.approx(expected.value, rel=1e-4)
    assert found["extra"] == pytest.approx(expected.extra, rel=1e-3)
    assert found["low"] < found["value"] < found["high"]
    for name in SIX:
        alone = mind(generated=generated[name], reference=real[name], projections=50, seed=1)
        value = record["metrics"][f"mind_{name}"]["value"]
        assert value == pytest.approx(alone.value, rel=1e-3)
    files = [destination(row, weights).with_suffix(".safetensors") for row, _ in SIX.values()]
    digest = sha256_bytes("".join(map(sha256_file, files)).encode())
    assert record["evidence"]["extractor_sha256"] == digest
    report, _ = dimo("report", "--protocol", "six.toml", "-f", "markdown")
    assert "FDr6 (↓)" in report
    assert "MIND siglip2 (↓)" in report


def test_published_statistics_are_a_reference_without_images(dimo, weights, six, tmp_path):
    given = ("--protocol", "six.toml", "--extractor-weights", "weights")
    dimo("reference", "real", *given, "-o", "real.npz")
    with np.load(tmp_path / "real.npz") as file:
        moments = {k: file[k] for k in file.files if k.startswith(("mu_", "sigma_"))}
    np.savez(tmp_path / "moments.npz", n=60, **moments)
    evaluate = ("eval", "samples", *given, "--labels", "filename", "--json", "--reference")
    whole = json.loads(dimo(*evaluate, "real.npz")[0])["metrics"]
    record = json.loads(dimo(*evaluate, "moments.npz")[0])
    assert record["metrics"] == {"fdr6": whole["fdr6"]}
    assert record["evidence"]["nonconforming"] == []
    np.savez(tmp_path / "less.npz", n=60, **{k: v for k, v in moments.items() if "mae" not in k})
    _, err = dimo(*evaluate, "less.npz", code=2)
    assert "less.npz lacks mu_mae, sigma_mae" in err


def test_what_is_missing_or_meaningless_is_told(dimo, weights, six, tmp_path):
    lacking = destination("mae-vit-l-16", weights).with_suffix(".safetensors")
    lacking.rename(tmp_path / "elsewhere")
    evaluate = ("eval", "samples", "--protocol", "six.toml", "--reference", "real")
    _, err = dimo(*evaluate, "--extractor-weights", "weights", code=2)
    assert "extractor 'six' finds no mae_pretrain_vit_large.pth in weights; fetch its files" in err
    text = (tmp_path / "six.toml").read_text()
    changes = (
        (
            ('"fdr6"', '"fid"'),
            "'fid', for features of one network; the extractor 'six' has several",
        ),
        (
            ('"six"\nsha', '"mae-vit-l-16"\nresize = "torch-antialias"\nsha'),
            "must be six, not 'mae",
        ),
        (('"six"\nsha', '"mine:load"\nsha'), "'extractor.name' must be six, not 'mine:load'"),
    )
    for (old, new), message in changes:
        assert old in text
        (tmp_path / "six.toml").write_text(text.replace(old, new))
        _, err = dimo(*evaluate, code=2)
        assert message in err
