"""GenEval's colour classifier: CLIP on the object alone, before grey, against ten colours."""

__all__ = ["ClipColors"]

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bench.metrics.geneval import COLORS, Detected

_Pixels: TypeAlias = npt.NDArray[np.uint8]
_Floats: TypeAlias = npt.NDArray[np.floating]

_GREY = 0x99  # of what is not the object, on all three channels
_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class ClipColors:
    """The colour of an object: the nearest text in CLIP's space.

    A colour is the mean of the normalised embeddings of three texts, normalised again. Official
    weights: OpenAI's ViT-L/14, whose activation is QuickGELU.

    Args:
        encode_images: uint8 images [h, w, 3] of any size -> embeddings [N, D].
        encode_texts: Texts -> embeddings [N, D].
    """

    def __init__(
        self,
        encode_images: Callable[[Sequence[_Pixels]], _Floats],
        encode_texts: Callable[[Sequence[str]], _Floats],
    ) -> None:
        self._encode_images, self._encode_texts = encode_images, encode_texts
        self._known: dict[str, _Floats] = {}

    def __call__(self, image: _Pixels, name: str, objects: Detected) -> list[str]:
        """The colour of each object of class `name` on an image, uint8 [H, W, 3]."""
        masks = objects.masks if objects.masks is not None else [None] * len(objects.boxes)
        crops = [
            object_crop(image, box, mask) for box, mask in zip(objects.boxes, masks, strict=True)
        ]
        cosines = _normalized(self._encode_images(crops)) @ self._texts(name).T  # [N, 10]
        return [COLORS[i] for i in cosines.argmax(axis=1)]

    def _texts(self, name: str) -> _Floats:
        if name not in self._known:
            rows = []
            for color in COLORS:
                texts = [text.format(color=color, name=name) for text in _TEMPLATES]
                rows.append(_normalized(self._encode_texts(texts)).mean(axis=0))
            self._known[name] = _normalized(np.stack(rows))
        return self._known[name]


def object_crop(
    image: _Pixels, box: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_] | None
) -> _Pixels:
    """The part of an image in a box, uint8 [h, w, 3], grey where the mask is not; never empty."""
    alone = image if mask is None else np.where(mask[:, :, None], image, np.uint8(_GREY))
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (round(float(value)) for value in box[:4])
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return alone[y1 : max(min(y2, height), y1 + 1), x1 : max(min(x2, width), x1 + 1)]


def _normalized(rows: _Floats) -> _Floats:
    scaled: _Floats = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled
