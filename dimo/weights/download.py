"""Downloading official weight files; nothing else uses the network.

Interrupted downloads are resumed, and a file is put in place when it is complete and checked.
huggingface_hub provides its address and SHA-256; the bytes are downloaded here, because
huggingface_hub 2 starts over after an interruption.
"""

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dimo import __version__
from dimo.errors import DimoError
from dimo.util.files import sha256_file, try_lock, write_atomic
from dimo.weights.catalog import OfficialFile, default_folder, destination, find, get_official

Progress = Callable[[str, int, int | None], None]  # name, bytes done, bytes in all if known

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
        write_atomic(_record(target), f"{sha256}  {target.name}\n")
        part.replace(target)
    return [*before, target]


def recorded_sha256(path: Path) -> str:
    """The SHA-256 that a fetched file had, from the `.sha256` file beside it; "" without one."""
    try:
        words = _record(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return ""
    return words[0] if words else ""


def _record(path: Path) -> Path:
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
