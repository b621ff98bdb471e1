"""Loading weights safely and strictly; saving them with their provenance.

Only this module calls safetensors and `torch.load`. Pickles load with `weights_only=True`, and an
inert object replaces whatever official files contain beside tensors. Every key and shape must fit;
otherwise the error says which do not, or what the file looks like instead.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.util.files import replacing

# The key of the network in a trainer's checkpoint: Maskgit-pytorch and di4c, VQGAN, LlamaGen.
_CONTAINERS = ("model_state_dict", "state_dict", "model")
# The prefix that torch.compile and DistributedDataParallel give every key.
_WRAPPERS = re.compile(r"(_orig_mod\.|module\.)+")

# Classes that official files name beside their tensors. None of them is ever imported or called.
_INERT_CLASSES = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
_INERT_MAPPING = "pytorch_lightning.utilities.parsing.AttributeDict"

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
    """Replaces an object of `_INERT_CLASSES` in a file, without its content."""

    def __init__(self, *_: object) -> None: ...

    def __new__(cls, *_: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None: ...


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Reads the network of a `.safetensors` or of an official checkpoint pickle to CPU.

    Raises:
        DimoError: A file that is missing, unreadable or names classes that no official file has.
    """
    path = Path(path)
    if not path.is_file():
        raise DimoError(f"no weights file at {path}; give the path of a checkpoint file")
    try:
        content = _read(path)
    except Exception as error:  # a damaged pickle raises anything from KeyError to struct.error
        raise DimoError(
            f"cannot read weights {path}: {_reason(error)}; "
            "fetch the file again, or convert it to safetensors"
        ) from error
    with suppress(KeyError, TypeError, IndexError):  # the EMA in a checkpoint of a run
        content = content["task"]["networks"]["ema"]
    if isinstance(content, dict):
        containers = (content.get(key) for key in _CONTAINERS)
        content = next((inner for inner in containers if isinstance(inner, dict)), content)
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise DimoError(f"{path} holds no state dict; give the checkpoint of a network")
    if all(_WRAPPERS.match(key) for key in content):
        content = {_WRAPPERS.sub("", key, count=1): value for key, value in content.items()}
    return content


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    stand_ins: list[Any] = [(dict, _INERT_MAPPING), *((_Inert, name) for name in _INERT_CLASSES)]
    with torch.serialization.safe_globals(stand_ins):
        # Mapped, an optimizer's state beside the network is never read from disk.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _reason(error: Exception) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and named:
        return f"it holds objects of {named[1]}, which no official checkpoint has"
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
        model: It may be on the meta device.
        name: Of the state dict, for errors.
        ignore: Keys that start with one of these are left out.

    Raises:
        DimoError: Says which other kind of network the weights belong to, how many keys are
            missing, unexpected or of another shape, with examples, or which are not finite.
    """
    own = model.state_dict(keep_vars=True)
    given, needed = looks_like(state), looks_like(own)
    if given and needed and given != needed:
        raise DimoError(
            f"weights {name or 'given'} look like those of a {given}, but a {needed} is needed; "
            "give the other file"
        )
    state = {key: value for key, value in state.items() if not key.startswith(ignore)}
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
    check_finite(state, name or "given")
    for first, second in _tied(own):
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
