"""Inpainting: some tokens of an image are known and kept, and any sampler draws the others.

Masked models are trained to predict the masked tokens of an image from its others, so an edit takes
no training (MaskGIT, arXiv 2202.04200, sec. 4.3).
"""

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.models import MaskedModel, Tokenizer
from dimo.weights.files import state_sha256


@dataclass(frozen=True)
class KnownTokens:
    """The tokens of one image, int64 [L], and the mask of those to draw again, bool [L]."""

    tokens: Tensor
    mask: Tensor  # True = masked

    @property
    def count(self) -> int:
        """Number of masked tokens K."""
        return int(self.mask.sum())

    @property
    def sha256(self) -> str:
        """Hash of what is known."""
        return state_sha256({"tokens": self.tokens * ~self.mask, "mask": self.mask})

    def completed(self, drawn: Tensor) -> Tensor:
        """Whole grids [B, L] with `drawn` [B, K] as the masked tokens."""
        grids = self.tokens.repeat(len(drawn), 1)
        grids[:, self.mask] = drawn
        return grids


class Inpainting(MaskedModel):
    """What a model says about the K masked tokens of an image, given the known ones.

    This is a masked model of K tokens itself, so every sampler, its schedule, counts and guidance
    work on them as on a whole grid, and cannot change the others. It takes no positions: the last
    bits of a few logits would depend on the batch.
    """

    def __init__(self, model: MaskedModel, known: KnownTokens) -> None:
        super().__init__()
        self.model, self.known = model, known
        self.num_tokens, self.num_classes = known.count, model.num_classes
        self.codebook_size, self.takes_latent = model.codebook_size, model.takes_latent
        self.hidden_dim, self.depth = model.hidden_dim, model.depth

    @property
    def mask_token_id(self) -> int:
        return self.model.mask_token_id

    def forward(self, tokens: Tensor, labels: Tensor, **inputs: Tensor | None) -> Tensor:
        """Logits [B, K, V'] for tokens [B, K]; other arguments as of `MaskedModel`."""
        return self.model(self.known.completed(tokens), labels, **inputs)[:, self.known.mask]


def known_tokens(image: Tensor, mask: Tensor, tokenizer: Tokenizer, side: int) -> KnownTokens:
    """Encodes an image; a token is masked if any pixel of its patch is.

    Args:
        image: uint8 [3, side, side].
        mask: bool [side, side], True where the image is to be painted again.
        side: The model's image size in pixels.

    Raises:
        DimoError: As `check_edit`, or a tokenizer without an encoder.
    """
    check_edit(image, mask, side)
    if not hasattr(tokenizer, "encode"):
        raise DimoError(
            f"{type(tokenizer).__name__} has no encoder, so it cannot read an image to keep parts "
            "of; use a model whose tokenizer encodes, e.g. digits"
        )
    tokens = tokenizer.encode(image[None])[0]
    grid = isqrt(len(tokens))
    patches = mask.view(grid, side // grid, grid, side // grid)
    return KnownTokens(tokens, patches.any(3).any(1).flatten().to(tokens.device))


def check_edit(image: Tensor, mask: Tensor, side: int) -> None:
    """Refuses an image or a mask of another size or type than the model's, and an empty mask."""
    size = f"{side} x {side}, the model's image size"
    if image.dtype != torch.uint8 or image.shape != (3, side, side):
        raise DimoError(
            f"image to edit is {image.dtype} {list(image.shape)}; allowed: uint8 "
            f"[3, {side}, {side}]; resize it to {size}"
        )
    if mask.dtype != torch.bool or mask.shape != (side, side):
        raise DimoError(
            f"mask is {mask.dtype} {list(mask.shape)}; allowed: bool [{side}, {side}], True where "
            f"to paint; resize it to {size}"
        )
    if not mask.any():
        raise DimoError(
            "mask is empty, so nothing is to be painted; make the pixels white that are to change"
        )
