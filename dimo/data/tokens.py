"""Token caches: a data set as a teacher's tokenizer encodes it, made once by `dimo encode`.

A safetensors file with `tokens` uint16 [N, L], `labels` int64 [N] and, as metadata, `CacheInfo`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dimo.data import digits
from dimo.errors import DimoError
from dimo.models import Tokenizer
from dimo.util.schema import Origin, decode, encode
from dimo.weights.files import read_tensors, save_tensors, state_sha256
from dimo.zoo.loading import weights_file
from dimo.zoo.teachers import Teacher, get_teacher

_NEXT_STEP = "make it again with: dimo encode"


@dataclass(frozen=True, eq=False)
class TokenData:
    """Images as tokens.

    Attributes:
        tokens: int64 [N, L], all in the codebook.
        labels: int64 [N].
        sha256: Over tokens and labels, wherever they come from.
    """

    tokens: Tensor
    labels: Tensor
    sha256: str


@dataclass(frozen=True)
class CacheInfo:
    """What a token cache was made of.

    Attributes:
        format: Of the file.
        teacher: Whose tokenizer encoded it.
        tokenizer_sha256: Of the tokenizer's weights, see `tokenizer_sha256`.
        images: How many images were encoded.
        names_sha256: Over their names and labels, in order.
        crop: "none", or "adm" where each was cropped and resized.
        mirrored: Whether each image is followed by its mirror image.
        source_sha256: Over the pixels as encoded, in order.
    """

    format: int
    teacher: str
    tokenizer_sha256: str
    images: int
    names_sha256: str
    crop: str
    mirrored: bool
    source_sha256: str = ""


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Names a tokenizer by its weights, official or converted to another file format."""
    assert isinstance(tokenizer, nn.Module)
    return state_sha256(tokenizer.state_dict())


def load_tokens(path: Path | None, *, teacher: str, weights: Path | None = None) -> TokenData:
    """Reads a token cache, or encodes the data set that is embedded with the teacher.

    Args:
        path: What `dimo encode` wrote; None: the embedded data.
        teacher: A key of `dimo.zoo.teachers.TEACHERS`.
        weights: Folder of the tokenizer's weights; None: those shipped, or those fetched.

    Raises:
        DimoError: No data, or a file that is damaged, of another tokenizer, of another shape or
            with tokens or labels out of range; the tokenizer is missing.
    """
    row = get_teacher(teacher)
    if path is None and (not row.is_bundled or row.text is not None):
        raise DimoError(
            f"teacher {teacher!r} comes without data; encode a folder or WebDataset of images: "
            f"dimo encode PATH --teacher {teacher} -o tokens.safetensors"
        )
    tokenizer = row.tokenizer(weights_file(row, "tokenizer", weights))
    if path is None:
        images, labels = digits.load()
        with torch.inference_mode():
            return _data(tokenizer.encode(images).to(torch.uint16), labels)
    tensors, info = _read(path)
    own = tokenizer_sha256(tokenizer)
    if info.tokenizer_sha256 != own:
        raise DimoError(
            f"{path} was encoded by a tokenizer of teacher {info.teacher!r} with sha256 "
            f"{info.tokenizer_sha256[:12]}, and that of {teacher!r} has {own[:12]}; "
            f"encode the images again with: dimo encode --teacher {teacher}"
        )
    _check(tensors, info, row, tokenizer.codebook_size, path)
    return _data(tensors["tokens"], tensors["labels"])


def read_cache_info(path: Path) -> CacheInfo:
    """What a token cache says of itself.

    Raises:
        DimoError: The file is missing, damaged, no token cache, or of another version.
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


def _data(tokens: Tensor, labels: Tensor) -> TokenData:
    digest = state_sha256({"tokens": tokens, "labels": labels})
    return TokenData(tokens.to(torch.int64), labels.clone(), digest)


def _check(
    tensors: dict[str, Tensor], info: CacheInfo, teacher: Teacher, codebook_size: int, path: Path
) -> None:
    tokens, labels = tensors["tokens"], tensors["labels"]
    rows = info.images * (2 if info.mirrored else 1)
    shapes = ([rows, teacher.num_tokens], [rows])
    types = (torch.uint16, torch.int64)
    for name, wanted, dtype in zip(("tokens", "labels"), shapes, types, strict=True):
        found = tensors[name]
        if list(found.shape) != wanted or found.dtype != dtype or rows == 0:
            raise DimoError(
                f"{name} of {path} are {_type(found.dtype)} {list(found.shape)}; allowed for "
                f"teacher {teacher.name!r} and {info.images:,} images: {_type(dtype)} {wanted}; "
                f"{_NEXT_STEP}"
            )
    for name, values, end in (
        ("tokens", tokens, codebook_size),
        ("labels", labels, teacher.num_classes),
    ):
        low, high = _range(values)
        if low < 0 or high >= end:
            raise DimoError(
                f"{name} of {path} are from {low} to {high}; allowed for teacher "
                f"{teacher.name!r}: 0 to {end - 1}; {_NEXT_STEP}"
            )


def _range(values: Tensor) -> tuple[int, int]:
    array = values.numpy()  # torch has no minimum of uint16
    return int(array.min()), int(array.max())


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
