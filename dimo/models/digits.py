"""The bundled data set `digits` (1,797 handwritten digits, 8 x 8 pixels) and its tokenizer.

Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998; CC BY 4.0), as
shipped inside scikit-learn. The tokenizer is k-means vector quantization of 2 x 2 patches.
"""

from os import PathLike
from typing import Self

import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.weights.files import load_state_dict

_SIDE, _PATCH = 8, 2
_GRID = _SIDE // _PATCH


def load() -> tuple[Tensor, Tensor]:
    """All images, uint8 [1797, 3, 8, 8] (grey repeated over channels), and labels int64 [1797].

    The source's grey levels 0..16 are scaled to 0..255 and rounded half up.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = torch.from_numpy(data.images).mul(255 / 16).add(0.5).floor().to(torch.uint8)
    return grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(data.target).to(torch.int64)


class DigitsTokenizer(nn.Module):
    """8 x 8 images <-> a 4 x 4 grid of tokens; see `dimo.models.Tokenizer` for the interface."""

    num_tokens = _GRID * _GRID

    def __init__(self, codebook_size: int = 256) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook: Tensor  # grey levels in [0, 1]
        self.register_buffer("codebook", torch.zeros(codebook_size, _PATCH * _PATCH))

    @classmethod
    def fit(cls, images: Tensor, *, codebook_size: int, seed: int) -> Self:
        """Learns the codebook from uint8 images [N, 3, 8, 8] (k-means, best of four runs)."""
        from sklearn.cluster import KMeans

        patches = _patches(images).reshape(-1, _PATCH * _PATCH).double().numpy()
        means = KMeans(codebook_size, n_init=4, random_state=seed).fit(patches).cluster_centers_
        tokenizer = cls(codebook_size)
        tokenizer.codebook.copy_(torch.from_numpy(means))
        return tokenizer

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, codebook_size: int = 256) -> Self:
        """Loads a codebook saved under the name `codebook`."""
        tokenizer = cls(codebook_size)
        load_state_dict(tokenizer, path)
        return tokenizer

    def encode(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, _SIDE, _SIDE):
            raise DimoError(
                f"digits images are uint8 [B, 3, 8, 8], got {images.dtype} {list(images.shape)}"
            )
        patches = _patches(images.to(self.codebook.device))
        return (patches[:, :, None] - self.codebook).square().sum(-1).argmin(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        patches = self.codebook[tokens].view(-1, _GRID, _GRID, _PATCH, _PATCH)
        grey = patches.permute(0, 1, 3, 2, 4).reshape(-1, 1, _SIDE, _SIDE)
        return (grey * 2 - 1).repeat(1, 3, 1, 1)


def _patches(images: Tensor) -> Tensor:
    """uint8 [B, 3, 8, 8] -> mean grey patches in [0, 1], float32 [B, 16, 4], row-major."""
    grey = images.float().mean(1) / 255
    grid = grey.view(-1, _GRID, _PATCH, _GRID, _PATCH).permute(0, 1, 3, 2, 4)
    return grid.reshape(-1, _GRID * _GRID, _PATCH * _PATCH)
