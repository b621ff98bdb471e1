"""The folder of results: append-only, one JSON file per record, safe for concurrent writers."""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from bench.records.record import ResultRecord, load_record, record_to_json
from dimo.errors import DimoError
from dimo.util.files import replacing, sha256_bytes, sync_folder, write_atomic

_STALE_SECONDS = 3600.0  # a writer that still lives is done with its temporary file long before


def append(
    record: ResultRecord, folder: str | os.PathLike[str], contributions: bytes | None = None
) -> Path:
    """Adds a record as `<UTC>-<protocol>-<method>-<run>.json` and returns the path.

    The file appears whole, under a name that is taken once: never half written, never overwritten,
    whatever other writers do and whenever the process is killed. `contributions` are written
    before it, as `contributions/<run_id>.npz`. Temporary files that killed writers left an hour
    ago or longer are removed.

    Raises:
        DimoError: The record was changed, exists already, or the folder cannot be written.
    """
    text = record_to_json(record)
    path = Path(folder) / _file_name(record)
    if contributions is not None:
        write_atomic(_contributions_path(record, path.parent), contributions)
    with replacing(path, _publish) as temporary:
        temporary.write_text(text, encoding="utf-8")
    sync_folder(path.parent)
    _remove_stale(path.parent)
    return path


def load_all(folder: str | os.PathLike[str]) -> tuple[list[ResultRecord], list[str]]:
    """Every record of a folder, oldest first, and one line for each `.json` file that is left out:
    unreadable, foreign, of a newer format, edited by hand, or a duplicate.

    Raises:
        DimoError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DimoError(f"no results folder {folder}; make a first result with: dimo bench")
    records: dict[str, tuple[ResultRecord, str]] = {}  # by run id, with the name of the file
    problems = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            record = load_record(path)
        except DimoError as error:
            problems.append(str(error))
            continue
        _, other = records.setdefault(record.run_id, (record, path.name))
        if other != path.name:
            problems.append(f"{path}: the same run as {other}; remove one of them")
    loaded = [record for record, _ in records.values()]
    return sorted(loaded, key=lambda record: (record.created, record.run_id)), problems


def find_record(name: str, folder: str | os.PathLike[str]) -> tuple[ResultRecord, Path]:
    """A record, by the path of its file or the start of its run id, and the folder it is in.

    Raises:
        DimoError: There is no such record, or several.
    """
    if name.endswith(".json") or os.sep in name:
        return load_record(name), Path(name).parent
    matches = [record for record in load_all(folder)[0] if record.run_id.startswith(name)]
    if len(matches) != 1 or not name:
        advice = "more digits of it" if matches else "another one (dimo results list has them)"
        raise DimoError(
            f"{len(matches)} records in {folder} have a run id that begins with {name!r}; give "
            f"{advice}, or the path of a record's file"
        )
    return matches[0], Path(folder)


def load_contributions(record: ResultRecord, folder: str | os.PathLike[str]) -> bytes:
    """The file of per-sample contributions that `append` wrote beside the record.

    Raises:
        DimoError: There is none, or it is not the one that the record names.
    """
    path = _contributions_path(record, Path(folder))
    if record.evidence is None or not path.is_file():
        raise DimoError(
            f"{record.method.name!r} ({record.run_id[:8]}) has no per-sample contributions at "
            f"{path}; score it again with this version of dimo"
        )
    data = path.read_bytes()
    if sha256_bytes(data) != record.evidence.contributions_sha256:
        raise DimoError(f"{path} is not what the record names; score it again")
    return data


def _contributions_path(record: ResultRecord, folder: Path) -> Path:
    return folder / "contributions" / f"{record.run_id}.npz"


def _file_name(record: ResultRecord) -> str:
    method, steps = record.method, record.method.num_steps
    name = method.name if steps is None else f"{method.name} {steps}"
    time = re.sub(r"[-:]|\.\d+", "", record.created)
    return f"{time}-{_slug(record.protocol.name)}-{_slug(name)}-{record.run_id[:8]}.json"


def _slug(text: str) -> str:
    words = re.findall(r"[a-z0-9]+", re.sub(r"[\[\]']", "", text.lower()))
    return "-".join(words)[:48].strip("-") or "unnamed"


def _publish(temporary: Path, path: Path) -> None:
    """Gives the finished file its name; a DimoError if the name is taken."""
    try:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            raise
        except OSError:  # no hard links here: claim the name, then fill it in one step
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            temporary.replace(path)
    except FileExistsError as error:
        raise DimoError(f"{path} exists already; results are append-only, run again") from error


def _remove_stale(folder: Path) -> None:
    """Removes temporary files that no writer uses any more; those that remain are harmless."""
    for pattern in (".*.json.*.tmp", "contributions/.*.npz.*.tmp"):
        for path in folder.glob(pattern):
            with suppress(OSError):  # another writer was faster, or it is another user's
                if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                    path.unlink()
