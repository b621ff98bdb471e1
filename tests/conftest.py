"""What several tests share."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Folder of the golden files."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_arrays():
    """Reads the arrays of a golden case as tensors; integers become int64."""

    def read(case: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{case}.data.npz") as data:
            arrays = {key: torch.from_numpy(data[key]) for key in data.files}
        return {k: v.long() if v.dtype == torch.int32 else v for k, v in arrays.items()}

    return read


@pytest.fixture(scope="session")
def tiny_network():
    """Constructor arguments of the golden networks."""
    return {
        "img_size": 64,
        "hidden_dim": 32,
        "codebook_size": 20,
        "depth": 2,
        "heads": 4,
        "mlp_dim": 64,
        "dropout": 0.0,
        "nclass": 5,
    }


@pytest.fixture(scope="session")
def golden_file(tmp_path_factory):
    """Path of a golden file; a compressed one is unpacked first."""
    folder = tmp_path_factory.mktemp("golden")

    def unpack(name: str) -> Path:
        if (GOLDEN / name).exists():
            return GOLDEN / name
        path = folder / name
        path.write_bytes(gzip.decompress((GOLDEN / f"{name}.gz").read_bytes()))
        return path

    return unpack


@pytest.fixture(scope="session")
def golden_constructor():
    """Constructor arguments of a golden case, as its manifest has them."""
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    return {case["case"]: case["constructor"] for case in cases}


@pytest.fixture(scope="session")
def assert_relative():
    """Asserts equality to 1e-5 of the largest expected value."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)

    return check
