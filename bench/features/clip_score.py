"""CLIP score (arXiv 2104.08718): cosine of an image and its prompt under a named CLIP.

Published numbers come from different networks, prefixes and scales, and none of them compare.
GigaGAN's script, which Di[M]O uses: ViT-g-14, prefix "A photo depicts ", the plain cosine.
torchmetrics: OpenAI's ViT-L-14, no prefix, 100 max(cosine, 0).
`scenes` has a small CLIP of its own, which knows no other words or pictures.
"""

__all__ = ["CLIPScorer", "Towers"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bench.metrics.clip_score import cosines, scaled_cosines
from dimo.errors import DimoError, unknown_name

_SCALES: Mapping[str, Callable[..., npt.NDArray[np.float64]]] = {
    "cosine": cosines,
    "scaled": scaled_cosines,
}


class Towers(Protocol):
    """What a CLIP score asks of a CLIP: embeddings of length one, float32 [N, D]."""

    def images(self, images: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Of images uint8 [H, W, 3]."""
        ...

    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Of texts."""
        ...


@dataclass(frozen=True, eq=False)
class CLIPScorer:
    """Scores images by how well they fit their prompts.

    Attributes:
        clip: Both towers.
        prefix: Comes before each prompt as it is, a space at its end included.
        scale: "cosine", or "scaled": 100 max(cosine, 0).
        sha256: Of the weights.

    Raises:
        DimoError: Unknown scale.
    """

    clip: Towers
    prefix: str
    scale: str
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.scale not in _SCALES:
            raise unknown_name("CLIP score scale", self.scale, _SCALES)

    def score(
        self, images: Iterable[npt.NDArray[np.uint8]], prompts: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """One score an image, float64 [N]; the CLIP score is their mean.

        Args:
            images: uint8 [H, W, 3] each, one a prompt; taken one batch after the other.
            prompts: N texts.

        Raises:
            DimoError: Another number of images than of prompts, or no prompt.
        """
        if not prompts:
            raise DimoError("there is no prompt to score images with; give one an image")
        texts = self.clip.texts([self.prefix + prompt for prompt in prompts])
        return _SCALES[self.scale](images=self.clip.images(images), texts=texts)
