"""The metrics that a protocol can name, and what it calls bundled files. No heavy imports.

A row of the table, a plain dict, carries all that the rest of the program needs to know, and names
its code as "module:function", which `load` imports on first use. `bench.protocol.networks` has the
tables of extractors, detectors and scorers.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dimo.errors import DimoError

ANY = "any"  # in place of a SHA-256: whatever file is given; its hash is recorded
NONE = "none"  # name of the extractor or the reference of a protocol that needs none
BUNDLED_REFERENCES = {  # name -> "module:function" of `() -> (images, labels)`
    "digits-all": "dimo.models.digits:load",
    "scenes-held-out": "bench.features.references:scenes_held_out",
}


def load(name: str) -> Any:
    """Imports what "module:function" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Param:
    """An integer that a protocol sets for a metric.

    Attributes:
        high: Largest allowed value, from the number of generated and of reference images.
        optional: Whether a protocol may leave it out; the optional ones come all or none.
    """

    low: int
    high: Callable[[int, int], int]
    optional: bool = False


@dataclass(frozen=True)
class MetricKind:
    """A metric, apart from any protocol.

    Attributes:
        higher_is_better: A protocol must state the same.
        needs: Output of the extractor ("features", "logits" or "spatial") it is computed from; or
            a detector's "detections", the "answers" of a model whose results are read, "pairs" of
            image and prompt for a scorer, or the tokenizer's "reconstruction" of real images,
            which only the row of that name has.
        compares_with: Part of the reference it uses: "statistics" (Frechet distances), "samples" or
            "" for none.
        compute: "module:function" of `(Samples, **params) -> Score` (`bench.metrics.base`), or of
            `(Reconstruction) -> Score` (`bench.metrics.reconstruction`); empty for "detections",
            "answers" and "pairs", which a suite scores itself.
        params: The integers that a protocol gives, by name.
        tag: Tag of the prompts it covers; empty for all.
        more_below_one: Whether a column with a value below 1 gets one more digit.
        tunable: Whether sampler settings may be chosen by it.
        uses_labels: Whether images must have labels.
        parts: Networks of an extractor of several that it compares; empty: the extractor is one.
        least_side: Height and width that images must have, in pixels; 0: any.
    """

    label: str
    higher_is_better: bool
    needs: str = "features"
    compares_with: str = ""
    compute: str = ""
    params: Mapping[str, Param] = field(default_factory=dict)
    tag: str = ""
    decimals: int = 3
    more_below_one: bool = False
    tunable: bool = False
    uses_labels: bool = False
    parts: tuple[str, ...] = ()
    least_side: int = 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """Whose mean and covariance it compares with: an output's, or those of networks."""
        return (self.parts or (self.needs,)) if self.compares_with == "statistics" else ()

    @property
    def of_features(self) -> bool:
        """Whether it is computed from what an extractor gives."""
        return bool(self.compute) and self.needs != "reconstruction"


SIX = {  # FDr6's networks: rows of EXTRACTORS and how images reach their size
    "inception": ("inception", "tf1-bilinear"),
    "convnext": ("convnextv2-b", "torch-antialias"),
    "dinov2": ("dinov2-vit-l-14", "torch-antialias"),
    "mae": ("mae-vit-l-16", "torch-antialias"),
    "siglip2": ("siglip2-so400m-16", "torch-antialias"),
    "clip": ("clip-vit-l-14", "torch-antialias"),
}
_SEED = Param(0, lambda generated, reference: 2**32 - 1)
_PAIRED = Param(2, min)


def _frechet(label: str, **more: Any) -> MetricKind:
    return MetricKind(
        label,
        higher_is_better=False,
        compares_with="statistics",
        compute="bench.metrics.frechet:score",
        **more,
    )


def _neighbours(name: str, label: str) -> MetricKind:
    return MetricKind(
        label,
        higher_is_better=True,
        compares_with="samples",
        compute=f"bench.metrics.prdc:score_{name}",
        params={
            "k": Param(1, lambda generated, reference: min(generated, reference) - 1),
            "blocks": Param(1, lambda generated, reference: generated, optional=True),
            "block_size": replace(_PAIRED, optional=True),
            "seed": replace(_SEED, optional=True),
        },
    )


def _mind(label: str, *parts: str) -> MetricKind:
    return MetricKind(
        label,
        higher_is_better=False,
        compares_with="samples",
        compute="bench.metrics.frechet:score_mind",
        params={"projections": Param(1, lambda generated, reference: 100_000), "seed": _SEED},
        decimals=2,
        more_below_one=True,
        parts=parts,
    )


_RECONSTRUCTION: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("psnr", "PSNR", {"decimals": 2}),
    ("ssim", "SSIM", {"least_side": 11}),
    ("lpips", "LPIPS", {"least_side": 32, "higher_is_better": False}),
    ("codebook_usage", "Codes used", {}),
    ("codebook_perplexity", "Perplexity", {"decimals": 1}),
)

METRICS: dict[str, MetricKind] = {
    "fid": _frechet("FID", decimals=2, more_below_one=True, tunable=True),
    "sfid": _frechet("sFID", needs="spatial"),
    "fd_dinov2": _frechet("FD-DINOv2", tunable=True),
    "fdr6": MetricKind(
        "FDr6",
        higher_is_better=False,
        compares_with="statistics",
        compute="bench.metrics.frechet:score_fdr6",
        decimals=2,
        parts=tuple(SIX),
    ),
    "inception_score": MetricKind(
        "IS",
        higher_is_better=True,
        needs="logits",
        compute="bench.metrics.inception_score:score",
        params={"splits": Param(1, lambda generated, reference: generated), "seed": _SEED},
        decimals=2,
    ),
    "precision": _neighbours("precision", "Prec."),
    "recall": _neighbours("recall", "Rec."),
    "density": _neighbours("density", "Den."),
    "coverage": _neighbours("coverage", "Cov."),
    "authpct": MetricKind(
        "AuthPct",
        higher_is_better=True,
        compares_with="samples",
        compute="bench.metrics.prdc:score_authpct",
        decimals=1,
    ),
    "kid": MetricKind(
        "KID",
        higher_is_better=False,
        compares_with="samples",
        compute="bench.metrics.kernel:score_kid",
        params={
            "subsets": Param(1, lambda generated, reference: 10_000),
            "subset_size": _PAIRED,
            "seed": _SEED,
        },
    ),
    "mind": _mind("MIND"),
    **{f"mind_{part}": _mind(f"MIND {part}", part) for part in SIX},
    "cmmd": MetricKind(
        "CMMD",
        higher_is_better=False,
        compares_with="samples",
        compute="bench.metrics.kernel:score_cmmd",
    ),
    "class_accuracy": MetricKind(
        "Acc.",
        higher_is_better=True,
        needs="logits",
        compute="bench.metrics.per_image:score_accuracy",
        uses_labels=True,
    ),
    **{
        name: MetricKind(
            label,
            needs="reconstruction",
            compute=f"bench.metrics.reconstruction:score_{name.rpartition('_')[2]}",
            **{"higher_is_better": True, **more},
        )
        for name, label, more in _RECONSTRUCTION
    },
    "geneval": MetricKind("GenEval", higher_is_better=True, needs="detections", tunable=True),
    **{
        f"geneval_{tag}": MetricKind(label, higher_is_better=True, needs="detections", tag=tag)
        for tag, label in (
            ("single_object", "Single"),
            ("two_object", "Two"),
            ("counting", "Counting"),
            ("colors", "Colors"),
            ("position", "Position"),
            ("color_attr", "Attribution"),
        )
    },
    **{
        name: MetricKind(label, higher_is_better=True, needs="answers", decimals=2)
        for name, label in (
            ("geneval2", "Soft-TIFA GM"),
            ("geneval2_am", "Soft-TIFA AM"),
            ("geneval2_object", "Object"),
            ("geneval2_attribute", "Attribute"),
            ("geneval2_count", "Count"),
            ("geneval2_position", "Position"),
            ("geneval2_verb", "Verb"),
            ("dpg_bench", "DPG-Bench"),
            ("dpg_global", "Global"),
            ("dpg_entity", "Entity"),
            ("dpg_attribute", "Attribute"),
            ("dpg_relation", "Relation"),
            ("dpg_other", "Other"),
        )
    },
    "hps": MetricKind("HPS", higher_is_better=True, needs="pairs", decimals=2),
    **{
        f"hps_{style.replace('-', '_')}": MetricKind(
            label, higher_is_better=True, needs="pairs", tag=style, decimals=2
        )
        for style, label in (
            ("anime", "Anime"),
            ("concept-art", "Concept art"),
            ("paintings", "Paintings"),
            ("photo", "Photo"),
        )
    },
    "pickscore": MetricKind("PickScore", higher_is_better=True, needs="pairs", decimals=2),
    "image_reward": MetricKind("ImageReward", higher_is_better=True, needs="pairs"),
    "hpsv3": MetricKind("HPSv3", higher_is_better=True, needs="pairs", decimals=2),
    "clip_score": MetricKind(
        "CLIP score", higher_is_better=True, needs="pairs", decimals=2, more_below_one=True
    ),
}


_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = {  # in a wheel, in a checkout
    "protocols": (_PACKAGE / "_data" / "protocols", _PACKAGE.parent / "protocols"),
    "published": (_PACKAGE / "_data", _PACKAGE.parent / "results"),
}


def data_dir(kind: Literal["protocols", "published"]) -> Path:
    """The folder of the shipped protocols, or the one that holds `published.csv`."""
    for folder in _FOLDERS[kind]:
        if folder.is_dir():
            return folder
    raise DimoError(f"the {kind} data are missing beside {_PACKAGE}; reinstall dimo")
