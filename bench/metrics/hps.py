"""Human Preference Score (HPSv2, arXiv 2306.09341): its benchmark's averages over four styles."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bench.features.stats import Features, as_numpy
from dimo.errors import DimoError

STYLES = ("anime", "concept-art", "paintings", "photo")
GROUPS = 10  # consecutive groups of prompts, over whose means the deviation is taken


@dataclass(frozen=True)
class StyleScore:
    """Scores of the images of one style.

    Attributes:
        mean: Over the images.
        std: Standard deviation of the means of `GROUPS` consecutive groups (ddof 0).
    """

    mean: float
    std: float


@dataclass(frozen=True)
class HPSSummary:
    """The benchmark's row: by style, in the order of `STYLES`, and over all images."""

    styles: Mapping[str, StyleScore]
    average: float


def hps_summary(scores: Mapping[str, Features], *, prompts_per_style: int = 800) -> HPSSummary:
    """Means as HPSv2's benchmark takes them.

    Args:
        scores: Style -> [N] scores in the order of its prompts, cosine times 100.
        prompts_per_style: N; a multiple of `GROUPS`.

    Raises:
        DimoError: Another style or one missing, another number of scores, or one not finite.
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
