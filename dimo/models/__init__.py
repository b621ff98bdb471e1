"""The interfaces of every model family: masked models of class labels or text, and tokenizers.

A new teacher is one file in this folder and one row in `dimo.zoo.teachers`.
"""

__all__ = ["MaskedModel", "MaskedNetwork", "TextFeatures", "TextNetwork", "Tokenizer"]

from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from dimo.weights.files import load_state_dict


class MaskedNetwork(nn.Module):
    """A network that predicts every token from a partly masked grid."""

    takes_positions: bool = False  # `forward` takes positions int64 [B, K]; logits are [B, K, V']
    takes_latent: bool = False  # `forward` takes a latent z [B] in [0, 1) (di4c)
    gives_states: bool = False  # has `token_embeddings` and `block_states`
    codebook_size: int  # V; token ids are 0 to V - 1
    num_tokens: int  # L
    hidden_dim: int  # width D of a token embedding
    depth: int  # number of blocks

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    @property
    def mask_token_id(self) -> int:
        """Outside the codebook."""
        return self.codebook_size

    @property
    def block_tokens(self) -> int:
        """Sequence length inside the blocks."""
        return self.num_tokens

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: Any) -> Self:
        """Loads the authors' checkpoint or a `.safetensors` with its keys, strictly, in eval mode.

        Raises:
            DimoError: A missing, damaged or foreign file, or keys or shapes that do not fit.
        """
        model = cls(**config)
        load_state_dict(model, path)
        return model.eval()

    @property
    def token_embeddings(self) -> Tensor:
        """Embeddings [V + 1, D] of the codebook and the mask token."""
        raise NotImplementedError

    def block_states(
        self, embedded: Tensor, condition: Any, blocks: Collection[int]
    ) -> list[Tensor]:
        """Hidden states [B, L + T, D] after some blocks, counted from 1.

        `embedded` are embeddings [B, L, D] of the visual tokens, the condition labels [B] or
        `TextFeatures`; its own T >= 1 tokens come last.
        """
        raise NotImplementedError

    def embedding_parameters(self) -> list[Tensor]:
        """What distillation keeps frozen: embeddings of tokens and positions, and output bias."""
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
    """

    num_classes: int  # or the number of prompts (`dimo.models.text.TextConditioned`)


@dataclass(frozen=True)
class TextFeatures:
    """Encoded prompts: states [B, T, S] of their tokens, and a pooled vector [B, P] of each."""

    states: Tensor
    pooled: Tensor


class TextNetwork(MaskedNetwork):
    """A masked network whose `forward` takes `TextFeatures` in place of labels, and no `drop`.

    `dimo.models.text.TextConditioned` turns it into a `MaskedModel`.
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
