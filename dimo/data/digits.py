"""The bundled data set `digits`: 1,797 real handwritten digits, 8 x 8 pixels, ten classes.

Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998; CC BY 4.0), as
shipped inside scikit-learn. The one door to that loader.
"""

import torch
from torch import Tensor

NUM_CLASSES = 10


def load() -> tuple[Tensor, Tensor]:
    """All images, uint8 [1797, 3, 8, 8] (grey repeated over channels), and labels int64 [1797].

    The source holds grey levels 0..16; they are spread to 0..255 and rounded half up.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = torch.from_numpy(data.images).mul(255 / 16).add(0.5).floor().to(torch.uint8)
    return grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(data.target).to(torch.int64)
