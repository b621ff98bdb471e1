"""Commit and versions: of the code that ran, not of a repository around it."""

import dataclasses
import subprocess
from pathlib import Path

import pytest

from bench.records.provenance import Revision, code_revision, code_sha256, package_versions


def test_versions() -> None:
    assert {"python", "numpy", "torch"} <= package_versions().keys()


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository in which `bench/records/code.py` is tracked, and that file."""
    root = tmp_path / "checkout"
    (root / "bench" / "records").mkdir(parents=True)
    (root / "bench" / "records" / "code.py").write_text("pass\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", "bench")
    return root / "bench" / "records" / "code.py"


def test_revision_of_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_sha256(checkout.parents[2])
    assert code_revision(checkout) == Revision(None, None, code)  # no commit yet
    git(checkout.parent, "commit", "--quiet", "-m", "first")
    clean = Revision(git(checkout.parent, "rev-parse", "HEAD"), dirty=False, code_sha256=code)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # as in a hook of another repository
    assert code_revision(checkout) == clean
    (checkout.parents[2] / "README.md").write_text("prose and results change no number\n")
    assert code_revision(checkout) == clean
    (checkout.parent / "new.py").write_text("pass\n")
    assert code_revision(checkout) == dataclasses.replace(clean, dirty=True)
    (checkout.parent / "new.py").unlink()
    checkout.write_text("1\n")
    assert code_revision(checkout) == dataclasses.replace(clean, dirty=True)


def test_an_installed_package_is_not_of_the_repository_around_it(checkout: Path) -> None:
    git(checkout.parent, "commit", "--quiet", "-m", "first")
    installed = checkout.parents[2] / "venv" / "bench" / "records" / "code.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("pass\n")
    assert code_revision(installed).commit is None


def test_revision_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_revision(checkout) == Revision(None, None, code_sha256(checkout.parents[2]))


def test_the_hash_of_the_code_is_of_names_and_content(checkout: Path) -> None:
    root, now = checkout.parents[2], code_sha256.__wrapped__  # without the cache of a process
    found = {now(root)}
    (root / "README.md").write_text("prose\n")
    (root / "tests.py").write_text("pass\n")
    found |= {now(root)}
    assert len(found) == 1
    for name, text in (("code.py", "1\n"), ("new.py", "1\n")):
        (checkout.parent / name).write_text(text)
        found.add(now(root))
    (checkout.parent / "new.py").rename(checkout.parent / "other.py")
    found.add(now(root))
    assert len(found) == 4
