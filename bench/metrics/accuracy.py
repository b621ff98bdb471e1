"""Class accuracy: how often a classifier predicts the requested class."""

import numpy as np
import numpy.typing as npt

from bench.features.stats import Features, as_numpy, check_features
from bench.metrics.base import Samples, Score
from dimo.errors import DimoError


def class_accuracy(logits: Features, labels: Features) -> float:
    """Fraction of images whose predicted class is the requested one, in 0 to 1.

    Args:
        logits: `[N, C]` class scores. The first of several equal maxima is the prediction.
        labels: `[N]` integers, 0 to C - 1.

    Raises:
        DimoError: Shapes or dtypes do not fit, a logit is not finite, a label is out of range.
    """
    return float(class_hits(logits, labels).mean())


def score(samples: Samples) -> Score:
    """Class accuracy with its contributions."""
    if samples.labels is None:
        raise DimoError("the images have no labels; name them with --labels")
    hits = class_hits(samples.generated, samples.labels)
    return Score(float(hits.mean()), hits)


def class_hits(logits: Features, labels: Features) -> npt.NDArray[np.float64]:
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
    hits: npt.NDArray[np.bool_] = array.argmax(axis=1) == requested
    return hits.astype(np.float64)
