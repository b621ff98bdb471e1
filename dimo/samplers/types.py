"""What every sampler takes and returns."""

__all__ = ["Callback", "Sampler", "Samples"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dimo.models import MaskedModel
from dimo.rng import ImageNoise

Callback = Callable[[int, Tensor], None]  # a step's number (from 0) and the tokens [B, L] after it


@dataclass(frozen=True)
class Samples:
    """Tokens and what they cost.

    Attributes:
        tokens: [B, L] int64, all inside the codebook.
        nfe: Network forwards per image; a guided step counts two.
        token_counts: Tokens written at each step. Sums to L, except where a student writes tokens
            again. Of samplers that reveal at random times, the expected number.
    """

    tokens: Tensor
    nfe: int
    token_counts: list[int]


class Sampler(Protocol):
    """From a fully masked grid to tokens; the settings that all samplers share."""

    def __call__(
        self,
        model: MaskedModel,
        condition: Tensor,
        noise: ImageNoise,
        *,
        num_steps: int,
        mask_schedule: str = ...,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        callback: Callback | None = None,
    ) -> Samples:
        """Samples one grid for each condition.

        Args:
            model: Masked model in eval mode: (tokens [B, L], condition [B]) -> logits.
            condition: [B] int64 labels.
            noise: The images' random numbers; image i is the same in any batch.
            num_steps: Network evaluations along the path, guidance not counted. At one step every
                token is drawn from the first prediction, whatever the sampler.
            mask_schedule: How many tokens each step reveals, or at what rate.
            guidance_scale: Strongest guidance scale s; 1 = off.
            temperature: Divides the logits; 1 = as trained.
            callback: Called after each step.

        Raises:
            DimoError: A setting or label out of range, an unknown schedule.
        """
