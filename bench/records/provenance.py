"""The commit and package versions that a result was made with."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dimo.util.files import sha256_file

_CODE = ("bench", "dimo", "protocols")  # what a commit must hold for a result to be repeatable
_PACKAGES = (
    "accelerate",
    "clean-fid",
    "dimo",
    "numpy",
    "open_clip_torch",
    "pillow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "timm",
    "torch",
    "torch-fidelity",
    "torchvision",
)


@dataclass(frozen=True)
class Revision:
    """Git commit of the code; `dirty` if code or protocols differed; None: not a checkout."""

    commit: str | None
    dirty: bool | None
    code_sha256: str | None = None  # of the Python files; None in older records


def package_versions() -> dict[str, str]:
    """Version by name, of Python and of the packages that numbers may depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def code_sha256(root: Path = Path(__file__).parents[2]) -> str:
    """Hash of the Python files of both packages, in a checkout or installed."""
    digest = hashlib.sha256()
    for path in sorted(path for name in ("bench", "dimo") for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def code_revision(file: Path = Path(__file__)) -> Revision:
    """Commit and state of the checkout of `file`, in `bench/records/`, if git tracks it."""
    file = file.resolve()
    root = file.parents[2]
    tracked = _git(root, "ls-files", "--", str(file))
    commit = _git(root, "rev-parse", "--verify", "HEAD") if tracked else None
    if commit is None:
        return Revision(commit=None, dirty=None, code_sha256=code_sha256(root))
    changes = _git(root, "status", "--porcelain", "--", *_CODE)
    return Revision(
        commit=commit,
        dirty=None if changes is None else bool(changes),
        code_sha256=code_sha256(root),
    )


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command that only reads, or None where it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
