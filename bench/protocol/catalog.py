"""What is known of metrics and feature extractors apart from any protocol; no heavy imports.

Where the data that travels with the code is, in a checkout and in an installed wheel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dimo.errors import DimoError

ANY = "any"  # in place of a SHA-256: whatever file is given; its hash is recorded
NONE = "none"  # name of the extractor or the reference of a protocol that needs none
EMBEDDED_REFERENCES = ("digits-all", "scenes-held-out")  # those that come with dimo


@dataclass(frozen=True)
class MetricKind:
    """What is known of a metric apart from any protocol.

    Attributes:
        label: Column heading in tables.
        higher_is_better: Direction; a protocol must state the same.
        needs: Output of the extractor it is computed from: "features", "logits" or "spatial"; or
            "detections", which a detector gives, or "pairs" of image and prompt, which a scorer
            takes.
        compares_with: Of the reference: its "statistics" (Frechet distances), its "samples", or
            nothing.
        params: Names of the integers that a protocol must give.
        optional: Names of the integers that it may give, all of them or none.
        tag: Of the prompts whose images it is about; empty: all.
    """

    label: str
    higher_is_better: bool
    needs: str = "features"
    compares_with: str = ""
    params: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    tag: str = ""


_BLOCKS = ("blocks", "block_size", "seed")

METRICS: dict[str, MetricKind] = {
    "fid": MetricKind("FID", higher_is_better=False, compares_with="statistics"),
    "sfid": MetricKind("sFID", higher_is_better=False, needs="spatial", compares_with="statistics"),
    "fd_dinov2": MetricKind("FD-DINOv2", higher_is_better=False, compares_with="statistics"),
    "inception_score": MetricKind(
        "IS", higher_is_better=True, needs="logits", params=("splits", "seed")
    ),
    "precision": MetricKind(
        "Prec.", higher_is_better=True, compares_with="samples", params=("k",), optional=_BLOCKS
    ),
    "recall": MetricKind(
        "Rec.", higher_is_better=True, compares_with="samples", params=("k",), optional=_BLOCKS
    ),
    "density": MetricKind(
        "Den.", higher_is_better=True, compares_with="samples", params=("k",), optional=_BLOCKS
    ),
    "coverage": MetricKind(
        "Cov.", higher_is_better=True, compares_with="samples", params=("k",), optional=_BLOCKS
    ),
    "kid": MetricKind(
        "KID",
        higher_is_better=False,
        compares_with="samples",
        params=("subsets", "subset_size", "seed"),
    ),
    "cmmd": MetricKind("CMMD", higher_is_better=False, compares_with="samples"),
    "class_accuracy": MetricKind("Acc.", higher_is_better=True, needs="logits"),
    "geneval": MetricKind("GenEval", higher_is_better=True, needs="detections"),
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
    "hps": MetricKind("HPS", higher_is_better=True, needs="pairs"),
    **{
        f"hps_{style.replace('-', '_')}": MetricKind(
            label, higher_is_better=True, needs="pairs", tag=style
        )
        for style, label in (
            ("anime", "Anime"),
            ("concept-art", "Concept art"),
            ("paintings", "Paintings"),
            ("photo", "Photo"),
        )
    },
    "clip_score": MetricKind("CLIP score", higher_is_better=True, needs="pairs"),
}


@dataclass(frozen=True)
class ExtractorKind:
    """A feature extractor.

    Attributes:
        outputs: Of "features", "logits", "spatial": what one pass gives.
        resizes: Ways to its input size that a protocol may name; empty: images as they are.
        weights: The official file and where it is; empty: shipped with dimo.
    """

    outputs: tuple[str, ...]
    resizes: tuple[str, ...] = ()
    weights: str = ""


EXTRACTORS: dict[str, ExtractorKind] = {
    "digits-cnn": ExtractorKind(("features", "logits")),
    "scenes-clip": ExtractorKind(("features",)),
    "inception": ExtractorKind(
        ("features", "logits", "spatial"),
        ("tf1-bilinear", "pil-bicubic", "pil-bicubic-floor", "torch-bilinear"),
        "weights-inception-2015-12-05-6726825d.pth, "
        "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
    ),
    "inception-torchscript": ExtractorKind(
        ("features",),
        ("tf1-bilinear", "pil-bicubic"),
        "inception-2015-12-05.pt, "
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/",
    ),
    "dinov2-vit-l-14": ExtractorKind(
        ("features",),
        ("pil-bicubic",),
        "dinov2_vitl14_pretrain.pth, https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/",
    ),
    "clip-vit-l-14-336": ExtractorKind(
        ("features",),
        ("pil-bicubic", "torch-bicubic"),
        "ViT-L-14-336px.pt, https://openaipublic.azureedge.net/clip/models/"
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/",
    ),
}


@dataclass(frozen=True)
class DetectorKind:
    """A detector of objects.

    Attributes:
        load: "module:function" of `(weights: Path | None, device) -> ObjectDetector`
            (`bench.suites.geneval.detectors`); empty: it does not run in dimo, which reads the
            official evaluator's results.jsonl instead.
        weights: The official files and where they are; empty: they come with dimo.
    """

    load: str = ""
    weights: str = ""

    @property
    def reads_results(self) -> bool:
        """Whether results are read from a file."""
        return not self.load


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
    """What says how well an image fits its prompt.

    Attributes:
        metrics: Names of the metrics it gives.
        shipped: Whether its network comes with dimo, takes images as they are and has no prefix;
            then a protocol names neither model nor preprocessing.
        model: The only architecture it has; empty: any plain CLIP of open_clip.
        versions: Name of its published weights file by version; empty: it has no versions.
        scales: Of its scores, of which a protocol names one; empty: there is no choice.
        tags: Those that its prompts have, all alike in number; empty: any.
    """

    metrics: tuple[str, ...]
    shipped: bool = False
    model: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    scales: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


_HPS = tuple(name for name in METRICS if name.startswith("hps"))

SCORERS: dict[str, ScorerKind] = {
    "hps": ScorerKind(
        _HPS,
        model="ViT-H-14",
        # of xswu/HPSv2 on Hugging Face
        versions={"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"},
        tags=tuple(METRICS[name].tag for name in _HPS if METRICS[name].tag),
    ),
    "clip-score": ScorerKind(("clip_score",), scales=("cosine", "scaled")),
    "scenes-clip": ScorerKind(("clip_score",), shipped=True, scales=("cosine",)),
}


_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = {  # in a wheel, in a checkout
    "protocols": (_PACKAGE / "_data" / "protocols", _PACKAGE.parent / "protocols"),
    "published": (_PACKAGE / "_data", _PACKAGE.parent / "results"),
}


def data_dir(kind: Literal["protocols", "published"]) -> Path:
    """The folder of the shipped protocols, or the one that holds `published.csv`.

    A wheel carries them in `bench/_data`, a checkout in `protocols/` and `results/`.

    Raises:
        DimoError: Neither is there.
    """
    for folder in _FOLDERS[kind]:
        if folder.is_dir():
            return folder
    raise DimoError(f"the {kind} data are missing beside {_PACKAGE}; reinstall dimo")
