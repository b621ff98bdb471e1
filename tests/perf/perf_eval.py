"""`dimo eval` as a whole beside torch-fidelity's, and its memory: `make perf` (minutes)."""

import json
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

COUNT, REFERENCE = 1000, 100
PROTOCOL = """
format = 1
name = "perf"
version = 1
title = "Speed"
paper = "none"
[images]
resolution = [256, 256]
channels = 3
num_images = {count}
labels = "balanced"
num_classes = 1
uint8 = "round"
[seeds]
report = 1
select = 2
n_select = 10
[extractor]
name = "{extractor}"
sha256 = "any"
{resize}
[reference]
name = "mine"
sha256 = "any"
count = {reference}
[[metrics]]
name = "fid"
higher_is_better = false
{metrics}
[uncertainty]
n_bootstrap = 100
seed = 0
level = 0.95
"""
INCEPTION_METRICS = """
[[metrics]]
name = "sfid"
higher_is_better = false
[[metrics]]
name = "inception_score"
higher_is_better = true
splits = 10
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
name = "kid"
higher_is_better = false
subsets = 100
subset_size = 100
seed = 2020
"""
STAND_IN = """
import torch


class Mean(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()

    def forward(self, images):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1)}
"""


def _folder(path, count, seed):
    """Smooth random images, as PNG."""
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(path / f"{i:06d}.png")
    return path


def _dimo(*arguments, cwd):
    command = [sys.executable, "-m", "dimo", *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), time.perf_counter() - start


def test_eval_against_torch_fidelity(tmp_path, inception_weights):
    """FID, sFID, IS, precision, recall, KID with intervals; theirs: FID, IS and KID. No cache."""
    generated, reference = _folder(tmp_path / "g", COUNT, 0), _folder(tmp_path / "r", REFERENCE, 1)
    (tmp_path / "perf.toml").write_text(
        PROTOCOL.format(
            count=COUNT,
            reference=REFERENCE,
            extractor="inception",
            resize='resize = "tf1-bilinear"',
            metrics=INCEPTION_METRICS,
        )
    )
    arguments = ["eval", "g", "--protocol", "perf.toml", "--reference", "r", "--cache", "none"]
    record, ours = _dimo(
        *arguments, "--extractor-weights", inception_weights, "--json", cwd=tmp_path
    )
    start = time.perf_counter()
    found = torch_fidelity.calculate_metrics(
        input1=str(generated),
        input2=str(reference),
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=100,
        feature_extractor_weights_path=str(inception_weights),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    theirs = time.perf_counter() - start
    print(
        f"\ndimo eval of {COUNT} PNGs {ours:.0f} s, torch-fidelity {theirs:.0f} s "
        f"({torch.get_num_threads()} threads): {theirs / ours:.2f} x"
    )
    value = record["metrics"]["fid"]["value"]
    assert value == pytest.approx(found["frechet_inception_distance"], rel=1e-5)
    assert theirs >= ours


def test_memory_of_twenty_thousand_images(tmp_path):
    """An npz of 3.7 GiB, streamed: the whole process stays under 2 GiB."""
    count = 20_000
    rng = np.random.default_rng(0)
    with (
        zipfile.ZipFile(tmp_path / "g.npz", "w", allowZip64=True) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(count // 100):
            member.write(rng.integers(0, 256, (100, 256, 256, 3), dtype=np.uint8).tobytes())
    np.savez(tmp_path / "r.npz", arr_0=rng.integers(0, 256, (100, 256, 256, 3), dtype=np.uint8))
    (tmp_path / "mine.py").write_text(STAND_IN)
    (tmp_path / "perf.toml").write_text(
        PROTOCOL.format(count=count, reference=100, extractor="mine:Mean", resize="", metrics="")
    )
    program = (
        "import sys; sys.argv = ['dimo', *sys.argv[1:]]\n"
        "from dimo.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    import torch; from dimo.engine.distributed import peak_memory_bytes\n"
        "    print(peak_memory_bytes(torch.device('cpu')), file=sys.stderr)\n"
    )
    arguments = ["eval", "g.npz", "--protocol", "perf.toml", "--reference", "r.npz"]
    arguments += ["--allow-code", "--cache", "none"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.split()[-1]) / 2**30
    print(f"\n20,000 images of 256 x 256, npz of 3.7 GiB: peak memory {peak:.2f} GiB")
    assert peak < 2
