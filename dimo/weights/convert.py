"""Official checkpoints: pickles converted to safetensors, and files checked.

`convert` keeps the network's tensors and records their source. `check` tells whether a file is
complete, the published one, and of the network it is used for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dimo.errors import DimoError, unknown_name
from dimo.methods.di4c.network import Di4CStudent
from dimo.models.halton import SIZES, HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.vqgan import TRAINING_KEYS, VQGAN, read_config
from dimo.weights.catalog import (
    OFFICIAL,
    OfficialFile,
    default_folder,
    find,
    name_of,
    weights_files,
)
from dimo.weights.download import recorded_sha256
from dimo.weights.files import (
    DI4C_KIND,
    KINDS,
    MASKGIT_KIND,
    VQGAN_KIND,
    check_finite,
    check_state,
    load_metadata,
    looks_like,
    read_weights,
    save_tensors,
    sha256_weights,
    state_sha256,
)
from dimo.zoo.loading import student_architecture
from dimo.zoo.students import PUBLISHED_STUDENTS
from dimo.zoo.teachers import TEACHERS


def convert(
    path: Path,
    out: Path,
    *,
    config: Path | None = None,
    force: bool = False,
    ema: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Writes the network of a checkpoint, whole or in shards, without what only training needs.

    The tensors keep their official names and bits. Memory holds one at a time if the checkpoint is
    a zip file, as PyTorch has written them since 1.6.

    Args:
        out: Folder of the result, which has the checkpoint's name and the suffix `.safetensors`.
        config: The `model.yaml` of a VQGAN; None: the one beside the checkpoint.
        ema: As for `dimo.weights.files.read_weights`.

    Returns:
        The result and the metadata in it: source_file, source_sha256, kind, state_sha256, part (as
        in `Checkpoint`), dropped (number of tensors left out) and, for a VQGAN, config.

    Raises:
        DimoError: A file that is unreadable, converted already or of no known network; a result
            that exists or cannot be written; a configuration that is missing or does not fit.
    """
    files = weights_files(path)
    if len(files) == 1 and files[0].suffix == ".safetensors":
        origin = load_metadata(files[0]).get("source_file")
        raise DimoError(
            f"{files[0]} is safetensors already{f', converted from {origin}' if origin else ''}; "
            "use it as it is"
        )
    name = files[0].name if len(files) == 1 else files[0].name.partition("-00001-of-")[0] + ".bin"
    result = out / Path(name).with_suffix(".safetensors")
    if result.exists() and not force:
        raise DimoError(f"{result} exists; replace it with --force or choose another folder")
    found = read_weights(path, ema=ema)
    state = found.state
    kind = looks_like(state) or _kind_by_teacher(state)
    if kind is None:
        raise DimoError(
            f"{path} holds no network that dimo knows ({len(state)} tensors, e.g. "
            f"{next(iter(state), 'none')}); allowed: {', '.join(KINDS.values())}"
        )
    metadata: dict[str, Any] = {"source_file": path.name, "kind": kind, "part": found.part}
    kept = state
    if kind == VQGAN_KIND:
        metadata["config"] = read_config(path, config)
        with torch.device("meta"):
            network = VQGAN(**metadata["config"])
        kept = check_state(network, state, name=str(path), ignore=TRAINING_KEYS)
    elif config is not None:
        raise DimoError(f"--config is for a {VQGAN_KIND}, but {path} holds a {kind}; leave it out")
    check_finite(kept, str(path))
    metadata["dropped"] = len(state) - len(kept)
    metadata["source_sha256"] = sha256_weights(path)
    metadata["state_sha256"] = state_sha256(kept)
    save_tensors(result, kept, metadata)
    return result, metadata


_ROUNDING = 0.01  # published sizes have three digits


@dataclass
class Finding:
    """The result of checking one file.

    `origin` is what the hash was compared with: "published", "recorded" when it was fetched,
    "converted" (the hash of its tensors was compared), or "not known".
    """

    name: str  # the official name, else the path
    path: Path | None = None  # None if it is missing
    size: int = 0  # bytes
    sha256: str = ""
    origin: str = "not known"
    structure: str = ""  # what it contains
    problems: list[str] = field(default_factory=list)


def check(names: Sequence[str], folder: Path | None) -> list[Finding]:
    """Checks files by official name or path; without names, every official file in the folder.

    The folder is as in `dimo.weights.catalog.locate`.

    Raises:
        DimoError: A name that is neither; no names, and no official file in the folder.
    """
    names = names or [name for name in OFFICIAL if find(name, folder)]
    if not names:
        raise DimoError(
            f"no official file is in {folder or default_folder()}; name its folder with --folder, "
            "or fetch some: dimo weights list"
        )
    return [_check(name, folder) for name in names]


def _check(name: str, folder: Path | None) -> Finding:
    path = find(name, folder) if name in OFFICIAL else Path(name)
    if path is None:
        missing = (
            f"missing in {folder or default_folder()}; fetch it with: dimo weights fetch {name}"
        )
        return Finding(name, problems=[missing])
    if not path.exists():
        raise unknown_name("weights", name, OFFICIAL, "or give the path of a file that exists")
    official = name if name in OFFICIAL else name_of(path)
    finding = Finding(name, path)
    try:
        finding.size = sum(file.stat().st_size for file in weights_files(path))
        finding.sha256 = sha256_weights(path)
        _check_identity(finding, OFFICIAL.get(official or ""), path)
        _check_structure(finding, official or path.name, path)
    except DimoError as error:
        finding.problems.append(str(error))
    return finding


def _check_identity(finding: Finding, official: OfficialFile | None, path: Path) -> None:
    """Compares size and hash with what is published, or was recorded when it was fetched."""
    published, size = (official.sha256, official.size) if official else ("", None)
    if path.suffix == ".safetensors":
        origin = load_metadata(path)
        if "state_sha256" in origin:
            finding.origin = "converted"
            if published and origin.get("source_sha256") != published:
                finding.problems.append(
                    f"converted from a file of sha256 {origin.get('source_sha256')}, but "
                    f"{published} is published; fetch and convert it again"
                )
            return
        published, size = "", None  # those of the official file, which has another format
    if size is not None and abs(finding.size - size) > _ROUNDING * size:
        finding.problems.append(f"{finding.size:,} bytes, but {size:,} are published")
    for origin_name, expected in (("recorded", recorded_sha256(path)), ("published", published)):
        if expected:
            finding.origin = origin_name
            if expected != finding.sha256:
                finding.problems.append(
                    f"sha256 {finding.sha256}, but {expected} is {origin_name}; remove the file "
                    "and fetch it again"
                )


def _check_structure(finding: Finding, name: str, path: Path) -> None:
    """Accounts for every key and shape, if the network is known."""
    networks, loaders = official_networks(), _loaders()
    if path.suffix in (".yaml", ".yml"):
        codes = read_config(path, path)["n_embed"]
        finding.structure = f"configuration of a VQGAN with {codes} codes"
        return
    if path.suffix in (".json", ".txt") and not path.name.endswith(".index.json"):
        finding.structure = "text; its content is checked when the network beside it is loaded"
        return
    if name in OFFICIAL and name not in networks and name not in loaders:
        finding.structure = "keys are checked when the feature extractor is loaded"
        return
    found = read_weights(path)
    state, kind = found.state, looks_like(found.state)
    numbers = sum(value.numel() for value in state.values())
    part = f" of its {found.part!r}" if found.part else ""
    finding.structure = f"{len(state)} tensors{part}, {numbers:,} numbers"
    if name in loaders:
        loaders[name](path)
        finding.structure += f", every key and shape of the {kind or 'network'}"
    elif network := _network(name, kind, state, path):
        ignore = TRAINING_KEYS if kind == VQGAN_KIND else ()
        state = check_state(network, state, name=str(path), ignore=ignore)
        finding.structure += f", every key and shape of the {kind or type(network).__name__}"
    else:
        check_finite(state, str(path))
        looks = f"looks like a {kind}" if kind else "of no network that dimo knows"
        finding.structure += f", {looks}; keys not checked"
    if finding.origin == "converted":
        converted = load_metadata(path)["state_sha256"]
        if state_sha256(state) != converted:
            finding.problems.append("its tensors are not those that were converted; convert again")


def official_networks() -> dict[str, Callable[[], nn.Module]]:
    """Builds the transformer of each official or bundled file, by name."""
    networks: dict[str, Callable[[], nn.Module]] = {
        f"halton-{size}-384": partial(HaltonMaskGIT, **SIZES[size], input_size=24)
        for size in ("small", "base")  # published, but no teachers
    }
    for row in TEACHERS.values():
        networks[row.weights["transformer"]] = partial(row.architecture, **row.network)
    for name, student in PUBLISHED_STUDENTS.items():
        row = TEACHERS[student.teacher]
        networks[name] = partial(student_architecture(row, student.method), **row.network)
    return networks


def _loaders() -> dict[str, Callable[[Path], Any]]:
    """Loads each tokenizer and text encoder, by name; every key and shape must fit."""
    loaders: dict[str, Callable[[Path], Any]] = {}
    for row in TEACHERS.values():
        loaders[row.weights["tokenizer"]] = row.tokenizer
        if row.text is not None and "text" in row.weights:
            loaders[row.weights["text"]] = row.text.encoder
    return loaders


def _network(
    name: str, kind: str | None, state: Mapping[str, Tensor], path: Path
) -> nn.Module | None:
    """The network, on the meta device, that the file is for; None if its sizes are not known."""
    networks = official_networks()
    with torch.device("meta"):
        if name in networks:
            return networks[name]()
        if kind == VQGAN_KIND:
            stored = path.suffix == ".safetensors" and "config" in load_metadata(path)
            known = stored or path.with_name("model.yaml").is_file()
            return VQGAN(**read_config(path)) if known else None
        if kind == MASKGIT_KIND:
            return MaskGIT(**_maskgit_sizes(state))
        if kind == DI4C_KIND:
            return Di4CStudent(**_maskgit_sizes(state))
    return None


def _kind_by_teacher(state: Mapping[str, Tensor]) -> str | None:
    """The class of the teacher's network that has these keys and shapes."""
    shapes = {key: value.shape for key, value in state.items()}
    for row in TEACHERS.values():
        with torch.device("meta"):
            own = row.architecture(**row.network).state_dict()
        if {key: value.shape for key, value in own.items()} == shapes:
            return row.architecture.__name__
    return None


def _maskgit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments that give these shapes; {} (the official ones) where a needed key is missing.

    Heads, and where the vocabulary is split into codes and classes, change no shape.
    """
    try:
        vocabulary, width = state["tok_emb.weight"].shape
        side = math.isqrt(state["pos_emb"].shape[1] - 1)
        mlp_dim = len(state["transformer.layers.0.1.fn.net.0.weight"])
    except (KeyError, ValueError, IndexError):
        return {}
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.layers.")}
    return {
        "img_size": 16 * max(side, 1),
        "hidden_dim": width,
        "codebook_size": 1,
        "nclass": vocabulary - 3,
        "depth": len(layers),
        "heads": 1,
        "mlp_dim": mlp_dim,
    }
