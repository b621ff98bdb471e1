"""What every sampler returns."""

__all__ = ["Samples"]

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Tokens and what they cost.

    Attributes:
        tokens: [B, L] int64, all inside the codebook.
        nfe: Network forwards per image; a guided step counts two.
        token_counts: Tokens revealed at each step; sums to L.
    """

    tokens: Tensor
    nfe: int
    token_counts: list[int]
