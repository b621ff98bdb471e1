"""What a protocol can name: feature extractors, detectors, scorers. No heavy imports.

Each table is a plain dict; a row names its code as "module:function", which
`bench.protocol.catalog.load` imports on first use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.protocol.catalog import METRICS, SIX
from dimo.weights.catalog import ASSETS


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
        parts: Of a row of several networks: name -> their rows and resizes. Its features are theirs
            side by side, its weights a folder of their files.
    """

    outputs: tuple[str, ...]
    loader: str
    resizes: tuple[str, ...] = ()
    weights: str = ""
    shipped: Path | None = None
    archive_sha256: str = ""
    packages: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def _vision(loader: str, weights: str, **more: Any) -> ExtractorKind:
    loader, resizes = f"bench.features.vision:{loader}", ("torch-antialias",)
    return ExtractorKind(("features",), loader, resizes, weights, packages=("timm",), **more)


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
        resizes=("pil-bicubic", "torch-antialias"),
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
    "convnextv2-b": _vision(
        "load_convnextv2",
        "convnextv2_base_22k_224_ema.pt, https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k/",
    ),
    "mae-vit-l-16": _vision(
        "load_mae", "mae_pretrain_vit_large.pth, https://dl.fbaipublicfiles.com/mae/pretrain/"
    ),
    "siglip2-so400m-16": _vision(
        "load_siglip2", "open_clip_model.safetensors, timm/ViT-SO400M-16-SigLIP2-256"
    ),
    "clip-vit-l-14": _vision(
        "load_clip",
        "ViT-L-14.pt, https://openaipublic.azureedge.net/clip/models/"
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/",
        archive_sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "six": ExtractorKind(
        ("features",),
        "bench.features.extraction:Networks",
        weights="the files of its six networks in one folder",
        parts=SIX,
    ),
}


def _starting(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in METRICS if name.startswith(prefix))


@dataclass(frozen=True)
class DetectorKind:
    """An object detector, or a model that answers questions about images.

    Attributes:
        loader: "module:function" of `(weights: Path | None, device) -> ObjectDetector`; empty for
            one that dimo does not run but whose results it reads from a file.
        weights: The official files and their source; empty if they come with dimo.
        metrics: Those it decides.
        reader: "module:function" of `(path, text of the prompts, Origin, Protocol) -> Answers`
            (`bench.suites.answers`) that reads a model's answers; empty for detectors.
    """

    loader: str = ""
    weights: str = ""
    metrics: tuple[str, ...] = tuple(n for n, kind in METRICS.items() if kind.needs == "detections")
    reader: str = ""

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
    "qwen3-vl-8b": DetectorKind(
        metrics=_starting("geneval2"), reader="bench.suites.answers:read_geneval2"
    ),
    "mplug-vqa-large": DetectorKind(
        metrics=_starting("dpg_"), reader="bench.suites.answers:read_dpg_bench"
    ),
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


_HPS = ("hps", *_starting("hps_"))

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
