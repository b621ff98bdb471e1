"""Loading weights safely and strictly; saving them with their provenance.

Only this module calls safetensors and `torch.load`. Pickles load with `weights_only=True`, and an
inert object replaces whatever trainers store beside tensors. Every key and shape must fit;
otherwise the error says which do not, or what the file looks like instead.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.util.files import replacing, sha256_bytes, sha256_file
from dimo.weights.catalog import weights_files

# The key of the network in a trainer's checkpoint: Maskgit-pytorch and di4c, VQGAN, LlamaGen.
_CONTAINERS = ("model_state_dict", "state_dict", "model")
# The prefix that torch.compile and DistributedDataParallel give every key.
_WRAPPERS = re.compile(r"(_orig_mod\.|module\.)+")
# The key of its average, which is what authors sample: LlamaGen, SiT and DiT, timm, ADM.
_AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")

# Packages and built-in types that trainers' files name beside their tensors. Nothing of them is
# ever imported or called.
_INERT_PACKAGES = (
    *("argparse", "collections", "numpy", "omegaconf", "pathlib", "typing"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
)
_INERT_TYPES = ("bool", "dict", "float", "int", "list", "object", "set", "str", "tuple")
_INERT_MAPPINGS = ("AttributeDict", "defaultdict")
# Keeps the tensors of any checkpoint; runs the code in it.
_STRIP = (
    "import torch; d = torch.load('OLD', 'cpu', weights_only=False); "
    "d = d if isinstance(d, dict) else d.state_dict(); "
    "torch.save({k: v if torch.is_tensor(v) else dict(v) for k, v in d.items() if "
    "torch.is_tensor(v) or v and isinstance(v, dict) and all(map(torch.is_tensor, v.values()))}, "
    "'NEW.pth')"
)

VQGAN_KIND, MASKGIT_KIND = "taming VQGAN", "MaskGIT v1.0 transformer"
DI4C_KIND = "di4c student"
# A key that only this kind of network has -> its kind, for errors; the first that matches counts.
KINDS: dict[str, str] = {
    "latent_projection.0.weight": DI4C_KIND,
    "word_positions": "scenes transformer",
    "transformer.layers.0.0.fn.mha.in_proj_weight": MASKGIT_KIND,
    "transformer.layers.0.attn.wq.weight": "Halton-MaskGIT transformer",
    "single_transformer_blocks.0.attn.to_q.weight": "Meissonic transformer",
    "encoder.down.0.block.0.conv1.weight": VQGAN_KIND,
    "encoder.conv_blocks.0.res.0.conv1.weight": "LlamaGen VQ tokenizer",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "diffusers VQModel",
    "encoder.1.weight": "scenes tokenizer",
    "codebook": "digits tokenizer",
    "convolutions.0.weight": "digits feature extractor",
    "fine.0.weight": "scenes detector",
}


class _Inert:
    """Replaces an object in a file, without its content."""

    def __init__(self, *_: object) -> None: ...

    def __new__(cls, *_: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None: ...


class _InertMapping(_Inert):
    """As `_Inert` for a subclass of dict: what is made is one, because items are put into it."""

    def __new__(cls, *_: object) -> Any:
        return {}


@dataclass(frozen=True)
class Checkpoint:
    """A network in a file of weights.

    Attributes:
        state: Its state dict, on the CPU.
        part: The key under which a trainer's file holds it, if there is an average to choose.
        settings: What `save_tensors` or `save_pickle` stored beside it.
    """

    state: dict[str, Tensor]
    part: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict that `read_weights` finds."""
    return read_weights(path).state


def read_weights(path: str | PathLike[str], *, ema: bool = True) -> Checkpoint:
    """Reads the network of a `.safetensors` or of a trainer's pickle, whole or in shards.

    Args:
        path: As in `weights_files`.
        ema: Take the average of the weights if the file holds one beside them.

    Raises:
        DimoError: A file that is missing, unreadable, not what it is called, or names classes that
            no official file has.
    """
    path = Path(path)
    files = weights_files(path)
    content: dict[Any, Any] = {}
    for one in map(_content, files):
        content.update(one if isinstance(one, dict) else {})
    with suppress(KeyError, TypeError):  # a checkpoint of a run holds several networks
        content = content["task"]["networks"]
    averages, last = (
        [key for key in keys if _tensors(content.get(key))] for keys in (_AVERAGES, _CONTAINERS)
    )
    taken = next(iter(averages + last if ema else last), "")
    part, state = taken if averages else "", _tensors(content[taken] if taken else content)
    if not state:
        raise DimoError(f"{path} holds no state dict; give the checkpoint of a network")
    if all(_WRAPPERS.match(key) for key in state):
        state = {_WRAPPERS.sub("", key, count=1): value for key, value in state.items()}
    if _is_safetensors(files[0]):
        return Checkpoint(state, part, load_metadata(files[0]))
    settings = content.get("dimo")
    return Checkpoint(state, part, settings if isinstance(settings, dict) else {})


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, without what stands beside them; {}: it is none."""
    found = content.items() if isinstance(content, dict) else ()
    state = {key: value for key, value in found if isinstance(value, Tensor)}
    return state if all(isinstance(key, str) for key in state) else {}


def sha256_weights(path: Path) -> str:
    """Hex SHA-256 of the file at `path`; of shards, that of their hashes."""
    digests = [sha256_file(file) for file in weights_files(path)]
    return digests[0] if len(digests) == 1 else sha256_bytes("".join(digests).encode())


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _content(path: Path) -> Any:
    if problem := _misnamed(path):
        raise DimoError(f"cannot read weights {path}: {problem}")
    try:
        return safetensors.torch.load_file(path) if _is_safetensors(path) else _unpickled(path)
    except Exception as error:  # a damaged pickle raises anything from KeyError to struct.error
        problem = f"{_reason(error)}; fetch the file again"
        if named := _named_class(error):
            snippet = _STRIP.replace("OLD", str(path))
            problem = (
                f"it holds objects of {named}, which no official checkpoint has; if you trust its "
                f'author, keep its tensors alone with: python -c "{snippet}"'
            )
        raise DimoError(f"cannot read weights {path}: {problem}") from error


def _misnamed(path: str | PathLike[str]) -> str:
    """What a file is that is no weights, or not of the format its name says; "" if it may be."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except OSError:
        return ""  # whoever reads it says why it cannot
    text = b"" if b"\0" in head else head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; fetch that with: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "it is a web page, not the file; fetch it again by the link of its download button"
    if text.startswith((b"{", b"[")):
        return "it is a JSON text; give the file of weights that belongs to it"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed (gzip, bzip2, xz or zstd); decompress it first"
    if _is_safetensors(path) and head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return f"it is a PyTorch pickle; rename it, e.g. to {path.stem}.pth"
    is_named_otherwise = not _is_safetensors(path) and head[8:9] == b"{"
    if is_named_otherwise and int.from_bytes(head[:8], "little") < size:
        return f"it is a safetensors file; rename it to {path.stem}.safetensors"
    return ""


def _unpickled(path: Path) -> Any:
    """What a pickle holds, with stand-ins for the objects beside the tensors."""
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(v, k) for k, v in stand_ins.items()]):
                # Mapped, an optimizer's state beside the network is never read from disk.
                mapped = zipfile.is_zipfile(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            name = _named_class(error)  # one at a time
            package, _, last = name.rpartition(".")
            known = package.partition(".")[0] in _INERT_PACKAGES or name in _INERT_TYPES
            if not known or (name := f"{package or 'builtins'}.{last}") in stand_ins:
                raise
            stand_ins[name] = _InertMapping if last in _INERT_MAPPINGS else _Inert


def _named_class(error: Exception) -> str:
    """The class or function that PyTorch refused to unpickle; built-in ones have no package."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return named[1]
    return "classes like dict or list" if "Can only" in str(error) else ""


def _reason(error: Exception) -> str:
    if not str(error):
        return type(error).__name__
    return str(error).splitlines()[0].partition(". ")[0]  # PyTorch adds guesses at the cause


def looks_like(keys: Iterable[str]) -> str | None:
    """The kind of network whose state dict has these keys; None: not one of `KINDS`."""
    present = set(keys)
    return next((kind for key, kind in KINDS.items() if key in present), None)


def load_state_dict(
    model: nn.Module,
    source: str | PathLike[str] | dict[str, Tensor],
    *,
    name: str | None = None,
    ignore: tuple[str, ...] = (),
) -> None:
    """Loads a weights file or a state dict in place, if it passes `check_state`.

    Raises:
        DimoError: As `check_state`, or the file cannot be read.
    """
    if not isinstance(source, dict):
        name = name or str(source)
        source = read_state_dict(source)
    model.load_state_dict(check_state(model, source, name=name, ignore=ignore), strict=True)


def check_state(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    name: str | None = None,
    ignore: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The part of `state` that is not ignored, if it is finite and each key and shape fits.

    Args:
        model: It may be on the meta device. Of its tied tensors, one may be missing in `state`.
        name: Of the state dict, for errors.
        ignore: Keys that start with one of these are left out.

    Raises:
        DimoError: Says which other kind of network the weights belong to, how many keys are
            missing, unexpected or of another shape, with examples, or which are whole numbers or
            not finite.
    """
    own = model.state_dict(keep_vars=True)
    given, needed = looks_like(state), looks_like(own)
    if given and needed and given != needed:
        raise DimoError(
            f"weights {name or 'given'} look like those of a {given}, but a {needed} is needed; "
            "give the other file"
        )
    state = {key: value for key, value in state.items() if not key.startswith(ignore)}
    tied = _tied(own)
    for pair in tied:  # writers of safetensors leave one of them out
        for key, other in (pair, pair[::-1]):
            if key not in state and other in state:
                state[key] = state[other]
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    wrong = (("missing", missing), ("unexpected", unexpected), ("of other shape", shapes))
    parts = [f"{len(k)} {what} ({_example(k, own, state)})" for what, k in wrong if k]
    if parts:
        raise DimoError(
            f"weights {name or 'given'} do not fit {type(model).__name__}: "
            f"keys {', '.join(parts)}; check that file and configuration belong together"
        )
    for key, value in own.items():
        if value.is_floating_point() and not state[key].is_floating_point():
            raise DimoError(
                f"weights {name or 'given'}: {key} is {state[key].dtype}, but {value.dtype} or "
                "another floating-point type is needed; give the file before it was quantized"
            )
    check_finite(state, name or "given")
    for first, second in tied:
        if not torch.equal(state[first], state[second]):
            raise DimoError(
                f"weights {name or 'given'}: {first} and {second} are one tensor of "
                f"{type(model).__name__}, but differ here; the file is damaged or of another code"
            )
    return state


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Refuses weights with NaN or infinite values, which draw one pattern and still get a score."""
    bad = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise DimoError(
            f"weights {name} hold values that are not finite, in {', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}; their training diverged or the file is damaged: "
            "give another file, or fetch or convert it again"
        )


def _tied(state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of keys that are one tensor in memory: the first of its kind, and another."""
    filled = {k: v for k, v in state.items() if v.numel()}
    place = {k: id(v) if v.is_meta else v.data_ptr() for k, v in filled.items()}
    first: dict[int, str] = {}
    pairs = [(first.setdefault(place[key], key), key) for key in filled]
    return [(one, other) for one, other in pairs if one != other]


def _example(keys: list[str], own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    text = key = keys[0]
    if key in own and key in given:
        text = f"{key}: {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
    return text + (", ..." if len(keys) > 1 else "")


def save_tensors(
    path: str | PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Writes a safetensors file atomically; `metadata` is stored as JSON under the key `dimo`."""
    header = {"dimo": json.dumps(metadata, sort_keys=True)} if metadata is not None else None
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    for _, key in _tied(contiguous):
        contiguous[key] = contiguous[key].clone()  # the format has no shared tensors
    with replacing(path) as temporary:
        try:  # straight to disk: mapped tensors are never all in memory
            safetensors.torch.save_file(contiguous, temporary, metadata=header)
        except safetensors.SafetensorError as error:
            raise DimoError(
                f"cannot write {path}: {error}; free space or choose another folder"
            ) from error


def save_pickle(path: str | PathLike[str], content: dict[str, Any]) -> None:
    """Writes a PyTorch pickle atomically: the same bytes for the same content."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # a full disk, among others
            reason = getattr(error.__context__, "strerror", None) or _reason(error)
            raise DimoError(
                f"cannot write {path}: {reason}; free space or choose another folder"
            ) from error


def load_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON that `save_tensors` stored; empty when the file has none."""
    with _opened(path, "weights ", "fetch or convert the file again") as (_, metadata):
        return metadata


def read_tensors(
    path: str | PathLike[str], *, next_step: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: the tensors, mapped from disk, and the metadata.

    Raises:
        DimoError: The file is missing, damaged or no safetensors file; says `next_step`.
    """
    with _opened(path, "", next_step) as (file, metadata):
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


@contextmanager
def _opened(
    path: str | PathLike[str], what: str, next_step: str
) -> Iterator[tuple[Any, dict[str, Any]]]:
    if problem := _misnamed(path):
        raise DimoError(f"cannot read {what}{path}: {problem}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file, dict(json.loads((file.metadata() or {}).get("dimo", "{}")))
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise DimoError(f"cannot read {what}{path}: {_reason(error)}; {next_step}") from error


def state_sha256(state: dict[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and values; independent of file format and key order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
