"""Features on disk, named by all that determines them, so that a set is extracted once."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from bench.features import Extractor, Features
from dimo.errors import DimoError
from dimo.util.files import replacing, sha256_bytes, sha256_file, write_atomic
from dimo.util.schema import canonical_json

_OUTPUTS = ("features", "logits", "spatial")


def cache_folder(given: str = "") -> Path | None:
    """The folder of cached features.

    Args:
        given: A folder; "none": no cache; "": `$DIMO_CACHE`, or `dimo/features` in
            `$XDG_CACHE_HOME` (default: `~/.cache`).
    """
    given = given or os.environ.get("DIMO_CACHE", "")
    if given == "none":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "dimo" / "features"


def feature_key(content_sha256: str, extractor: Extractor, device: str) -> str:
    """Hash of all that determines features: images, weights, resize, versions, kind of device.

    Args:
        content_sha256: Hash of the images, in order.
        extractor: Its name, resize, weights hash and package versions enter the key.
        device: "cpu" or "cuda": their last digits differ.
    """
    parts: Mapping[str, object] = {
        "images": content_sha256,
        "extractor": extractor.name,
        "resize": extractor.resize,
        "weights": extractor.sha256,
        "packages": extractor.packages,
        "device": device,
    }
    return sha256_bytes(canonical_json(parts).encode())


class FeatureCache:
    """A folder of feature files. Problems with it cost time, never a result.

    An entry is `KEY.npz` and `KEY.json`, which holds the hash of the former, so that a truncated
    or altered entry is detected and extracted again.

    Args:
        folder: Where; None switches caching off.
        say: Called with one-line warnings about the folder or an entry.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say

    def get(self, key: str) -> Features | None:
        """The features of an intact entry, else None. Labels are not cached."""
        if self.folder is None:
            return None
        data, seal = self.folder / f"{key}.npz", self.folder / f"{key}.json"
        if not data.is_file() and not seal.is_file():
            return None
        try:
            if json.loads(seal.read_text())["sha256"] == sha256_file(data):
                with np.load(data, allow_pickle=False) as file:
                    return Features(**{output: file[output] for output in file.files})
            reason = "its content is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"it cannot be read ({type(error).__name__})"
        self.say(f"cache entry {data} is left out, {reason}; extracting again")
        return None

    def put(self, key: str, features: Features) -> None:
        """Stores features atomically; warns if the disk is full or the folder is read-only."""
        if self.folder is None:
            return
        arrays = {k: a for k in _OUTPUTS if (a := getattr(features, k)) is not None}
        path = self.folder / f"{key}.npz"
        try:
            with replacing(path) as temporary:
                with temporary.open("wb") as file:
                    np.savez(file, **arrays)
                digest = sha256_file(temporary)
            write_atomic(path.with_suffix(".json"), json.dumps({"sha256": digest}) + "\n")
        except DimoError as error:
            self.say(f"features are not cached (scores are not affected): {error}; see --cache")
