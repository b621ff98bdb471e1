"""CLIP score (arXiv 2104.08718): how well images fit their prompts, by the cosine of embeddings."""

import numpy as np
import numpy.typing as npt

from bench.features.stats import Features, check_features
from dimo.errors import DimoError


def cosines(*, images: Features, texts: Features) -> npt.NDArray[np.float64]:
    """Cosine of each image's embedding with its own prompt's, [N] in -1 to 1.

    Their mean is the CLIP score of GigaGAN's script and of Di[M]O.

    Args:
        images: [N, D] embeddings, of any length.
        texts: [N, D], row i of the prompt of image i.

    Raises:
        DimoError: Shapes that do not fit, a number that is not finite, or an embedding of zeros.
    """
    first = check_features(images, name="image embeddings").astype(np.float64)
    second = check_features(texts, name="text embeddings", dim=first.shape[1]).astype(np.float64)
    if len(first) != len(second):
        raise DimoError(
            f"{len(first)} image embeddings do not fit {len(second)} text embeddings; "
            "give each image its prompt"
        )
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    if not lengths.all():
        raise DimoError(
            f"embedding {int(np.argmin(lengths))} is zero and has no direction; "
            "check the network that made it"
        )
    result: npt.NDArray[np.float64] = (first * second).sum(axis=1) / lengths
    return result


def scaled_cosines(*, images: Features, texts: Features) -> npt.NDArray[np.float64]:
    """100 max(cosine, 0), [N], what torchmetrics averages; arguments as for `cosines`."""
    return 100 * np.maximum(cosines(images=images, texts=texts), 0)
