"""The signature of a sampler, and `Predictor`, which calls the model for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.guidance import guide, guided_logits
from dimo.models import MaskedModel
from dimo.models.layers import gather_positions
from dimo.rng import ImageNoise

Callback = Callable[[int, Tensor], None]  # a step's number (from 0) and the tokens [B, L] after it


@dataclass(frozen=True)
class Samples:
    """Tokens and what they cost.

    `token_counts` are the tokens written at each step, the expected number for samplers that reveal
    them at random times. They sum to L (in an edit, to its masked tokens), except where tokens are
    rewritten.
    """

    tokens: Tensor  # int64 [B, L], all inside the codebook
    nfe: int  # network forwards per image; a guided step counts two
    token_counts: list[int]


class SamplerFunction(Protocol):
    """Samples tokens from a fully masked grid; all samplers share these settings."""

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
        """Samples one grid per condition.

        Args:
            model: In eval mode.
            condition: Labels, int64 [B].
            noise: Per-image random streams; image i is the same in any batch.
            num_steps: Network evaluations along the path, guidance not counted. With one step, all
                samplers draw every token from the first prediction.
            mask_schedule: How many tokens each step reveals, or at what rate.
            guidance_scale: Largest guidance scale s; 1 = off.
            temperature: Divides the logits; 1 = as trained.
            callback: Called after each step.

        Raises:
            DimoError: A setting or label out of range, an unknown schedule.
        """


_Progress = TypeVar("_Progress", float, Tensor)
_ROWS = 16  # logits are computed at a multiple of this many positions, see `padded_count`


class Predictor:
    """log p(token | revealed tokens) of one batch, with guidance and temperature; counts `nfe`.

    It computes logits only at the requested positions. While all tokens are masked, images of one
    label share a forward, and all images share the unconditional one. A model with a latent (di4c)
    shares nothing: each image gets a new latent at each prediction, the same in both guided halves.
    The unconditional half of guidance comes from `unconditional`; None: from the same model.

    Raises:
        DimoError: A label out of range.
    """

    def __init__(
        self,
        model: MaskedModel,
        condition: Tensor,
        noise: ImageNoise,
        unconditional: MaskedModel | None = None,
    ) -> None:
        check_labels(condition, model.num_classes)
        self.model, self.condition, self.noise = model, condition, noise
        self.unconditional = unconditional
        self.nfe = 0

    def all_masked(self) -> Tensor:
        """The grid that sampling starts from, int64 [B, L]."""
        shape = (len(self.condition), self.model.num_tokens)
        return torch.full(shape, self.model.mask_token_id, device=self.condition.device)

    def __call__(
        self,
        tokens: Tensor,
        step: int,
        positions: Tensor | None = None,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probabilities of the codebook, float64 [B, K, V].

        float64, so that Gumbel-max draws do not lose the distribution's tail (arXiv 2409.02908).

        Args:
            tokens: [B, L], partly masked.
            step: Number of the prediction, from 0; names its latent.
            positions: [B, K]; None: all, K = L.

        Raises:
            DimoError: Temperature not positive, or logits that are not finite.
        """
        if temperature <= 0:
            raise DimoError(f"temperature {temperature:g} is not positive; 1 is as trained")
        self.nfe += 1 if guidance_scale == 1 else 2
        latent = self.model.takes_latent
        masked = tokens == self.model.mask_token_id
        if not latent and bool(masked.all()):
            logits = gather_positions(self._all_masked_logits(tokens, guidance_scale), positions)
        else:
            inputs = {"z": self.noise.uniform(f"sample/latent/{step}", ())} if latent else {}
            logits = self._logits(tokens, guidance_scale, positions, **inputs)
        scaled = logits[..., : self.model.codebook_size].double() / temperature
        log_p = scaled.log_softmax(-1)
        is_drawn = gather_positions(masked[..., None], positions)[..., 0]
        # one logit of NaN or inf makes its row NaN
        check_finite_logits(~(log_p[..., 0].isnan() & is_drawn))
        return log_p

    def _logits(
        self, tokens: Tensor, guidance_scale: float, positions: Tensor | None, **inputs: Tensor
    ) -> Tensor:
        """Guided logits [B, K, V']; `inputs` are for the conditional model."""
        labels, other = self.condition, self.unconditional
        if other is None or guidance_scale == 1:
            return guided_logits(self.model, tokens, labels, guidance_scale, positions, **inputs)
        conditional = guided_logits(self.model, tokens, labels, 1, positions, **inputs)
        drop = torch.ones_like(labels, dtype=torch.bool)
        unconditional = guided_logits(other, tokens, labels, 1, positions, drop=drop)
        return guide(conditional, unconditional, guidance_scale)

    def _all_masked_logits(self, tokens: Tensor, guidance_scale: float) -> Tensor:
        """Guided logits [B, L, V'] of a fully masked grid, computed once per label."""
        labels, image = torch.unique(self.condition, return_inverse=True)
        logits = self.model(tokens[: len(labels)], labels)
        if guidance_scale != 1:
            drop = torch.ones(1, dtype=torch.bool, device=tokens.device)
            other = self.unconditional or self.model
            logits = guide(logits, other(tokens[:1], labels[:1], drop=drop), guidance_scale)
        return logits[image]


def check_finite_logits(is_finite: Tensor) -> None:
    """Refuses logits that are not, as a draw from them always takes the same token."""
    if not bool(is_finite.all()):
        raise DimoError(
            "the network's logits are not finite: its weights are damaged, or too large for this "
            "precision; use --precision float32, or other weights"
        )


def draw_tokens(
    logits: Tensor, noise: ImageNoise, stream: str, positions: Tensor | None = None
) -> Tensor:
    """Draws a token from each row of logits [B, K, V] by Gumbel-max: int64 [B, K].

    Each of the `positions` [B, K] in the grid has its own random numbers; None: all, K = L.
    """
    if positions is None:
        return (logits + noise.gumbel(stream, tuple(logits.shape[1:]))).argmax(-1)
    return (logits + noise.gumbel_at(stream, positions, logits.shape[-1])).argmax(-1)


def masked_positions(mask: Tensor, count: int | None = None) -> Tensor:
    """Positions of masked tokens in order, padded with revealed ones: int64 [B, K].

    K is the `padded_count` of `count`, the largest number of masked tokens in an image; None counts
    them in `mask` [B, L] (True = masked), which synchronizes with the GPU.
    """
    if count is None:
        count = int(mask.sum(1).max())
    return (~mask).byte().argsort(dim=1, stable=True)[:, : padded_count(count, mask.shape[1])]


def padded_count(count: int, length: int) -> int:
    """Number of positions at which logits are computed when `count` are needed, at most all.

    The last bits of smaller matrix products depend on their number of rows, so without padding an
    image would depend on its batch.
    """
    return min(length, -(-max(count, 1) // _ROWS) * _ROWS)


def progress_of(step: int, num_steps: int) -> float:
    """Progress at a step: 0 at the first, 1 at the last, and 1 at a single step."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0


def temperature_between(first: float, last: float, progress: _Progress) -> _Progress:
    """The temperature whose inverse is at `progress`, 0 to 1, of the way from first to last."""
    return 1 / (1 / first + progress * (1 / last - 1 / first))


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuses labels that would silently read another row of the embedding."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise DimoError(f"label {wrong} is out of range; labels are 0 to {num_classes - 1}")
