"""Official pickles -> safetensors that say where they come from.

Is a weights file whole, the published one, and of the network it is taken for?
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
from dimo.models.llamagen_vq import LlamaGenVQ
from dimo.models.maskgit import MaskGIT
from dimo.models.meissonic import Meissonic
from dimo.models.vqgan import TRAINING_KEYS, VQGAN, read_config
from dimo.util.files import sha256_file
from dimo.weights.catalog import OFFICIAL, find, name_of
from dimo.weights.download import recorded_sha256
from dimo.weights.files import (
    KINDS,
    VQGAN_KIND,
    check_state,
    load_metadata,
    looks_like,
    read_state_dict,
    save_tensors,
    state_sha256,
)


def convert(
    path: Path, out: Path, *, config: Path | None = None, force: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Writes the network of a checkpoint, without what only its training needs.

    The tensors keep their official names and bits; they are mapped, so that memory holds one at a
    time where the checkpoint is a zip file, as PyTorch has written them since 1.6.

    Args:
        path: An official checkpoint.
        out: Folder of the result, which has the checkpoint's name and ends in `.safetensors`.
        config: The `model.yaml` of a VQGAN; None: the one beside the checkpoint.
        force: Replace a result that exists.

    Returns:
        The result and the metadata in it: source_file, source_sha256, kind, state_sha256,
        dropped (number of tensors left out) and, for a VQGAN, config.

    Raises:
        DimoError: A file that is unreadable, converted already or of no known network; a result
            that exists or cannot be written; a configuration that is missing or does not fit.
    """
    if path.suffix == ".safetensors" and path.is_file():
        origin = load_metadata(path).get("source_file")
        raise DimoError(
            f"{path} is safetensors already{f', converted from {origin}' if origin else ''}; "
            "use it as it is"
        )
    result = out / Path(path.name).with_suffix(".safetensors")
    if result.exists() and not force:
        raise DimoError(f"{result} exists; replace it with --force or choose another folder")
    state = read_state_dict(path)
    kind = looks_like(state)
    if kind is None:
        raise DimoError(
            f"{path} holds no network that dimo knows ({len(state)} tensors, e.g. "
            f"{next(iter(state), 'none')}); allowed: {', '.join(KINDS)}"
        )
    metadata: dict[str, Any] = {"source_file": path.name, "kind": kind}
    kept = state
    if kind == VQGAN_KIND:
        metadata["config"] = read_config(path, config)
        with torch.device("meta"):
            network = VQGAN(**metadata["config"])
        kept = check_state(network, state, name=str(path), ignore=TRAINING_KEYS)
    elif config is not None:
        raise DimoError(f"--config is for a {VQGAN_KIND}, but {path} holds a {kind}; leave it out")
    metadata["dropped"] = len(state) - len(kept)
    metadata["source_sha256"] = sha256_file(path)
    metadata["state_sha256"] = state_sha256(kept)
    save_tensors(result, kept, metadata)
    return result, metadata


_ROUNDING = 0.01  # published sizes have three digits
_NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "maskgit-256": MaskGIT,
    "maskgit-512": partial(MaskGIT, img_size=512),
    "dimo-maskgit": MaskGIT,
    "di4c-d": Di4CStudent,
    "llamagen-vq16": LlamaGenVQ,
    "meissonic": Meissonic,
    **{
        f"halton-{size}-{side}": partial(HaltonMaskGIT, **SIZES[size], input_size=side // 16)
        for size in SIZES
        for side in (256, 384)
        if f"halton-{size}-{side}" in OFFICIAL
    },
}


@dataclass
class Finding:
    """What is found out about one file.

    Attributes:
        name: Its official name, else its path.
        path: Where it lies; None if it is missing.
        size: Bytes.
        sha256: Of the file.
        origin: What the hash was compared with: "published", "recorded" when it was fetched,
            "converted" (then the hash of the tensors in it was compared), or "not known".
        structure: What is in it.
        problems: What is wrong; empty if nothing is.
    """

    name: str
    path: Path | None = None
    size: int = 0
    sha256: str = ""
    origin: str = "not known"
    structure: str = ""
    problems: list[str] = field(default_factory=list)


def verify(names: Sequence[str], folder: Path) -> list[Finding]:
    """Checks official files by name, and any others by path.

    Args:
        names: Keys of `OFFICIAL` or paths; none: every official file that is in the folder.
        folder: Where official files are looked for.

    Raises:
        DimoError: A name that is neither; no names, and no official file in the folder.
    """
    if not names:
        names = [name for name in OFFICIAL if find(name, folder)]
        if not names:
            raise DimoError(
                f"no official file is in {folder}; name its folder with --folder, or fetch some: "
                "dimo weights list"
            )
    return [_verify(name, folder) for name in names]


def _verify(name: str, folder: Path) -> Finding:
    if name in OFFICIAL:
        path = find(name, folder)
        if path is None:
            missing = f"missing in {folder}; fetch it with: dimo weights fetch {name}"
            return Finding(name, problems=[missing])
        return _check(Finding(name, path), name, path)
    path = Path(name)
    if not path.is_file():
        raise unknown_name("weights", name, OFFICIAL, "or give the path of a file that exists")
    return _check(Finding(name, path), name_of(path), path)


def _check(finding: Finding, official: str | None, path: Path) -> Finding:
    finding.size, finding.sha256 = path.stat().st_size, sha256_file(path)
    try:
        _identity(finding, official, path)
        _structure(finding, official, path)
    except DimoError as error:
        finding.problems.append(str(error))
    return finding


def _identity(finding: Finding, official: str | None, path: Path) -> None:
    """Compares size and hash with what is known of them."""
    published = OFFICIAL[official].sha256 if official else ""
    origin = load_metadata(path) if path.suffix == ".safetensors" else {}
    if "state_sha256" in origin:
        finding.origin = "converted"
        if published and origin.get("source_sha256") != published:
            finding.problems.append(
                f"converted from a file of sha256 {origin.get('source_sha256')}, but {published} "
                "is published; fetch and convert it again"
            )
        return
    size = OFFICIAL[official].size if official else None
    if path.suffix == ".safetensors":
        published, size = "", None  # of the official file; this one is of another format
    if size is not None and abs(finding.size - size) > _ROUNDING * size:
        finding.problems.append(f"{finding.size:,} bytes, but {size:,} are published")
    recorded = recorded_sha256(path)
    for origin_name, expected in (("recorded", recorded), ("published", published)):
        if expected:
            finding.origin = origin_name
            if expected != finding.sha256:
                finding.problems.append(
                    f"sha256 {finding.sha256}, but {expected} is {origin_name}; remove the file "
                    "and fetch it again"
                )


def _structure(finding: Finding, official: str | None, path: Path) -> None:
    """Accounts for every key and shape, as far as the network is known."""
    if path.suffix in (".yaml", ".yml"):
        config = read_config(path, path)
        finding.structure = f"configuration of a VQGAN with {config['n_embed']} codes"
        return
    if official and official != "maskgit-vqgan" and official not in _NETWORKS:
        finding.structure = "keys are checked when the extractor is loaded"
        return
    state = read_state_dict(path)
    kind = looks_like(state)
    numbers = sum(value.numel() for value in state.values())
    finding.structure = f"{len(state)} tensors, {numbers:,} numbers"
    with torch.device("meta"):
        network = _network(official, kind, state, path)
    if network is None:
        looks = f"looks like a {kind}" if kind else "of no network that dimo knows"
        finding.structure += f", {looks}; keys not checked"
    else:
        ignore = TRAINING_KEYS if kind == VQGAN_KIND else ()
        state = check_state(network, state, name=str(path), ignore=ignore)
        finding.structure += f", every key and shape of the {kind}"
    if finding.origin == "converted":
        converted = load_metadata(path)["state_sha256"]
        if state_sha256(state) != converted:
            finding.problems.append("its tensors are not those that were converted; convert again")


def _network(
    official: str | None, kind: str | None, state: Mapping[str, Tensor], path: Path
) -> nn.Module | None:
    """The network, empty, whose keys the file must have; None if its sizes are not known."""
    if official is not None and official in _NETWORKS:
        return _NETWORKS[official]()
    if official == "maskgit-vqgan" or (kind == VQGAN_KIND and _has_config(path)):
        return VQGAN(**read_config(path))
    if kind in ("MaskGIT v1.0 transformer", "di4c student"):
        build = MaskGIT if kind.startswith("MaskGIT") else Di4CStudent
        return build(**_maskgit_sizes(state))
    return None


def _has_config(path: Path) -> bool:
    stored = path.suffix == ".safetensors" and "config" in load_metadata(path)
    return stored or path.with_name("model.yaml").is_file()


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
