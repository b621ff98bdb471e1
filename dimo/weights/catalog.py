"""Files of weights on this disk, whole or in shards; names and sources of the official ones."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimo.errors import DimoError, unknown_name
from dimo.util.files import at_home, user_home

ASSETS = Path(__file__).parent.parent / "assets"  # the small weights that come with the package
# A file of a set: its name, the number of files, the suffix.
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


@dataclass(frozen=True)
class OfficialFile:
    """One published file; "" and None where the source does not state a value."""

    source: str  # Hugging Face repository "owner/name", or an https address of the file's folder
    path: str  # inside the source
    contents: str  # in a few words
    licence: str = ""
    size: int | None = None  # bytes, rounded where only a rounded number is published
    sha256: str = ""
    companion: str = ""  # name of another official file without which this one cannot be used

    @property
    def filename(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def on_hugging_face(self) -> bool:
        return "://" not in self.source

    @property
    def url(self) -> str:
        """The address for a browser."""
        if self.on_hugging_face:
            return f"https://huggingface.co/{self.source}/resolve/main/{self.path}"
        return f"{self.source}/{self.path}"


_MB = 1_000_000


def _maskgit(path: str, contents: str, *rest: Any, **others: Any) -> OfficialFile:
    path = f"pretrained_maskgit/{path}"
    return OfficialFile("llvictorll/Maskgit-pytorch", path, contents, "MIT", *rest, **others)


def _halton(variant: str, size: int | None = None, sha256: str = "") -> OfficialFile:
    path, (pixels, name) = f"ImageNet_{variant}.pth", variant.split("_")
    contents = f"Halton-MaskGIT {name}, {pixels} x {pixels}"
    return OfficialFile("llvictorll/Halton-MaskGIT", path, contents, "MIT", size, sha256)


def _meissonic(path: str, contents: str, **others: Any) -> OfficialFile:
    return OfficialFile("MeissonFlow/Meissonic", path, contents, "Apache-2.0", **others)


# Sizes and hashes are those that the sources' own pages state; hashes of extractors are those of
# the protocols that fix them. Halton-MaskGIT has no tiny network for 384 and no large for 256.
OFFICIAL: dict[str, OfficialFile] = {
    "maskgit-256": _maskgit(
        "MaskGIT/MaskGIT_ImageNet_256.pth",
        "MaskGIT v1.0 transformer, ImageNet 256 x 256",
        2_090_306_069,
        "74b38fa16c92da3db79f9aac3c9d0d2ef5cb6ea283c48908213f10d786304462",
    ),
    "maskgit-512": _maskgit(
        "MaskGIT/MaskGIT_ImageNet_512.pth",
        "MaskGIT v1.0 transformer, ImageNet 512 x 512",
        2_116_055_573,
        "fa1e1286451602c30d1608485797f63f27c8cc9688346fa0f1315952b46b3c03",
    ),
    "maskgit-vqgan": _maskgit(
        "VQGAN/last.ckpt",
        "VQGAN f16/1024, tokenizer of both",
        957_954_257,
        "e38a3aed8c86e8d47436f611325b3a23888cab70a0cc56c13cd84e8d4aab6e71",
        companion="maskgit-vqgan-config",
    ),
    "maskgit-vqgan-config": _maskgit("VQGAN/model.yaml", "configuration of that VQGAN"),
    "dimo-maskgit": OfficialFile(
        "Yuanzhi/DiMO",
        "maskgit/pytorch_model.bin",
        "one-step student of Di[M]O, ImageNet 256 x 256",
        "MIT",
    ),
    "di4c-d": OfficialFile(
        "https://zenodo.org/records/15124163/files",
        "maskgit-di4c-d.pth",
        "few-step student of di4c-d, ImageNet 256 x 256",
    ),
    "halton-tiny-256": _halton("256_tiny", 276 * _MB),
    "halton-small-256": _halton(
        "256_small",
        832 * _MB,
        "760b9937d16157e7e518fbf405efe281552933242b552d5e8262cb10507fb0e2",
    ),
    "halton-base-256": _halton("256_base", 1710 * _MB),
    "halton-small-384": _halton(
        "384_small",
        834 * _MB,
        "76bad1f175083210e27f794674b27efd54266b5b90471a383322c8840749ae5d",
    ),
    "halton-base-384": _halton(
        "384_base",
        1710 * _MB,
        "3e707c8fcf75ddf73d812de04d2561d3ff69f52f21c08e079e0fa4d0b596fcd6",
    ),
    "halton-large-384": _halton("384_large"),
    "meissonic": _meissonic(
        "transformer/diffusion_pytorch_model.safetensors",
        "Meissonic transformer, 1024 x 1024",
        companion="meissonic-config",
        size=4030 * _MB,
    ),
    "meissonic-config": _meissonic("transformer/config.json", "configuration of it"),
    "meissonic-vq": _meissonic(
        "vqvae/diffusion_pytorch_model.safetensors",
        "VQ f16/8192, tokenizer of Meissonic",
        companion="meissonic-vq-config",
        size=585 * _MB,
    ),
    "meissonic-vq-config": _meissonic("vqvae/config.json", "configuration of that VQ"),
    "meissonic-text": _meissonic(
        "text_encoder/model.safetensors",
        "CLIP ViT-H/14 text encoder of Meissonic",
        companion="meissonic-text-config",
    ),
    "meissonic-text-config": _meissonic(
        "text_encoder/config.json", "configuration of it", companion="meissonic-vocabulary"
    ),
    "meissonic-vocabulary": _meissonic(
        "tokenizer/vocab.json", "words of its text tokenizer", companion="meissonic-merges"
    ),
    "meissonic-merges": _meissonic(
        "tokenizer/merges.txt", "merges of it", companion="meissonic-text-tokenizer"
    ),
    "meissonic-text-tokenizer": _meissonic("tokenizer/tokenizer_config.json", "settings of it"),
    "llamagen-vq16": OfficialFile(
        "FoundationVision/LlamaGen",
        "vq_ds16_c2i.pt",
        "LlamaGen VQ-16, tokenizer of Halton-MaskGIT",
        "MIT",
    ),
    "inception": OfficialFile(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0",
        "weights-inception-2015-12-05-6726825d.pth",
        "feature extractor of FID and IS, torch-fidelity's file",
        "Apache-2.0",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "inception-torchscript": OfficialFile(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics",
        "inception-2015-12-05.pt",
        "feature extractor of clean-fid, NVIDIA's TorchScript file",
        sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
    "dinov2-vit-l-14": OfficialFile(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14",
        "dinov2_vitl14_pretrain.pth",
        "feature extractor of FD-DINOv2",
        "Apache-2.0",
        1_217_586_395,
    ),
    "hps-v2.0": OfficialFile(
        "xswu/HPSv2", "HPS_v2_compressed.pt", "CLIP ViT-H/14 of HPS v2.0", "Apache-2.0"
    ),
    "hps-v2.1": OfficialFile(
        "xswu/HPSv2", "HPS_v2.1_compressed.pt", "CLIP ViT-H/14 of HPS v2.1", "Apache-2.0"
    ),
    "clip-vit-l-14-336": OfficialFile(
        "https://openaipublic.azureedge.net/clip/models/"
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "ViT-L-14-336px.pt",
        "feature extractor of CMMD",
        "MIT",
        sha256="3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
    "convnextv2-b": OfficialFile(
        "https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k",
        "convnextv2_base_22k_224_ema.pt",
        "feature extractor of FDr6, ConvNeXt V2",
        "CC-BY-NC-4.0",
    ),
    "mae-vit-l-16": OfficialFile(
        "https://dl.fbaipublicfiles.com/mae/pretrain",
        "mae_pretrain_vit_large.pth",
        "feature extractor of FDr6, MAE",
        "CC-BY-NC-4.0",
    ),
    "siglip2-so400m-16": OfficialFile(
        "timm/ViT-SO400M-16-SigLIP2-256",
        "open_clip_model.safetensors",
        "feature extractor of FDr6, SigLIP 2",
        "Apache-2.0",
    ),
    "clip-vit-l-14": OfficialFile(
        "https://openaipublic.azureedge.net/clip/models/"
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "ViT-L-14.pt",
        "feature extractor of FDr6, CLIP",
        "MIT",
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "alexnet": OfficialFile(
        "https://download.pytorch.org/models",
        "alexnet-owt-7be5be79.pth",
        "AlexNet of LPIPS, torchvision's file",
        size=244_408_911,
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "lpips": OfficialFile(
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1",
        "alex.pth",
        "weights of AlexNet's channels in LPIPS 0.1",
        "BSD-2-Clause",
        6009,
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        companion="alexnet",
    ),
}

# Names that files of many networks have; such a file keeps the folders of its source.
_AMBIGUOUS = (
    *("last.ckpt", "model.yaml", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    *("model.safetensors", "config.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
)
_NO_WEIGHTS = (".yaml", ".json", ".txt")


def default_folder() -> Path:
    """The folder of fetched files: `$DIMO_WEIGHTS`, or one in the user's cache."""
    given = os.environ.get("DIMO_WEIGHTS")
    return at_home(given) if given else user_home() / ".cache" / "dimo" / "weights"


def get_official(name: str) -> OfficialFile:
    """The row of that name; a `DimoError` if there is none."""
    if name not in OFFICIAL:
        raise unknown_name("weights", name, OFFICIAL, "they are listed by: dimo weights list")
    return OFFICIAL[name]


def destination(name: str, folder: Path) -> Path:
    """Where `dimo weights fetch` puts the file: flat, unless its name says too little."""
    official = get_official(name)
    return folder / (official.path if official.filename in _AMBIGUOUS else official.filename)


def name_of(path: Path) -> str | None:
    """The official name of a file, official or converted, by its path; None if it has none."""
    for name, official in OFFICIAL.items():
        parts = destination(name, Path()).parts
        names = [form.name for form in _forms(Path(official.filename))]
        if path.name in names and path.parts[-len(parts) : -1] == parts[:-1]:
            return name
    return None


def find(name: str, folder: Path | None) -> Path | None:
    """The file in `folder`, or None; the places are those of `locate`."""
    official = get_official(name)
    parts = Path(official.path).parts
    place = default_folder() if folder is None else folder
    ends = [place.joinpath(*parts[start:]) for start in reversed(range(len(parts)))]
    if official.on_hugging_face:
        hubs = [_hub_cache_of(place.resolve()), *([hub_cache()] if folder is None else [])]
        snapshots = (snapshot for hub in hubs for snapshot in _snapshots(hub, official.source))
        ends += [snapshot / official.path for snapshot in snapshots]
    return next((path for end in ends for path in _forms(end) if path.is_file()), None)


def hub_cache() -> Path:
    """The cache of huggingface_hub, whose import is slow."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return at_home(given)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return at_home(os.environ.get("HF_HOME") or f"{caches}/huggingface") / "hub"


def _hub_cache_of(folder: Path) -> Path:
    """The cache that a snapshot of one repository is in, or else the folder itself."""
    inside = (path.parent for path in (folder, *folder.parents) if path.name.startswith("models--"))
    return next(inside, folder)


def _snapshots(hub: Path, source: str) -> list[Path]:
    """The snapshots of a repository in such a cache; that of its main branch comes first."""
    repository = hub / f"models--{source.replace('/', '--')}"
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        main = ""
    return sorted((repository / "snapshots").glob("*"), key=lambda path: (path.name != main, path))


def _forms(official: Path) -> list[Path]:
    """The file converted, if it is one of weights, and as it is."""
    converted = [] if official.suffix in _NO_WEIGHTS else [official.with_suffix(".safetensors")]
    return [*converted, official]


def locate(name: str, folder: Path | None = None) -> Path:
    """The file on this disk, official or converted to safetensors.

    It is looked for in the folder (None: `default_folder()`) under its own name and under its path
    in the source, whole or in part, so that a snapshot of the source may be given as it is. Then it
    is looked for in a cache of huggingface_hub: the user's (None), the one that the snapshot is in,
    or the folder.

    Raises:
        DimoError: Unknown name; no such file.
    """
    official = get_official(name)
    path = find(name, folder)
    if path is None:
        folder = default_folder() if folder is None else folder
        below = "" if official.path == official.filename else f" (nor {official.path} below it)"
        raise DimoError(
            f"no {official.filename} ({official.contents}) in {folder}{below}; give its folder "
            f"with --weights, or fetch it with: dimo weights fetch {name}"
        )
    return path


def weights_files(path: Path) -> list[Path]:
    """The files that hold the weights at `path`.

    That is the file itself, or all shards of a set: `path` may be one of them, their
    `.index.json`, or a folder that holds one set or one file.

    Raises:
        DimoError: No such file, a folder of several, or a shard that is missing.
    """
    if path.is_dir():
        kinds = (sorted(path.glob(kind)) for kind in ("*.index.json", "*.safetensors", "*.bin"))
        sets = {_SHARD.sub(r"\1\3", p.name): p for p in next(filter(None, kinds), [])}
        if len(sets) != 1:
            raise DimoError(
                f"folder {path} holds {', '.join(sets) or 'no .safetensors and no .bin'}; give "
                "the one file of weights"
            )
        (path,) = sets.values()
    if not path.is_file():
        raise DimoError(f"no weights file at {path}; give the path of a checkpoint file")
    if path.name.endswith(".index.json"):
        names = _indexed(path)
    elif shard := _SHARD.fullmatch(path.name):
        stem, total, suffix = shard.groups()
        names = [f"{stem}-{n:05}-of-{total}{suffix}" for n in range(1, int(total) + 1)]
    else:
        return [path]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise DimoError(
            f"{path} belongs to {len(names)} shards, of which {len(missing)} are missing, e.g. "
            f"{missing[0]}; put all of them beside it"
        )
    return [path.with_name(name) for name in names]


def _indexed(path: Path) -> list[str]:
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"].values())
        return sorted(Path(name).name for name in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DimoError(
            f"{path} is no index of shards ({error}); fetch it again, or give the folder "
            "of the shards"
        ) from error
