"""The two interfaces every model family implements: a masked model and a tokenizer.

A new teacher is one file in this folder and one row in `dimo.zoo.teachers`.
"""

__all__ = ["MaskedModel", "Tokenizer"]

from typing import Protocol

import torch
from torch import Tensor


class MaskedModel(Protocol):
    """A network that predicts every token from a partly masked grid.

    A network that can leave out the logits nobody asks for has a true `takes_positions` and takes
    `positions` [B, K] int64 too; it returns logits [B, K, V'] at these positions of each image.
    """

    codebook_size: int
    num_tokens: int
    num_classes: int
    hidden_dim: int

    @property
    def mask_token_id(self) -> int:
        """The id that stands for a masked position; outside the codebook."""

    def __call__(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        drop: Tensor | None = None,
        embedding_noise: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Returns logits [B, L, V'] with V' >= codebook_size; the codebook comes first.

        Args:
            tokens: [B, L] int64, ids below `codebook_size` or `mask_token_id`.
            labels: [B] int64 class labels, the condition.
            drop: [B] bool, True replaces the condition by the null condition.
            embedding_noise: sigma of the variance-preserving perturbation of token embeddings.
            noise: [B, L, hidden_dim] standard normal draw, needed when `embedding_noise` > 0.
        """


class Tokenizer(Protocol):
    """Images <-> token grid."""

    codebook_size: int
    num_tokens: int

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> tokens [B, L] int64."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] int64 -> float images [B, 3, H, W] in [-1, 1]."""

    def to(self, device: torch.device) -> "Tokenizer":
        """Moves the weights; returns the tokenizer."""
