"""The interfaces of every model family: masked models of class labels or text, and tokenizers.

A new teacher is one file in this folder and one row in `dimo.zoo.teachers`.
"""

__all__ = ["MaskedModel", "MaskedNetwork", "TextFeatures", "TextNetwork", "Tokenizer"]

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from dimo.weights.files import load_state_dict


class MaskedNetwork(nn.Module):
    """A network that predicts every token from a partly masked grid.

    Attributes:
        codebook_size: V; ids of tokens are 0 to V - 1.
        num_tokens: L.
        hidden_dim: Width D of a token embedding.
        takes_positions: `forward` takes `positions` [B, K] int64 and returns logits [B, K, V'] at
            these positions of each image; other networks compute all L.
        takes_latent: `forward` takes a latent `z` [B] in [0, 1) (di4c).
        depth: Number of blocks, for the estimate of a distillation's memory.
    """

    takes_positions: bool = False
    takes_latent: bool = False
    codebook_size: int
    num_tokens: int
    hidden_dim: int
    depth: int

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    @property
    def mask_token_id(self) -> int:
        """The id of a masked position; outside the codebook."""
        return self.codebook_size

    @property
    def block_tokens(self) -> int:
        """Length of the sequence between blocks."""
        return self.num_tokens

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: Any) -> Self:
        """Builds the network in eval mode from a file with its key names, every key accounted for.

        Args:
            path: The authors' checkpoint, or a `.safetensors`.
            **config: Arguments of the constructor.

        Raises:
            DimoError: A missing, damaged or foreign file, or keys or shapes that do not fit.
        """
        model = cls(**config)
        load_state_dict(model, path)
        return model.eval()

    def embedding_parameters(self) -> list[Tensor]:
        """What Di[M]O keeps frozen: embeddings of tokens and positions, and the output bias."""
        return []


class MaskedModel(MaskedNetwork):
    """A masked network whose condition is a label.

    `forward(tokens, labels, *, drop=None, embedding_noise=0.0, noise=None)` returns logits
    [B, L, V'] with V' >= V; the codebook comes first. Its arguments:

    - tokens: [B, L] int64, ids below V or `mask_token_id`;
    - labels: [B] int64 in 0 to num_classes - 1;
    - drop: [B] bool, True replaces the condition by the null condition;
    - embedding_noise: sigma of the perturbation of token embeddings, `dimo.models.layers.perturb`;
    - noise: [B, L, D] standard normal, needed when sigma > 0;
    - positions and z: see `MaskedNetwork`.

    Attributes:
        num_classes: Number of classes, or of prompts (`dimo.models.text.TextConditioned`).
    """

    num_classes: int


@dataclass(frozen=True)
class TextFeatures:
    """Encoded prompts: states [B, T, S] of their tokens, and a pooled vector [B, P] of each."""

    states: Tensor
    pooled: Tensor


class TextNetwork(MaskedNetwork):
    """A masked network whose condition is encoded text.

    `forward(tokens, text, *, embedding_noise=0.0, noise=None)` takes `TextFeatures` in place of
    labels. `dimo.models.text.TextConditioned` turns it into a `MaskedModel`.
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
