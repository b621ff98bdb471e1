"""What several tests share."""

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
