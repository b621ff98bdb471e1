"""Official weight files, and students on Hugging Face; nothing else uses the network.

Interrupted downloads of official files are resumed, and a file is put in place when it is complete
and checked. huggingface_hub provides its address and SHA-256; the bytes are downloaded here,
because huggingface_hub 2 starts over after an interruption. Students go through its own cache.
"""

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dimo import __version__
from dimo.errors import DimoError
from dimo.util.files import sha256_file, try_lock, write_atomic
from dimo.weights.catalog import (
    OfficialFile,
    default_folder,
    destination,
    find,
    get_official,
    hub_cache,
)

Progress = Callable[[str, int, int | None], None]  # name, bytes done, bytes in all if known

HUB = "hf://"  # how the address of a repository on Hugging Face begins
_ADDRESS = re.compile(HUB + r"([\w.-]+/[\w.-]+)(?:@(\S+))?")

_BLOCK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_TRIES = 4  # consecutive failures without a byte
_PAUSE = 1.0  # seconds before another try
_BUSY = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
_LOST = (OSError, http.client.HTTPException)  # an interruption: the rest may come later


@dataclass(frozen=True)
class _Remote:
    """A file on a server, and what the server states about it."""

    url: str
    size: int | None = None
    sha256: str = ""
    version: str = ""  # changes with the content; names the unfinished file
    token: str = ""


def fetch(name: str, folder: Path | None, progress: Progress) -> list[Path]:
    """Downloads an official file and its companion into a folder; None: `default_folder()`.

    A file that `locate` finds, even converted, is left as it is. The SHA-256 of a downloaded file
    is kept beside it in a `.sha256` file; the name of an unfinished one ends in `.part`.

    Returns:
        The files, the companion's first.

    Raises:
        DimoError: Unknown name, no connection, no such file, a full disk, or a file whose size or
            checksum is not the stated one.
    """
    official = get_official(name)
    before = fetch(official.companion, folder, progress) if official.companion else []
    present = find(name, folder)
    if present is not None:
        return [*before, present]
    target = destination(name, default_folder() if folder is None else folder)
    by_hand = f"or download {official.url} by hand and put it at {target}"
    remote = _remote(official, by_hand)
    version = re.sub(r"\W", "", remote.version)[:8]
    part = target.with_name(f"{target.name}.{version}.part" if version else f"{target.name}.part")
    with _sole_writer(part):
        _fill(part, remote, partial(progress, name), by_hand)
        sha256 = sha256_file(part)
        if remote.sha256 not in ("", sha256):
            part.unlink()
            raise DimoError(
                f"{remote.url} came with sha256 {sha256} instead of {remote.sha256}, and was "
                f"removed; try again, {by_hand}"
            )
        record_sha256(target, sha256)
        part.replace(target)
    return [*before, target]


def recorded_sha256(path: Path) -> str:
    """The SHA-256 that a fetched file had, from the `.sha256` file beside it; "" without one."""
    try:
        words = hash_file(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return ""
    return words[0] if words else ""


def record_sha256(path: Path, sha256: str) -> None:
    """Writes the SHA-256 of a file where `recorded_sha256` reads it."""
    write_atomic(hash_file(path), f"{sha256}  {path.name}\n")


def hash_file(path: Path) -> Path:
    """In the format of `sha256sum`, which can check it too."""
    return path.with_name(f"{path.name}.sha256")


def _remote(official: OfficialFile, by_hand: str) -> _Remote:
    on_hub = official.on_hugging_face
    remote = _on_hugging_face(official, by_hand) if on_hub else _Remote(official.url)
    if not official.sha256:
        return remote
    if remote.sha256 not in ("", official.sha256):
        raise DimoError(
            f"{official.url} now has sha256 {remote.sha256}, but {official.sha256} was published: "
            "its owner changed it, and results with it would differ; update dimo"
        )
    return replace(remote, sha256=official.sha256, version=official.sha256)


def _on_hugging_face(official: OfficialFile, by_hand: str) -> _Remote:
    """Address at one commit, size and checksum, with the user's token if there is one."""
    import huggingface_hub as hub

    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        url = hub.hf_hub_url(official.source, official.path, endpoint=endpoint)
        known = hub.get_hf_file_metadata(url, timeout=_TIMEOUT)
        url = hub.hf_hub_url(
            official.source, official.path, revision=known.commit_hash, endpoint=endpoint
        )
    except Exception as error:  # its own or its HTTP library's, which differ by version
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DimoError(
            f"cannot reach {official.path} of {official.source} on Hugging Face: "
            f"{reason.rstrip('.')}; check the connection and try again, {by_hand}"
        ) from error
    etag = known.etag or ""
    sha256 = etag if re.fullmatch("[0-9a-f]{64}", etag) else ""  # small files have git's own hash
    return _Remote(url, known.size, sha256, version=etag, token=hub.get_token() or "")


def fetch_snapshot(address: str, files: Sequence[str]) -> tuple[str, Path]:
    """Downloads files of a repository into the cache of huggingface_hub, or finds them there.

    Args:
        address: `hf://OWNER/REPO`, or `hf://OWNER/REPO@REVISION` with a branch, tag or commit.
        files: Names of the files; those that the repository lacks are left out.

    Returns:
        `hf://OWNER/REPO@COMMIT`, and the folder of the files.

    Raises:
        DimoError: Not such an address; no such repository or revision; no connection, or
            `HF_HUB_OFFLINE` is set, and the files are not in the cache.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise DimoError(
            f"{address!r} is no address on Hugging Face; give hf://OWNER/REPO, or one revision of "
            "it as hf://OWNER/REPO@REVISION"
        )
    import huggingface_hub as hub

    repository, revision = found.groups()
    try:
        folder = hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(files),
            cache_dir=hub_cache(),
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except Exception as error:
        raise _hub_error(f"cannot load {address}", error) from error
    return f"{HUB}{repository}@{Path(folder).name}", Path(folder)


def push(
    files: Sequence[Path],
    repository: str,
    *,
    message: str,
    private: bool = False,
    force: bool = False,
) -> str:
    """Uploads files to the top of a repository on Hugging Face, all in one commit or none.

    Args:
        repository: `OWNER/REPO`; it is created if it does not exist.
        private: Whether a new repository is private.
        force: Replace files that the repository has.

    Returns:
        The new commit, as `hf://OWNER/REPO@COMMIT`.

    Raises:
        DimoError: Not such a name; no token, or one that may not write there; files that exist;
            no connection; a repository that somebody else changed meanwhile.
    """
    address = HUB + repository.removeprefix(HUB)
    found = _ADDRESS.fullmatch(address)
    if found is None or found[2]:
        raise DimoError(f"--push {repository!r} is no repository; give OWNER/REPO")
    import huggingface_hub as hub

    token = hub.get_token()
    if not token:
        raise DimoError(
            "--push needs a token of Hugging Face; log in with: hf auth login, or set HF_TOKEN"
        )
    api, name = hub.HfApi(os.environ.get("HF_ENDPOINT"), token=token), found[1]
    try:
        api.create_repo(name, exist_ok=True, private=private or None)
        known = api.model_info(name)
        present = {file.rfilename for file in known.siblings or ()} & {file.name for file in files}
        if present and not force:
            raise DimoError(
                f"{address} has {', '.join(sorted(present))} already; replace them with --force or "
                "choose another repository"
            )
        # not upload_folder, which may make several commits
        commit = api.create_commit(
            name,
            [hub.CommitOperationAdd(file.name, file) for file in files],
            commit_message=message,
            parent_commit=known.sha,
        )
    except DimoError:
        raise
    except Exception as error:
        raise _hub_error(f"cannot push to {address}", error) from error
    return f"{address}@{commit.oid}"


_NEXT_STEP = {
    401: "log in with: hf auth login, or set HF_TOKEN, and check the name",
    403: "give a token that may do this; see https://huggingface.co/settings/tokens",
    404: "check the name and the revision; a private repository needs a login: hf auth login",
    409: "it was changed meanwhile: look at it and repeat the command",
    412: "it was changed meanwhile: look at it and repeat the command",
}


def _hub_error(problem: str, error: Exception) -> DimoError:
    """One line for an error of huggingface_hub or of its HTTP library, which differ by version."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why a large file could not be uploaded
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    step = _NEXT_STEP.get(status or 0, "check the connection and try again")
    return DimoError(f"{problem}: {reason}; {step}")


@contextmanager
def _sole_writer(part: Path) -> Iterator[None]:
    """Creates the file and locks it against other processes."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("ab")
    except OSError as error:
        raise DimoError(
            f"cannot write {part}: {error.strerror}; choose another folder with --folder"
        ) from error
    with file:
        if not try_lock(file.fileno()):
            raise DimoError(
                f"{part} is being written by another dimo weights fetch; wait until it ends"
            )
        try:
            yield
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def _fill(
    part: Path, remote: _Remote, progress: Callable[[int, int | None], None], by_hand: str
) -> None:
    """Appends what is missing, over several connections if one is lost."""
    failures = 0
    while True:
        have = part.stat().st_size
        if remote.size is not None and have == remote.size:
            return progress(have, remote.size)
        try:
            return _append(part, have, remote, progress)
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"{error.code} {error.reason}"
            if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                os.truncate(part, 0)  # longer than the file is: of another version
            elif error.code < 500 and error.code not in _BUSY:
                raise DimoError(
                    f"{remote.url} answers {problem}: the file may have moved, or need a login; "
                    f"update dimo, {by_hand}"
                ) from error
        except _LOST as error:
            reason = getattr(error, "reason", error)  # what urllib wraps
            problem = str(reason) or type(reason).__name__
        now = part.stat().st_size
        failures = 0 if now > have else failures + 1
        if failures == _TRIES:
            kept = f"{now:,} bytes are kept, repeat the command to continue" if now else ""
            raise DimoError(
                f"cannot fetch {remote.url}: {problem}; "
                f"{kept or 'check the connection and try again'}, {by_hand}"
            )
        time.sleep(_PAUSE)


def _append(
    part: Path, have: int, remote: _Remote, progress: Callable[[int, int | None], None]
) -> None:
    """One connection: appends from byte `have` to the end, or raises one of `_LOST`."""
    headers = {"User-Agent": f"dimo/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(remote.url, headers=headers)
    if remote.token:  # not for the storage that the hub redirects to
        request.add_unredirected_header("Authorization", f"Bearer {remote.token}")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # a server that knows no ranges sends the whole
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else remote.size
        if remote.size is not None and total != remote.size:
            raise http.client.HTTPException(f"{total:,} bytes instead of {remote.size:,}")
        with part.open("r+b") as file:
            file.truncate(have)
            file.seek(have)
            while block := answer.read(_BLOCK):
                try:
                    file.write(block)
                    file.flush()
                except OSError as error:
                    raise DimoError(
                        f"cannot write {file.name}: {error.strerror}; free space, then repeat "
                        "the command to continue"
                    ) from error
                have += len(block)
                progress(have, total)
    if total is not None and have < total:
        raise http.client.HTTPException(f"the connection closed at byte {have:,} of {total:,}")
