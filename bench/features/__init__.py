"""uint8 images -> features: loading extractors, each pinned by the hash of its weights.

`bench.protocol.catalog` lists the extractors; importing this package loads no extractor's library.
"""

__all__ = [
    "FORWARD_BATCH",
    "Extractor",
    "Features",
    "extract",
    "extract_batches",
    "is_torchscript",
    "join_features",
    "load_extractor",
    "load_torchscript",
]

import functools
import importlib.metadata
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from bench.features.extraction import (
    FORWARD_BATCH,
    Extractor,
    Features,
    Networks,
    extract,
    extract_batches,
    join_features,
)
from bench.protocol.catalog import ANY, load
from bench.protocol.networks import EXTRACTORS
from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_bytes, sha256_file
from dimo.weights.catalog import default_folder, find
from dimo.weights.files import check_finite, read_state_dict


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive; a plain checkpoint has no `constants.pkl`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """Loads an archive, which brings its own code, to the CPU in evaluation mode.

    Raises: DimoError: The file is damaged, no TorchScript archive, or has weights that are not
        finite.
    """
    try:
        with warnings.catch_warnings():
            # PyTorch advises its users against writing such files; these exist.
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            module: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location="cpu"
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DimoError(
            f"cannot read the TorchScript archive {path}: {reason}; fetch the file again"
        ) from error
    check_finite(module.state_dict(), str(path))
    return module.eval()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a TorchScript archive, or of a file as `read_state_dict` takes it."""
    if is_torchscript(path):
        return load_torchscript(path).state_dict()
    return read_state_dict(path)


def load_extractor(
    name: str,
    *,
    resize: str = "",
    sha256: str,
    weights: Path | None = None,
    device: torch.device,
    allow_code: bool = False,
) -> Extractor:
    """Loads an extractor whose weights have the hash that the protocol names.

    Args:
        name: Of `EXTRACTORS`, or "package.module:attribute" for custom code: `attribute(weights:
            Path | None) -> nn.Module` returns the network that `Extractor` describes; outputs other
            than "features" are listed in its attribute `outputs`.
        resize: How images reach the input size; empty for the extractor's first.
        sha256: Expected hash of the weights file; "any" accepts any file and records its hash.
        weights: The weights file, where dimo ships none.
        allow_code: Allow code that is neither dimo's nor named by a hash that dimo knows.

    Of a row of several networks `weights` is the folder of their official files (None: the one that
    `dimo weights fetch` fills), and `sha256` the hash of their hashes.

    Raises: DimoError: Unknown extractor or resize, wrong or missing weights, code that is not
        allowed, or a library that is not installed.
    """
    if ":" in name:
        return _load_foreign(name, resize, sha256, weights, device, allow_code)
    if name not in EXTRACTORS:
        raise unknown_name(
            "extractor", name, EXTRACTORS, "or name your own as package.module:function"
        )
    kind = EXTRACTORS[name]
    if kind.parts:
        return _load_parts(name, weights, sha256, device, allow_code)
    resize = resize or (kind.resizes[0] if kind.resizes else "")
    if resize and resize not in kind.resizes:
        raise unknown_name(f"resize of extractor {name!r}", resize, kind.resizes or ("none",))
    weights = weights or kind.shipped
    if weights is None:
        raise DimoError(
            f"extractor {name!r} needs its weights file ({kind.weights}); fetch it and give it "
            "with --extractor-weights FILE"
        )
    digest = _checked_sha256(name, weights, sha256)
    if digest != kind.archive_sha256 and not allow_code and is_torchscript(weights):
        raise DimoError(
            f"{weights} is a TorchScript archive, which brings its own code, and none that dimo "
            f"knows (sha256 {digest[:12]}...); add --allow-code if you trust it"
        )
    try:
        network: nn.Module = load(kind.loader)(weights, resize)
    except ModuleNotFoundError as error:
        raise DimoError(
            f"extractor {name!r} needs the package {error.name!r}; install it with: "
            "pip install dimo"
        ) from error
    return Extractor(
        name=name,
        resize=resize,
        network=network.to(device).eval(),
        sha256=digest,
        packages=_versions(*kind.packages),
        outputs=kind.outputs,
        device=device,
        image_size=kind.image_size,
    )


def _load_parts(
    name: str, weights: Path | None, sha256: str, device: torch.device, allow_code: bool
) -> Extractor:
    """An extractor whose features are those of several rows of `EXTRACTORS` side by side."""
    kind, folder = EXTRACTORS[name], weights or default_folder()
    parts: dict[str, Extractor] = {}
    for part, (row, resize) in kind.parts.items():
        path = EXTRACTORS[row].shipped or find(row, folder)
        if path is None:
            fetched = " ".join(row for row, _ in kind.parts.values())
            raise DimoError(
                f"extractor {name!r} finds no {EXTRACTORS[row].weights.partition(',')[0]} in "
                f"{folder}; fetch its files with: dimo weights fetch {fetched}; or give the folder "
                "that holds all of them with --extractor-weights FOLDER"
            )
        parts[part] = load_extractor(
            row, resize=resize, sha256=ANY, weights=path, device=device, allow_code=allow_code
        )
    digest = sha256_bytes("".join(part.sha256 for part in parts.values()).encode())
    _check_sha256(name, folder, digest, sha256)
    network = Networks({part: loaded.network for part, loaded in parts.items()})
    return Extractor(
        name=name,
        resize="",
        network=network.eval(),
        sha256=digest,
        packages={k: v for part in parts.values() for k, v in part.packages.items()},
        outputs=kind.outputs,
        device=device,
        image_size=kind.image_size,
        columns=network.columns,
    )


def _load_foreign(
    name: str,
    resize: str,
    sha256: str,
    weights: Path | None,
    device: torch.device,
    allow_code: bool,
) -> Extractor:
    if not allow_code:
        raise DimoError(
            f"extractor {name!r} is code that is not dimo's; add --allow-code if you trust it"
        )
    if resize:
        raise DimoError(f"extractor {name!r} resizes by itself, not {resize!r}; leave resize out")
    if weights is None and sha256 != ANY:
        raise DimoError(
            f"extractor {name!r} has no weights file, the protocol names sha256 {sha256[:12]}...; "
            "give it with --extractor-weights FILE"
        )
    digest = "" if weights is None else _checked_sha256(name, weights, sha256)
    try:
        factory = load(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DimoError(
            f"cannot load extractor {name!r}: {error}; name it as package.module:function and "
            "install the package, or put its folder on PYTHONPATH"
        ) from error
    network = factory(weights)
    if not isinstance(network, nn.Module):
        raise DimoError(
            f"extractor {name!r} gave a {type(network).__name__}; allowed: torch.nn.Module; "
            "let the function return the network"
        )
    module = name.partition(":")[0]
    package = module.partition(".")[0]
    distributions = importlib.metadata.packages_distributions().get(package, [])
    return Extractor(
        name=name,
        resize="",
        network=network.to(device).eval(),
        sha256=sha256_bytes(f"{digest} {_code_sha256(factory, module)}".encode()),
        packages=_versions(*distributions),
        outputs=tuple(getattr(network, "outputs", ("features",))),
        device=device,
    )


@functools.cache
def _code_sha256(factory: object, module: str) -> str:
    """Hash of the code that a custom extractor was loaded from, while `factory` is the same object.

    That is its module and what is loaded from the same folder, or from its package.
    """
    top = sys.modules[module.partition(".")[0]]
    file = Path(str(sys.modules[module].__file__))
    folder = Path(next(iter(top.__path__))) if hasattr(top, "__path__") else file.parent
    loaded = {str(getattr(each, "__file__", None)) for each in list(sys.modules.values())}
    files = {Path(name) for name in loaded if name.endswith(".py")}
    near = {path for path in files if path.is_relative_to(folder) and _is_custom(path)}
    return sha256_bytes("".join(map(sha256_file, sorted(near | {file}))).encode())


def _is_custom(path: Path) -> bool:
    """Whether a file is neither of dimo nor of an installed package."""
    own = Path(__file__).parents[2]
    return "site-packages" not in path.parts and not any(
        path.is_relative_to(own / name) for name in ("bench", "dimo")
    )


def _checked_sha256(name: str, weights: Path, sha256: str) -> str:
    if not weights.is_file():
        raise DimoError(
            f"extractor {name!r} finds no weights file at {weights}; "
            "give it with --extractor-weights FILE"
        )
    digest = sha256_file(weights)
    _check_sha256(name, weights, digest, sha256)
    return digest


def _check_sha256(name: str, weights: Path, digest: str, sha256: str) -> None:
    if sha256 not in (ANY, digest):
        raise DimoError(
            f"weights {weights} of extractor {name!r} have sha256 {digest[:12]}..., the protocol "
            f"names {sha256[:12]}...; use the weights that belong to the protocol's version"
        )


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("torch", *packages)}
