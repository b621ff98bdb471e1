"""The embedded worlds: data sets that come with the package, as what a teacher is trained from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from dimo import rng
from dimo.data import scenes
from dimo.data.scenes.tokenizer import SceneTokens, fit_tokenizer
from dimo.errors import DimoError
from dimo.models.digits import DigitsTokenizer
from dimo.weights.files import state_sha256

OnTokenizer: TypeAlias = Callable[[int], None]  # steps done
_DRAWN = 16_384  # prompts that a distillation has


class TrainingData(Protocol):
    """Tokens with their conditions; image i is a function of the seed and i alone.

    Attributes:
        sha256: Of what the images are drawn from.
    """

    sha256: str

    def __call__(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L] and labels int64 [B] of images `index` [B], on its device."""


class EncodedImages:
    """A fixed set, drawn from with replacement.

    Args:
        tokens: int64 [N, L].
        labels: int64 [N].
    """

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels
        self.sha256 = state_sha256({"tokens": tokens, "labels": labels})

    def __call__(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens, self.labels = self.tokens.to(index.device), self.labels.to(index.device)
        rows = rng.integers(seed, index, "row", (), len(self.tokens))
        return self.tokens[rows], self.labels[rows]


@dataclass(frozen=True)
class World:
    """One data set.

    Attributes:
        data: What it is, for the provenance of weights.
        fit_tokenizer: Trains the tokenizer; takes `codebook_size`, `steps`, `seed`, `on_step`.
        training_data: Its images, encoded by the tokenizer.
        captions: What the labels of that data number; None: classes.
        prompts: What a distillation draws where no prompts are named; None: classes.
        stored_as: Type of the numbers in weights files of its teacher and students; None: that
            which they are trained in.
    """

    data: str
    fit_tokenizer: Callable[..., nn.Module]
    training_data: Callable[[Any], TrainingData]
    captions: Callable[[], Sequence[str]] | None = None
    prompts: Callable[[], Sequence[str]] | None = None
    stored_as: torch.dtype | None = None

    def stored(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's state dict as it is stored."""
        state: dict[str, Tensor] = network.state_dict()
        return {key: value.to(self.stored_as or value.dtype) for key, value in state.items()}


def _fit_digits(
    *, codebook_size: int, steps: int, seed: int, on_step: OnTokenizer
) -> DigitsTokenizer:
    """By k-means, which takes no steps."""
    from dimo.data import digits

    images, _ = digits.load()
    return DigitsTokenizer.fit(images, codebook_size=codebook_size, seed=seed)


def _digits(tokenizer: DigitsTokenizer) -> TrainingData:
    from dimo.data import digits

    images, labels = digits.load()
    return EncodedImages(tokenizer.encode(images), labels)


def _fit_scenes(*, codebook_size: int, steps: int, seed: int, on_step: OnTokenizer) -> nn.Module:
    if steps < 1:
        raise DimoError(
            f"recipe key tokenizer_steps = {steps} is out of range; the tokenizer of scenes is a "
            "network; allowed: >= 1"
        )
    return fit_tokenizer(codebook_size=codebook_size, steps=steps, seed=seed, on_step=on_step)


DIGITS = World("scikit-learn digits, 1,797 images", _fit_digits, _digits)
SCENES = World(
    "scenes, pictures of the training prompts",
    _fit_scenes,
    SceneTokens,
    captions=scenes.captions,
    prompts=lambda: scenes.drawn_captions(_DRAWN),
    stored_as=torch.float16,  # all of it comes with the package
)
