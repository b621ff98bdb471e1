"""`dimo eval` beside torch-fidelity and prdc, end to end: the same files, the same weights."""

import contextlib
import io
import json
import sys

import numpy as np
import prdc
import pytest
import torch
import torch_fidelity
from PIL import Image

from bench.features import extract, load_extractor
from dimo.cli import main
from dimo.util.files import sha256_file

CPU = torch.device("cpu")
COUNT = 20
PROTOCOL = """
format = 1
name = "peers"
version = 1
title = "Beside torch-fidelity"
paper = "none"
[images]
resolution = [64, 64]
channels = 3
num_images = 20
labels = "balanced"
num_classes = 1
uint8 = "round"
[seeds]
report = 1
select = 2
n_select = 10
[extractor]
name = "inception"
sha256 = "any"
resize = "tf1-bilinear"
[reference]
name = "other-images"
sha256 = "any"
count = 20
[[metrics]]
name = "fid"
higher_is_better = false
[[metrics]]
name = "sfid"
higher_is_better = false
[[metrics]]
name = "inception_score"
higher_is_better = true
splits = 4
seed = 2020
[[metrics]]
name = "precision"
higher_is_better = true
k = 3
[[metrics]]
name = "recall"
higher_is_better = true
k = 3
[[metrics]]
name = "density"
higher_is_better = true
k = 3
[[metrics]]
name = "coverage"
higher_is_better = true
k = 3
[[metrics]]
name = "kid"
higher_is_better = false
subsets = 10
subset_size = 15
seed = 2020
[uncertainty]
n_bootstrap = 20
seed = 0
level = 0.95
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_images):
    """Two folders of images that differ in contrast."""
    root = tmp_path_factory.mktemp("peers")
    images = make_images(2 * COUNT, 64, 64).permute(0, 2, 3, 1).numpy()
    sets = {"generated": images[:COUNT] // 4, "reference": images[COUNT:]}
    for name, pixels in sets.items():
        (root / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(root / name / f"{i:04d}.png")
    (root / "peers.toml").write_text(PROTOCOL)
    return root


@pytest.fixture(scope="module")
def ours(folders, inception_weights):
    """Value and extra numbers of each metric, as the command line gives them."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folders)
        command = ["dimo", "eval", "generated", "--protocol", "peers.toml", "--json"]
        command += ["--reference", "reference", "--extractor-weights", str(inception_weights)]
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    record = json.loads(out.getvalue())
    assert record["evidence"]["extractor_sha256"] == sha256_file(inception_weights)
    return record["metrics"]


def test_fid_is_and_kid_are_torch_fidelitys(folders, inception_weights, ours):
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders / "generated"),
        input2=str(folders / "reference"),
        isc=True,
        fid=True,
        kid=True,
        isc_splits=4,
        kid_subsets=10,
        kid_subset_size=15,
        feature_extractor_weights_path=str(inception_weights),
        batch_size=20,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    fid, inception_score, kid = (ours[name] for name in ("fid", "inception_score", "kid"))
    assert fid["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert inception_score["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert inception_score["extra"]["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-5)
    assert kid["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert kid["extra"]["std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)


def test_neighbours_are_prdcs(folders, inception_weights, ours):
    extractor = load_extractor("inception", sha256="any", weights=inception_weights, device=CPU)
    found = {}
    for name in ("generated", "reference"):
        pixels = [np.asarray(Image.open(p)) for p in sorted((folders / name).iterdir())]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        found[name] = extract(extractor, [(images, None)]).features
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(found["reference"], found["generated"], 3)
    for name, value in theirs.items():
        assert ours[name]["value"] == pytest.approx(float(value), abs=1e-9), name
