"""The result record: one row of a table with everything that is needed to check or repeat it.

A record is one JSON file. It carries the SHA-256 of its own content, so that a file edited by hand
is noticed, and it is read strictly: an unknown, missing or ill-typed key is an error that names it.
"""

import dataclasses
import json
import os
import re
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bench.protocol import Protocol, list_protocols, load_protocol, protocol_sha256
from bench.protocol.catalog import NONE
from bench.protocol.networks import DETECTORS
from bench.records.provenance import Revision, code_revision, package_versions
from bench.records.selection import Tuning, check_tuning
from dimo.errors import DimoError
from dimo.util.files import sha256_bytes
from dimo.util.schema import Origin, canonical_json, decode, encode, unique_keys

Section: TypeAlias = Literal["Reference", "Teacher", "Sampler", "Distill.", "Image sets"]

_FORMAT = 2  # what is written; 1 is read, too
_LARGEST = 2**26  # bytes of a file; a record has a few thousand
_HAND_MADE = "records are written by dimo bench, not by hand: remove the file or run it again"
_IN_MEMORY = Origin("this result", "correct the code that makes the record")


@dataclass(frozen=True)
class MethodInfo:
    """What was scored, and the settings it was free to choose. None: it has no such setting.

    The fields with a default are in a file only where they are not None.
    """

    name: str
    section: Section  # block of the table
    teacher: str | None  # name of the teacher, also for its students
    sampler: str | None
    num_steps: int | None  # sampling steps
    nfe: int | None  # network forwards per image; a guided step counts 2
    mask_schedule: str | None
    token_counts: tuple[int, ...] | None  # tokens revealed at each step
    guidance_scale: float | None  # u + s (c - u); 1 is off
    temperature: float | None  # divides the logits; 1 is as trained
    choice_temperature: float | None  # of the noise on confidences
    selected_by: str  # how the settings were chosen, in words
    weights_sha256: str | None
    # what is known of the training (recipe, seconds, images_seen, ...); None: not published
    training: dict[str, Any]
    final_temperature: float | None = None  # of the last step, where it changes on the way
    theta: float | None = None  # position of theta-trapezoidal's second prediction in a step
    random_start: bool | None = None  # whether images start at random places of the Halton order
    top_k: int | None = None
    top_p: float | None = None
    network_precision: str | None = None  # what the network computed in, if not float32
    # run folder or name of the student as given by the user, or hf://OWNER/REPO@COMMIT
    student: str | None = None
    tuning: Tuning | None = None  # the sweep that chose the settings, if one did
    settings: dict[str, Any] | None = None  # knobs of the sampler that have no field above

    def setting(self, name: str) -> Any:
        """The value of a field, or of a knob of the sampler; None if it has none."""
        if name in self.__dataclass_fields__:
            return getattr(self, name)
        return (self.settings or {}).get(name)


@dataclass(frozen=True)
class MetricValue:
    """One measured value."""

    value: float  # over all images
    low: float | None  # end of its interval; None, like `high`: no interval
    high: float | None
    n: int  # number of generated images it is computed from
    # e.g. `std` of the Inception Score over its splits, or `ceiling`, the coverage expected of a
    # perfect generator
    extra: dict[str, float]


@dataclass(frozen=True)
class RankSpeed:
    """How fast several ranks were together."""

    count: int  # of ranks
    images_per_second: float  # of all together, with extraction and gathering
    peak_memory_bytes: tuple[int, ...]  # of each


@dataclass(frozen=True)
class Speed:
    """How fast one device made images, and what it is. None: not measured."""

    images_per_second: float | None  # tokens and pixels included, warm
    seconds_per_batch: float | None  # of the median image, times the batch size
    batch_size: int | None
    peak_memory_bytes: int | None
    device: str  # in words
    ranks: RankSpeed | None = None  # None, and not in the file: a single one


@dataclass(frozen=True)
class ProtocolInfo:
    """The protocol a result was measured under. Equal `sha256`: comparable."""

    name: str
    version: int
    sha256: str


@dataclass(frozen=True)
class Evidence:
    """What the numbers were computed from, by hash.

    Without an extractor or a reference its name is "none" and its hash empty. Without a scorer,
    prompts or a detector theirs are None; so are the names of the latter two in some records of
    format 1.
    """

    images: tuple[str, ...]  # paths of the set as given; empty for generated images
    images_sha256: str  # over the hashes of all images and their labels, in order
    labels_sha256: str  # over the labels in order; empty without labels
    extractor: str
    extractor_sha256: str  # of its weights, of custom code with that of the code
    reference: str
    reference_sha256: str
    copies: int  # number of images that equal an earlier one
    notes: tuple[str, ...]  # findings of the checks, one line each
    nonconforming: tuple[str, ...]  # why the set is off-protocol; empty if it is not
    contributions_sha256: str  # of the file of per-sample contributions (`dimo compare`)
    scorer_sha256: str | None = None  # of its weights
    prompts_sha256: str | None = None
    detector_sha256: str | None = None  # of its weights; empty if it does not run in dimo
    prompts: str | None = None
    detector: str | None = None


@dataclass(frozen=True)
class ResultRecord:
    """One result. Made by `new_record`."""

    format: int  # of the file; a record of an older one is saved in that
    run_id: str  # random hex digits
    created: str  # UTC time, ISO 8601 with microseconds and `Z`; sorts as text
    protocol: ProtocolInfo
    method: MethodInfo
    metrics: dict[str, MetricValue]
    speed: Speed  # of generation
    seed: int | None  # of the images, None where they were not made here
    revision: Revision
    packages: dict[str, str]  # version by name, with `python`
    command: str  # command line that repeats it
    seconds: float  # wall-clock time of the whole measurement
    content_sha256: str  # over the canonical JSON of all the other keys
    evidence: Evidence | None = None  # None, and not in the file, before version 0.2

    @property
    def num_images(self) -> int:
        """Number of images of the row; a metric may be computed from a part of them."""
        return max((value.n for value in self.metrics.values()), default=0)

    @property
    def off_protocol(self) -> tuple[str, ...]:
        """Why the row shares no table with others; empty if it is as the protocol asks."""
        return self.evidence.nonconforming if self.evidence else ()


def new_record(
    *,
    protocol: Protocol,
    method: MethodInfo,
    metrics: Mapping[str, MetricValue],
    speed: Speed,
    seed: int | None,
    command: str,
    seconds: float,
    evidence: Evidence,
) -> ResultRecord:
    """Makes a record now: fills in identity, time, revision, package versions and the hash.

    Raises:
        DimoError: A value has another type than its field, is not finite, or contradicts another.
    """
    now = datetime.now(UTC)
    return seal(
        ResultRecord(
            format=_FORMAT,
            run_id=uuid.uuid4().hex,
            created=now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            protocol=ProtocolInfo(protocol.name, protocol.version, protocol_sha256(protocol)),
            method=method,
            metrics=dict(metrics),
            speed=speed,
            seed=seed,
            revision=code_revision(),
            packages=package_versions(),
            command=command,
            seconds=seconds,
            content_sha256="",
            evidence=evidence,
        )
    )


def seal(record: ResultRecord) -> ResultRecord:
    """The same record, checked, with `content_sha256` filled in; raises as `new_record`."""
    checked = _checked(plain_content(record), _IN_MEMORY)
    return dataclasses.replace(checked, content_sha256=_content_sha256(record_content(checked)))


def record_content(record: ResultRecord) -> dict[str, Any]:
    """What the file of a record holds, in the record's format."""
    content = plain_content(record)
    evidence = record.evidence
    if record.format == 1 and evidence is not None and evidence.detector_sha256 is not None:
        _downgrade(content["evidence"])
    return content


def _downgrade(evidence: dict[str, Any]) -> None:
    """Format 1: a detector and its prompts are in the fields of extractor and reference.

    Only where the protocol has an extractor, too, do their hashes have fields, and no names.
    """
    names = {new: evidence.pop(new, None) for new in _OLD_PLACE}
    if evidence["extractor"] == NONE:
        for new, old in _OLD_PLACE.items():
            evidence[old], evidence[f"{old}_sha256"] = names[new], evidence.pop(f"{new}_sha256")


def _upgraded(evidence: Evidence) -> Evidence:
    """The evidence of a record of format 1 in the fields that it has now."""
    if evidence.extractor not in DETECTORS:
        return evidence
    return dataclasses.replace(
        evidence,
        extractor=NONE,
        extractor_sha256="",
        reference=NONE,
        reference_sha256="",
        detector=evidence.extractor,
        detector_sha256=evidence.extractor_sha256,
        prompts=evidence.reference,
        prompts_sha256=evidence.reference_sha256,
    )


_OLD_PLACE = {"detector": "extractor", "prompts": "reference"}


def plain_content(record: ResultRecord) -> dict[str, Any]:
    """The fields of a record as JSON data; keys that came later are left out at their default."""
    content: dict[str, Any] = encode(record)
    parts: list[tuple[Any, Any]] = [
        (record, content),
        (record.method, content["method"]),
        (record.speed, content["speed"]),
        (record.revision, content["revision"]),
    ]
    if record.evidence is not None:
        parts.append((record.evidence, content["evidence"]))
    if record.method.tuning is not None:
        trials = content["method"]["tuning"]["trials"]
        parts += zip(record.method.tuning.trials, trials, strict=True)
    for value, table in parts:
        for field in dataclasses.fields(value):
            if field.default is None and table[field.name] is None:
                del table[field.name]
    return content


def record_to_json(record: ResultRecord) -> str:
    """The text of a record's file.

    Raises:
        DimoError: The record was changed after it was made, or was not made by `new_record`.
    """
    text = json.dumps(record_content(record), indent=2, allow_nan=False) + "\n"
    record_from_json(text, source=_IN_MEMORY.source)
    return text


def record_from_json(text: str, *, source: str) -> ResultRecord:
    """Reads a record strictly; errors name the file by `source`.

    Raises:
        DimoError: No JSON object, a newer format, an unknown, missing or ill-typed key, or content
            that does not match its hash.
    """
    origin = Origin(source, _HAND_MADE)
    try:
        data = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise origin.error(f"not valid JSON: {error}") from error
    if isinstance(data, dict) and data.get("format", _FORMAT) not in (1, _FORMAT):
        raise Origin(source, "update dimo, or remove the file").error(
            f"'format' is {ascii(data['format'])[:40]}, and this dimo reads 1 to {_FORMAT}"
        )
    record = _checked(data, origin)
    if record.content_sha256 != _content_sha256(data):
        raise origin.error("'content_sha256' does not match: the file was edited or damaged")
    if record.format == 1 and record.evidence is not None:
        return dataclasses.replace(record, evidence=_upgraded(record.evidence))
    return record


def load_record(path: str | os.PathLike[str]) -> ResultRecord:
    """Reads one record's file.

    Raises:
        DimoError: It cannot be read, or as `record_from_json`.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise Origin(str(path), _HAND_MADE).error("not a regular file")
        if status.st_size > _LARGEST:
            raise Origin(str(path), _HAND_MADE).error(
                f"{status.st_size:,} bytes, and no record has more than {_LARGEST:,}"
            )
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Origin(str(path), "check the path and its permissions").error(
            f"cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise Origin(str(path), _HAND_MADE).error("not a text file") from error
    return record_from_json(text, source=str(path))


def protocol_of(record: ResultRecord, file: str | os.PathLike[str] | None = None) -> Protocol:
    """The protocol a record was measured under, by its hash; without `file`, a bundled one.

    Raises:
        DimoError: There is none of that hash, or the file is another protocol.
    """
    measured = record.protocol
    candidates = list_protocols() if file is None else [load_protocol(str(file))]
    for protocol in candidates:
        if protocol_sha256(protocol) == measured.sha256:
            return protocol
    same_name = [p for p in candidates if file is not None or p.name == measured.name]
    now = "".join(f"; {p.name!r} is now {protocol_sha256(p)[:12]}..." for p in same_name)
    raise DimoError(
        f"no protocol {measured.name!r} of sha256 {measured.sha256[:12]}... is bundled{now}; give "
        "the file of that hash with --protocol"
    )


def _checked(data: Any, origin: Origin) -> ResultRecord:
    record = decode(ResultRecord, data, origin)
    if not re.fullmatch(r"[0-9a-f]{32}", record.run_id):
        raise origin.error(f"'run_id' must be 32 hex digits, not {ascii(record.run_id)[:80]}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", record.created):
        raise origin.error(
            "'created' must be like '2026-01-31T23:59:59.000000Z', "
            f"not {ascii(record.created)[:80]}"
        )
    if not record.method.name.strip():
        raise origin.error("'method.name' must not be empty")
    if record.method.tuning is not None:
        check_tuning(record.method.tuning, origin)
    for name, metric in record.metrics.items():
        where = ascii(f"metrics.{name}")[:80]
        if (metric.low is None) != (metric.high is None):
            raise origin.error(f"{where} must have both 'low' and 'high', or neither")
        if metric.low is not None and metric.high is not None and metric.low > metric.high:
            raise origin.error(f"{where}: 'low' must not be above 'high'")
    return record


def _content_sha256(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "content_sha256"}
    return sha256_bytes(canonical_json(rest).encode())


# names of a run, not of its circumstances; metrics have tables of their own
_NOT_COMPARED = ("format", "run_id", "created", "content_sha256", "seconds", "metrics")
_MEASURED = ("speed.images_per_second", "speed.seconds_per_batch", "speed.peak_memory_bytes")
_CIRCUMSTANCES = (
    "revision.",
    "packages.",
    "speed.device",
    "speed.batch_size",
    "method.nfe",
    "method.token_counts",
)


def differences(first: ResultRecord, second: ResultRecord) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its value in each record, None if missing; without metrics and speeds."""
    left, right = flat(first), flat(second)
    return {
        key: (left.get(key), right.get(key))
        for key in {**left, **right}
        if left.get(key) != right.get(key) and not key.startswith((*_MEASURED, "speed.ranks"))
    }


def circumstances(differing: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """The `differences` that may explain different values: code, packages, device, tokens."""
    return {key: values for key, values in differing.items() if key.startswith(_CIRCUMSTANCES)}


def flat(record: ResultRecord) -> dict[str, Any]:
    """Dotted key -> value of all fields that are compared."""
    return _flat(plain_content(record), "")


def _flat(content: dict[str, Any], path: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{path}{key}"
        if name in _NOT_COMPARED:
            continue
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
