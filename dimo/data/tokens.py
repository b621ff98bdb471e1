"""Token caches: a data set encoded by a teacher's tokenizer with `dimo encode`.

A safetensors file with `tokens` uint16 [N, L], `labels` int64 [N] and `CacheInfo` as metadata.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.models import Tokenizer
from dimo.util.schema import Origin, decode, encode
from dimo.weights.files import read_tensors, save_tensors, state_sha256

_NEXT_STEP = "make it again with: dimo encode"


class CacheTarget(Protocol):
    """What a cache must fit, `dimo.zoo.teachers.Teacher`."""

    @property
    def name(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_classes(self) -> int: ...


@dataclass(frozen=True, eq=False)
class TokenData:
    """Images as tokens in 0..V-1."""

    tokens: Tensor  # int64 [N, L]
    labels: Tensor  # int64 [N]
    sha256: str  # of tokens and labels


@dataclass(frozen=True)
class CacheInfo:
    """The origin of a token cache."""

    format: int  # version of the file format
    teacher: str
    tokenizer_sha256: str
    images: int  # number of images before mirroring
    names_sha256: str  # of their names and labels, in order
    crop: str  # "none", or "adm" if each was cropped and resized
    mirrored: bool  # each image is followed by its mirror image
    source_sha256: str = ""  # of the encoded pixels, in order


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash of a tokenizer's weights, independent of their file format."""
    assert isinstance(tokenizer, nn.Module)
    return state_sha256(tokenizer.state_dict())


def read_tokens(path: Path, target: CacheTarget, tokenizer: Tokenizer) -> TokenData:
    """Reads a token cache.

    Raises:
        DimoError: The file is missing or damaged, of another tokenizer or shape, or has values out
            of range.
    """
    tensors, info = _read(path)
    own = tokenizer_sha256(tokenizer)
    if info.tokenizer_sha256 != own:
        raise DimoError(
            f"{path} was encoded by a tokenizer of teacher {info.teacher!r} with sha256 "
            f"{info.tokenizer_sha256[:12]}, and that of {target.name!r} has {own[:12]}; "
            f"encode the images again with: dimo encode --teacher {target.name}"
        )
    _check(tensors, info, target, tokenizer.codebook_size, path)
    return token_data(tensors["tokens"], tensors["labels"])


def token_data(tokens: Tensor, labels: Tensor) -> TokenData:
    """`TokenData` of tokens [N, L] of any integer type and labels int64 [N]."""
    digest = state_sha256({"tokens": tokens.to(torch.uint16), "labels": labels})
    return TokenData(tokens.to(torch.int64), labels.clone(), digest)


def read_cache_info(path: Path) -> CacheInfo:
    """The metadata of a token cache.

    Raises:
        DimoError: The file is missing or damaged, no token cache, or of another version.
    """
    return _read(path)[1]


def save_tokens(path: Path, tokens: Tensor, labels: Tensor, info: CacheInfo) -> None:
    """Writes a cache atomically: tokens uint16 [N, L] and labels int64 [N].

    Raises:
        DimoError: The file cannot be written; nothing is left behind.
    """
    save_tensors(path, {"tokens": tokens, "labels": labels}, encode(info))


def _read(path: Path) -> tuple[dict[str, Tensor], CacheInfo]:
    tensors, metadata = read_tensors(path, next_step=_NEXT_STEP)
    if tensors.keys() != {"labels", "tokens"}:
        held = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise DimoError(f"{path} is no token cache, it holds {held}; {_NEXT_STEP}")
    info = decode(CacheInfo, metadata, Origin(str(path), _NEXT_STEP))
    if info.format != 1:
        raise DimoError(f"{path} has format {info.format}, this version reads 1; update dimo")
    return tensors, info


def _check(
    tensors: dict[str, Tensor], info: CacheInfo, target: CacheTarget, codebook_size: int, path: Path
) -> None:
    rows = info.images * (2 if info.mirrored else 1)
    for name, shape, dtype in (
        ("tokens", [rows, target.num_tokens], torch.uint16),
        ("labels", [rows], torch.int64),
    ):
        value = tensors[name]
        if list(value.shape) != shape or value.dtype != dtype or rows == 0:
            raise DimoError(
                f"{name} of {path} are {_type(value.dtype)} {list(value.shape)}; allowed for "
                f"teacher {target.name!r} and {info.images:,} images: {_type(dtype)} {shape}; "
                f"{_NEXT_STEP}"
            )
    for name, end in (("tokens", codebook_size), ("labels", target.num_classes)):
        values = tensors[name].numpy()  # torch has no minimum of uint16
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= end:
            raise DimoError(
                f"{name} of {path} are from {low} to {high}; allowed for teacher "
                f"{target.name!r}: 0 to {end - 1}; {_NEXT_STEP}"
            )


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
