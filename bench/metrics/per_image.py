"""Metrics of one number per image: class accuracy, CLIP score and Human Preference Score."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.features.stats import Features, as_numpy, check_features
from bench.metrics.base import Samples, Score
from dimo.errors import DimoError

_Floats = npt.NDArray[np.float64]


def class_accuracy(logits: Features, labels: Features) -> float:
    """Fraction of images whose predicted class is the requested one.

    Args:
        logits: `[N, C]` class scores; the first of several equal maxima is the prediction.
        labels: `[N]` integers, 0 to C - 1.

    Raises: DimoError: Shapes or dtypes do not fit, a logit is not finite, a label is out of range.
    """
    return float(class_hits(logits, labels).mean())


def score_accuracy(samples: Samples) -> Score:
    """Class accuracy with its contributions."""
    if samples.labels is None:
        raise DimoError("the images have no labels; name them with --labels")
    hits = class_hits(samples.generated, samples.labels)
    return Score(float(hits.mean()), hits)


def class_hits(logits: Features, labels: Features) -> _Floats:
    """What `class_accuracy` averages: `[N]`, 1.0 where the prediction is the label, else 0.0."""
    array = check_features(logits, name="logits")
    requested = as_numpy(labels)
    if requested.shape != (len(array),) or requested.dtype.kind not in "iu":
        raise DimoError(
            f"labels have shape {list(requested.shape)} and dtype {requested.dtype} for "
            f"{len(array)} images; allowed: [{len(array)}] integers; give one label an image"
        )
    outside = (requested < 0) | (requested >= array.shape[1])
    if outside.any():
        raise DimoError(
            f"{int(outside.sum())} of {len(requested)} labels are out of range, the first is "
            f"{requested[outside][0]}; allowed: 0 to {array.shape[1] - 1}; "
            "check that labels and classifier count the same classes"
        )
    hits: _Floats = (array.argmax(axis=1) == requested).astype(np.float64)
    return hits


def cosines(*, images: Features, texts: Features) -> _Floats:
    """Cosine of each image's embedding `[N, D]` with that of its prompt, `[N, D]`: `[N]` float64.

    Their mean is the CLIP score (arXiv 2104.08718) of GigaGAN's script and of Di[M]O.

    Raises: DimoError: Shapes that do not fit, a value that is not finite, or an embedding of zeros.
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
    result: _Floats = (first * second).sum(axis=1) / lengths
    return result


def scaled_cosines(*, images: Features, texts: Features) -> _Floats:
    """`100 max(cosine, 0)`, `[N]`, which torchmetrics averages; arguments as for `cosines`."""
    return 100 * np.maximum(cosines(images=images, texts=texts), 0)


STYLES = ("anime", "concept-art", "paintings", "photo")
GROUPS = 10  # consecutive groups of prompts, over whose means the deviation is taken


@dataclass(frozen=True)
class StyleScore:
    """Mean of a style's scores, and the deviation (ddof 0) of the means of `GROUPS` groups."""

    mean: float
    std: float


@dataclass(frozen=True)
class HPSSummary:
    """Scores by style, in the order of `STYLES`, and the mean over all images."""

    styles: Mapping[str, StyleScore]
    average: float


def hps_summary(scores: Mapping[str, Features], *, prompts_per_style: int = 800) -> HPSSummary:
    """The averages of HPSv2's benchmark (arXiv 2306.09341).

    Args:
        scores: Style -> `[N]` scores (100 times the cosine) in the order of its prompts.
        prompts_per_style: N; a multiple of `GROUPS`.

    Raises: DimoError: Unknown or missing style, wrong number of scores, or one not finite.
    """
    if sorted(scores) != sorted(STYLES):
        raise DimoError(
            f"styles are {', '.join(sorted(scores)) or 'none'}; needed: {', '.join(STYLES)}; "
            "score every style's folder"
        )
    if prompts_per_style < GROUPS or prompts_per_style % GROUPS:
        raise DimoError(
            f"prompts_per_style {prompts_per_style} is not a multiple of {GROUPS}; HPSv2 has 800"
        )
    values = {style: as_numpy(scores[style]).astype(np.float64) for style in STYLES}
    for style, array in values.items():
        if array.shape != (prompts_per_style,) or not np.isfinite(array).all():
            raise DimoError(
                f"style {style!r} has scores of shape {list(array.shape)}; needed: "
                f"{prompts_per_style} finite numbers; score one image a prompt"
            )
    styles = {
        style: StyleScore(float(array.mean()), float(array.reshape(GROUPS, -1).mean(axis=1).std()))
        for style, array in values.items()
    }
    return HPSSummary(styles, float(np.concatenate(list(values.values())).mean()))
