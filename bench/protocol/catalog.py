"""What a protocol can name: metrics, feature extractors, detectors, scorers. No heavy imports.

Each table is a plain dict; a row carries all that the rest of the program needs to know, and names
its code as "module:function", which `load` imports on first use.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dimo.errors import DimoError
from dimo.weights.catalog import ASSETS

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
            a detector's "detections", or "pairs" of image and prompt for a scorer.
        compares_with: Part of the reference it uses: "statistics" (Frechet distances), "samples" or
            "" for none.
        compute: "module:function" of `(Samples, **params) -> Score` (`bench.metrics.base`); empty
            for "detections" and "pairs", which a suite scores itself.
        params: The integers that a protocol gives, by name.
        tag: Tag of the prompts it covers; empty for all.
        more_below_one: Whether a column with a value below 1 gets one more digit.
        tunable: Whether sampler settings may be chosen by it.
        uses_labels: Whether images must have labels.
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


METRICS: dict[str, MetricKind] = {
    "fid": _frechet("FID", decimals=2, more_below_one=True, tunable=True),
    "sfid": _frechet("sFID", needs="spatial"),
    "fd_dinov2": _frechet("FD-DINOv2", tunable=True),
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
    "mind": MetricKind(
        "MIND",
        higher_is_better=False,
        compares_with="samples",
        compute="bench.metrics.frechet:score_mind",
        params={"projections": Param(1, lambda generated, reference: 100_000), "seed": _SEED},
        decimals=2,
        more_below_one=True,
    ),
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


@dataclass(frozen=True)
class ExtractorKind:
    """A feature extractor.

    Attributes:
        outputs: What one pass returns, of "features", "logits", "spatial".
        loader: "module:function" of `(weights: Path, resize: str) -> nn.Module`.
        resizes: Ways to its input size that a protocol may name; empty: images as they are.
        weights: The official file and its source; empty if `shipped`.
        shipped: The weights file, if it comes with dimo.
        archive_sha256: Of the official weights, if they are a TorchScript archive.
        packages: Packages besides PyTorch whose versions affect the numbers.
        image_size: The only height and width it takes; None for any.
    """

    outputs: tuple[str, ...]
    loader: str
    resizes: tuple[str, ...] = ()
    weights: str = ""
    shipped: Path | None = None
    archive_sha256: str = ""
    packages: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None


EXTRACTORS: dict[str, ExtractorKind] = {
    "digits-cnn": ExtractorKind(
        ("features", "logits"),
        "bench.features.small:load_digits_cnn",
        shipped=ASSETS / "digits-cnn.safetensors",
        image_size=(8, 8),
    ),
    "scenes-clip": ExtractorKind(
        ("features",),
        "bench.features.scenes_clip:load_scene_clip",
        shipped=ASSETS / "scenes-clip.safetensors",
        image_size=(32, 32),
    ),
    "inception": ExtractorKind(
        ("features", "logits", "spatial"),
        "bench.features.inception:load_inception",
        resizes=("tf1-bilinear", "pil-bicubic", "pil-bicubic-floor", "torch-bilinear"),
        weights="weights-inception-2015-12-05-6726825d.pth, "
        "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
        packages=("torch-fidelity", "pillow"),
    ),
    "inception-torchscript": ExtractorKind(
        ("features",),
        "bench.features.inception:load_inception_torchscript",
        resizes=("tf1-bilinear", "pil-bicubic"),
        weights="inception-2015-12-05.pt, "
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/",
        archive_sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        packages=("pillow",),
    ),
    "dinov2-vit-l-14": ExtractorKind(
        ("features",),
        "bench.features.dinov2:load_dinov2",
        resizes=("pil-bicubic",),
        weights="dinov2_vitl14_pretrain.pth, https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/",
        packages=("timm", "pillow"),
    ),
    "clip-vit-l-14-336": ExtractorKind(
        ("features",),
        "bench.features.clip:load_clip",
        resizes=("pil-bicubic", "torch-bicubic"),
        weights="ViT-L-14-336px.pt, https://openaipublic.azureedge.net/clip/models/"
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/",
        archive_sha256="3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        packages=("open_clip_torch", "pillow"),
    ),
}


@dataclass(frozen=True)
class DetectorKind:
    """An object detector.

    Attributes:
        loader: "module:function" of `(weights: Path | None, device) -> ObjectDetector`; empty for
            one that dimo does not run but whose results it reads from a file.
        weights: The official files and their source; empty if they come with dimo.
    """

    loader: str = ""
    weights: str = ""

    @property
    def reads_results(self) -> bool:
        return not self.loader


DETECTORS: dict[str, DetectorKind] = {
    "mmdet-mask2former-swin-s": DetectorKind(),
    "hf-mask2former-swin-s": DetectorKind(
        "bench.suites.geneval.mask2former:load_hf_detector",
        "the folder of facebook/mask2former-swin-small-coco-instance, and in it OpenAI's "
        "ViT-L-14.pt",
    ),
    "scenes-detector": DetectorKind("bench.suites.geneval.scenes_detector:load_scene_detector"),
}


BUNDLED_PROMPTS = "scenes-held-out"  # a protocol's name of the list that comes with dimo
PREPROCESSINGS = ("pil", "tensor-antialias", "tensor-noaa")  # of images for a scorer


@dataclass(frozen=True)
class ScorerKind:
    """A network that scores how well an image fits its prompt.

    Attributes:
        suite: Of `bench.suites.base.SUITES`, where it scores without a detector.
        loader: "module:function" of `(weights, model, preprocessing) -> Towers`, of `(weights) ->
            Towers` if `shipped`, or of `(weights) -> PairScorer` for the suite "preferences"; empty
            for HPS, which its suite loads.
        shipped: The weights file, if it comes with dimo.
        weights: The official file and its source, for the suite "preferences".
        model: Its only architecture; empty: any plain CLIP of open_clip.
        versions: Name of its published weights file by version; empty: it has no versions.
        scales: Scales of its scores that a protocol may name; empty if there is no choice.
        tags: Tags of its prompts, with equally many prompts each; empty for any.
    """

    metrics: tuple[str, ...]
    suite: str = "captions"
    loader: str = ""
    shipped: Path | None = None
    weights: str = ""
    model: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    scales: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def is_fixed(self) -> bool:
        """Whether a protocol names neither model nor preprocessing nor prefix, as there is one."""
        return self.shipped is not None or self.suite == "preferences"


_HPS = ("hps", *(name for name in METRICS if name.startswith("hps_")))

SCORERS: dict[str, ScorerKind] = {
    "hps": ScorerKind(
        _HPS,
        suite="hps",
        model="ViT-H-14",
        # of xswu/HPSv2 on Hugging Face
        versions={"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"},
        tags=tuple(METRICS[name].tag for name in _HPS if METRICS[name].tag),
    ),
    "pickscore": ScorerKind(
        ("pickscore",),
        suite="preferences",
        loader="bench.features.clip:load_pickscore",
        weights="model.safetensors of yuvalkirstain/PickScore_v1 on Hugging Face",
    ),
    "image-reward": ScorerKind(
        ("image_reward",),
        suite="preferences",
        loader="bench.features.image_reward:load_image_reward",
        weights="ImageReward.pt of THUDM/ImageReward on Hugging Face, with vocab.txt of "
        "google-bert/bert-base-uncased beside it",
    ),
    "hpsv3": ScorerKind(
        ("hpsv3",),
        suite="preferences",
        loader="bench.features.hpsv3:load_hpsv3",
        weights="HPSv3.safetensors of MizzenAI/HPSv3 on Hugging Face, with tokenizer.json of "
        "Qwen/Qwen2-VL-7B-Instruct and data_collator_qwen.py of the package hpsv3 beside it",
    ),
    "clip-score": ScorerKind(
        ("clip_score",), loader="bench.features.clip:load_pairs", scales=("cosine", "scaled")
    ),
    "scenes-clip": ScorerKind(
        ("clip_score",),
        loader="bench.features.scenes_clip:load_scene_clip",
        shipped=ASSETS / "scenes-clip.safetensors",
        scales=("cosine",),
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
