"""How samplers ask the network: guided, at a temperature, for the codebook only, on account."""

__all__ = ["Predictor", "check_labels", "draw_tokens", "progress_of"]

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.guidance import guided_logits
from dimo.models import MaskedModel
from dimo.rng import ImageNoise


class Predictor:
    """log p(token | revealed tokens) of one batch; the only caller of a multi-step model.

    A model with a latent (di4c) gets a new one for each image at each prediction.

    Args:
        model: Masked model in eval mode.
        condition: [B] int64 labels.
        noise: The images' random numbers.

    Attributes:
        nfe: Network forwards per image so far; a guided prediction counts two.

    Raises:
        DimoError: A label out of range.
    """

    def __init__(self, model: MaskedModel, condition: Tensor, noise: ImageNoise) -> None:
        check_labels(condition, model.num_classes)
        self.model, self.condition, self.noise = model, condition, noise
        self.nfe = 0

    def all_masked(self) -> Tensor:
        """The grid that sampling starts from, int64 [B, L]."""
        shape = (len(self.condition), self.model.num_tokens)
        return torch.full(shape, self.model.mask_token_id, device=self.condition.device)

    def __call__(
        self, tokens: Tensor, step: int, *, guidance_scale: float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        """Log-probabilities of the codebook at every position, float64 [B, L, V].

        float64, so that Gumbel-max draws do not lose the distribution's tail (arXiv 2409.02908).

        Raises:
            DimoError: Temperature not positive.
        """
        if temperature <= 0:
            raise DimoError(f"temperature {temperature:g} is not positive; 1 is as trained")
        network: Callable[..., Tensor] = self.model
        if hasattr(network, "latent_projection"):
            z = self.noise.uniform(f"sample/latent/{step}", ())  # [B]
            halves = 1 if guidance_scale == 1 else 2  # both halves of a guided batch share it
            network = partial(network, z=z.repeat(halves))
        logits = guided_logits(network, tokens, self.condition, guidance_scale)
        self.nfe += 1 if guidance_scale == 1 else 2
        return (logits[..., : self.model.codebook_size].double() / temperature).log_softmax(-1)


def draw_tokens(logits: Tensor, noise: ImageNoise, stream: str) -> Tensor:
    """A class at each position from logits [B, L, V], by Gumbel-max: int64 [B, L]."""
    return (logits + noise.gumbel(stream, tuple(logits.shape[1:]))).argmax(-1)


def progress_of(step: int, num_steps: int) -> float:
    """How far a sampler is at a step: 0 at the first, 1 at the last; a single step is the last."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0


def check_labels(labels: Tensor, num_classes: int) -> None:
    """A label outside the classes would silently read another row of the embedding.

    Raises:
        DimoError: A label below 0 or above the last class.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise DimoError(f"label {wrong} is out of range; labels are 0 to {num_classes - 1}")
