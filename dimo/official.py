"""Official weight files: their names, where they come from, and where they lie on this disk."""

__all__ = ["OFFICIAL", "OfficialFile", "default_folder", "locate"]

import os
from dataclasses import dataclass
from pathlib import Path

from dimo.errors import DimoError, unknown_name


@dataclass(frozen=True)
class OfficialFile:
    """One published file.

    Attributes:
        source: Hugging Face repository "owner/name", or an https address of the file's folder.
        path: Path inside the source; its last part is the file's name.
        licence: As the source states it.
        size: Bytes, rounded where only a rounded number is published.
        contents: What is in it, in a few words.
        sha256: Of the file, where it is published; else "".
    """

    source: str
    path: str
    licence: str
    size: int
    contents: str
    sha256: str = ""

    @property
    def filename(self) -> str:
        return self.path.rpartition("/")[2]


_MASKGIT = "llvictorll/Maskgit-pytorch"
_HALTON = "llvictorll/Halton-Maskgit"
_MB = 1_000_000

OFFICIAL: dict[str, OfficialFile] = {
    "maskgit-256": OfficialFile(
        _MASKGIT,
        "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth",
        "MIT",
        2090 * _MB,
        "MaskGIT v1.0 transformer, ImageNet 256 x 256",
    ),
    "maskgit-512": OfficialFile(
        _MASKGIT,
        "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_512.pth",
        "MIT",
        2120 * _MB,
        "MaskGIT v1.0 transformer, ImageNet 512 x 512",
    ),
    "maskgit-vqgan": OfficialFile(
        _MASKGIT,
        "pretrained_maskgit/VQGAN/last.ckpt",
        "MIT",
        958 * _MB,
        "VQGAN f16/1024, tokenizer of both",
    ),
    "maskgit-vqgan-config": OfficialFile(
        _MASKGIT,
        "pretrained_maskgit/VQGAN/model.yaml",
        "MIT",
        1_000,
        "configuration of that VQGAN",
    ),
    "llamagen-vq16": OfficialFile(
        "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", "MIT", 288 * _MB, "LlamaGen VQ-16 tokenizer"
    ),
    "dimo-maskgit": OfficialFile(
        "Yuanzhi/DiMO", "maskgit/pytorch_model.bin", "MIT", 697 * _MB, "one-step student"
    ),
    **{
        f"halton-{size}-{side}": OfficialFile(
            _HALTON,
            f"ImageNet_{side}_{size}.pth",
            "MIT",
            832 * _MB,
            f"Halton-MaskGIT {size}, ImageNet {side} x {side}",
        )
        for size in ("tiny", "small", "base", "large")
        for side in (256, 384)
    },
}


def default_folder() -> Path:
    """Where fetched files lie: `$DIMO_WEIGHTS`, or a folder in the user's cache."""
    given = os.environ.get("DIMO_WEIGHTS")
    return Path(given) if given else Path.home() / ".cache" / "dimo" / "weights"


def locate(name: str, folder: Path | None = None) -> Path:
    """The file on this disk, official or converted to safetensors.

    It is looked for in the folder itself under its own name, and under its path in the source,
    whole or in part, so that a snapshot of the source may be given as it is.

    Args:
        name: A key of `OFFICIAL`.
        folder: Where to look; None: `default_folder()`.

    Raises:
        DimoError: Unknown name; no such file.
    """
    if name not in OFFICIAL:
        raise unknown_name("weights", name, OFFICIAL)
    official = OFFICIAL[name]
    folder = default_folder() if folder is None else folder
    parts = Path(official.path).parts
    for start in reversed(range(len(parts))):
        official_path = folder.joinpath(*parts[start:])
        for path in (official_path.with_suffix(".safetensors"), official_path):
            if path.is_file():
                return path
    raise DimoError(
        f"no {official.filename} ({official.contents}) in {folder}; give its folder with "
        f"--weights, or fetch it with: dimo weights fetch {name}"
    )
