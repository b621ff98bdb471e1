"""Built-in toy data sets, used to train the bundled teachers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dimo import rng
from dimo.data import scenes
from dimo.data.scenes.tokenizer import SceneTokens, fit_tokenizer
from dimo.errors import DimoError
from dimo.models import digits
from dimo.models.digits import DigitsTokenizer
from dimo.weights.files import state_sha256

_NUM_PROMPTS = 16_384  # of a distillation


class TrainingData(Protocol):
    """Tokens with their conditions; image i depends only on the seed and i."""

    sha256: str  # of what the images are drawn from

    def __call__(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L] and labels int64 [B] of images `index` [B], on its device."""


class EncodedImages:
    """A fixed set of tokens int64 [N, L] and labels int64 [N], sampled with replacement."""

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels
        self.sha256 = state_sha256({"tokens": tokens, "labels": labels})

    def __call__(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens, self.labels = self.tokens.to(index.device), self.labels.to(index.device)
        rows = rng.integers(seed, index, "row", (), len(self.tokens))
        return self.tokens[rows], self.labels[rows]


@dataclass(frozen=True)
class BundledData:
    """One data set; without captions and prompts, its labels are classes."""

    data: str  # its description, for the provenance of weights
    fit_tokenizer: Callable[..., nn.Module]  # of `codebook_size`, `steps`, `seed`, `on_step`
    training_data: Callable[[Any], TrainingData]  # of the tokenizer
    captions: Callable[[], Sequence[str]] | None = None  # the prompt of each label
    prompts: Callable[[], Sequence[str]] | None = None  # of a distillation that names none
    stored_as: torch.dtype | None = None  # type of the numbers in weights files; None: as trained

    def stored(self, network: nn.Module) -> dict[str, Tensor]:
        """The state dict of a network as it is written to its weights file."""
        state: dict[str, Tensor] = network.state_dict()
        return {key: value.to(self.stored_as or value.dtype) for key, value in state.items()}


def _fit_digits(*, codebook_size: int, seed: int, **others: object) -> DigitsTokenizer:
    """k-means, which has no steps."""
    return DigitsTokenizer.fit(digits.load()[0], codebook_size=codebook_size, seed=seed)


def _digits(tokenizer: DigitsTokenizer) -> TrainingData:
    images, labels = digits.load()
    return EncodedImages(tokenizer.encode(images), labels)


def _fit_scenes(*, steps: int, **arguments: Any) -> nn.Module:
    if steps < 1:
        raise DimoError(
            f"recipe key tokenizer_steps = {steps} is out of range; allowed: >= 1, because the "
            "tokenizer of scenes is a network"
        )
    return fit_tokenizer(steps=steps, **arguments)


DIGITS = BundledData("scikit-learn digits, 1,797 images", _fit_digits, _digits)
SCENES = BundledData(
    "scenes, pictures of the training prompts",
    _fit_scenes,
    SceneTokens,
    captions=scenes.captions,
    prompts=lambda: scenes.drawn_captions(_NUM_PROMPTS),
    stored_as=torch.float16,  # keeps the package small
)
