"""Reruns a row from its record and compares the numbers.

Everything comes from the record's fields and hashes, nothing from its command line: the protocol by
its hash; networks, reference, extractor, detector and prompts by name and hash; sampler settings as
recorded.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.protocol import Protocol
from bench.records.record import (
    Evidence,
    MethodInfo,
    MetricValue,
    ResultRecord,
    circumstances,
    differences,
)
from bench.rows.rows import Job
from bench.rows.settings import SamplerSettings, settings_of
from bench.suites.base import Assets, ImageOrigin, Suite, check_inputs, load_suite
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError
from dimo.samplers import SAMPLERS
from dimo.util.files import sha256_file
from dimo.zoo.loading import load_student, load_teacher, weights_file
from dimo.zoo.students import PUBLISHED_STUDENTS, find_student, shipped_students
from dimo.zoo.teachers import get_teacher

_ROUNDING = 1e-9  # relative; an interval of zero width, [1, 1], allows for rounding
_OF_IMAGES = {"images": "--images", "labels": "--labels"}
_OPTIONS = {  # what a record names by hash -> the option that gives it
    "extractor": "--extractor-weights",
    "reference": "--reference",
    "detector": "--extractor-weights",
    "prompts": "--prompts",
    "scorer": "--extractor-weights or --clip-weights",
}


@dataclass(frozen=True)
class Check:
    """One metric, recorded and rerun."""

    metric: str
    recorded: MetricValue
    found: float  # value of the rerun
    within: bool  # whether it is in the recorded interval or, without one, equals the value
    equal: bool  # whether both values are the same to the bit


@dataclass(frozen=True)
class Verification:
    """A rerun against its record."""

    checks: tuple[Check, ...]  # in the order of the record's metrics
    same_images: bool | None  # None: the record does not name its images
    circumstances: Mapping[str, tuple[Any, Any]]  # recorded and rerun, where they differ

    @property
    def holds(self) -> bool:
        """Whether every metric is within its interval."""
        return all(check.within for check in self.checks)

    @property
    def equal(self) -> bool:
        """Whether every value is the same to the bit."""
        return all(check.equal for check in self.checks)


def repeat(
    record: ResultRecord,
    protocol: Protocol,
    runtime: Runtime,
    assets: Assets,
    *,
    student: str | None = None,
    images: Sequence[Path] = (),
    labels: str = "",
    recursive: bool = False,
) -> ResultRecord:
    """Measures a record's row again; the new record is not stored.

    Args:
        protocol: The record's, see `bench.records.record.protocol_of`.
        student: Run folder or name of the student; None: as recorded.
        images: The image set or the real images, for a record of files; `labels` and `recursive`
            as for `dimo eval`.

    Raises:
        DimoError: Weights, reference, extractor, prompts or images are missing, or have another
            hash than recorded; or the record does not say how it was made.
    """
    method, recorded = record.method, record.evidence
    origin = None
    if method.sampler is None and method.section != "Reference":
        origin = ImageOrigin(method.name, method.section, method.num_steps, labels, recursive)
    of_files = origin is not None or bool(recorded and recorded.images)
    _check_options(record, of_files=of_files, student=student, images=images)
    if origin is None:
        assets = dataclasses.replace(assets, reference_images=tuple(images))
    check_inputs(protocol, assets, images, origin)
    is_quick_look = method.sampler is not None and bool(record.off_protocol)
    load = partial(
        load_suite,
        protocol,
        runtime,
        assets,
        batch_size=record.speed.batch_size or 500,
        nonconforming=bool(record.off_protocol),
        num_images=record.num_images if is_quick_look else None,
    )
    if origin is not None:
        measured = load().measure_paths(images, origin)
        assert measured is not None, "this process is the only rank"
        evidence = measured.record.evidence
        assert evidence is not None
        _check_hashes(recorded, dataclasses.asdict(evidence), _OF_IMAGES | _OPTIONS)
        return measured.record
    if record.seed != protocol.seeds.report:
        raise DimoError(
            f"the record has seed {record.seed}, its protocol {protocol.seeds.report}: it is not "
            "of dimo bench and cannot be repeated"
        )
    # missing or changed weights of the row show before anything is loaded
    make_row = _row_of(record, runtime.device, student=student, weights=assets.weights)
    suite = load()
    _check_hashes(recorded, suite.evidence, _OPTIONS)
    measured = suite.measure(make_row(suite))
    assert measured is not None, "this process is the only rank"
    suite.forget()
    return measured.record


def _row_of(
    record: ResultRecord, device: torch.device, *, student: str | None, weights: Path | None
) -> Callable[[Suite], Job]:
    """Makes the row later; names and hashes are checked now, before networks are loaded."""
    method = record.method
    if method.teacher is None:
        raise DimoError(f"{method.name!r} names no teacher: the record does not say how it is made")
    teacher = get_teacher(method.teacher)
    load = partial(load_teacher, teacher.name, device=device, weights=weights)
    if method.sampler is None:
        return lambda suite: _reference_row(
            method, suite.reference_rows(load(prompts=suite.prompts))
        )
    precision = method.network_precision or "float32"
    settings = _settings_of(method, precision)
    if _is_of_student(method):
        name = student or method.student or _student_of(method, weights)
        run = find_student(name, weights=weights)
        _check_weights(method, run.path)
        if run.config.teacher != teacher.name:
            raise DimoError(f"{name} is a student of {run.config.teacher}, not of {teacher.name}")
        load = partial(load_student, run, device=device, weights=weights)
    else:
        _check_weights(method, weights_file(teacher, "transformer", weights))
    return lambda suite: Job(
        method.name, method.section, load(precision=precision, prompts=suite.prompts), settings
    )


def _is_of_student(method: MethodInfo) -> bool:
    """Whether the row is a distilled model's; some are sampled as their teacher is."""
    sampler = SAMPLERS.get(method.sampler or "")
    return method.student is not None or (sampler is not None and sampler.of_student)


def compare_runs(record: ResultRecord, rerun: ResultRecord) -> Verification:
    """Compares a rerun with its record, metric by metric."""
    checks = tuple(
        _check(name, value, rerun.metrics[name].value) for name, value in record.metrics.items()
    )
    same_images = None
    if record.evidence is not None and rerun.evidence is not None:
        same_images = record.evidence.images_sha256 == rerun.evidence.images_sha256
    return Verification(checks, same_images, circumstances(differences(record, rerun)))


def _check(name: str, recorded: MetricValue, value: float) -> Check:
    low, high = recorded.low, recorded.high
    if low is None or high is None:
        low = high = recorded.value
    slack = _ROUNDING * max(1.0, abs(recorded.value))
    within = low - slack <= value <= high + slack
    return Check(name, recorded, value, within, value == recorded.value)


def _check_options(
    record: ResultRecord, *, of_files: bool, student: str | None, images: Sequence[Path]
) -> None:
    name = record.method.name
    if of_files and not images:
        where = ", ".join(record.evidence.images) if record.evidence else ""
        raise DimoError(
            f"{name!r} is a set of images{f' ({where})' if where else ''}, which no network makes "
            "again; name it with --images"
        )
    if images and not of_files:
        raise DimoError(f"{name!r} is not a set of images; leave --images out")
    if student is not None and not _is_of_student(record.method):
        raise DimoError(f"{name!r} is not a row of a student; leave --student out")


def _settings_of(method: MethodInfo, precision: str) -> SamplerSettings:
    assert method.sampler is not None
    if method.num_steps is None or method.temperature is None:
        raise DimoError(f"{method.name!r} has no number of steps or no temperature in its record")
    return SamplerSettings(
        method.sampler,
        method.num_steps,
        precision=precision,
        selected_by=method.selected_by,
        **{name: method.setting(name) for name in settings_of(method.sampler)},
    )


def _reference_row(method: MethodInfo, rows: Sequence[Job]) -> Job:
    named = {row.name: row for row in rows}
    if method.name not in named:
        raise DimoError(f"no reference row {method.name!r}; allowed: {', '.join(named) or 'none'}")
    return named[method.name]


def _student_of(method: MethodInfo, weights: Path | None) -> str:
    """The named student with the record's weights; early records do not name it."""
    for name in (*shipped_students(), *PUBLISHED_STUDENTS):
        with suppress(DimoError):  # a published one that was not fetched
            if sha256_file(find_student(name, weights=weights).path) == method.weights_sha256:
                return name
    raise DimoError(
        f"the record does not say where student {method.name!r} is, and no bundled or published "
        f"student has its weights ({(method.weights_sha256 or 'not recorded')[:12]}...); give its "
        "run folder with --student"
    )


def _check_weights(method: MethodInfo, path: Path) -> None:
    if method.weights_sha256 is None:
        raise DimoError(f"{method.name!r} has no weights hash in its record; bench it again")
    digest = sha256_file(path)
    if digest != method.weights_sha256:
        raise DimoError(
            f"{path} has sha256 {digest[:12]}..., the record {method.weights_sha256[:12]}...: "
            "other weights than were measured; give those with --student RUN or --weights FOLDER"
        )


def _check_hashes(
    recorded: Evidence | None, evidence: Mapping[str, Any], options: Mapping[str, str]
) -> None:
    for name, option in options.items():
        old = getattr(recorded, f"{name}_sha256", None)
        new = evidence.get(f"{name}_sha256") or ""
        if old is not None and new != old:
            raise DimoError(
                f"{name} has sha256 {new[:12] or '(none)'}..., the record {old[:12] or '(none)'}"
                f"...: not what was measured; give that with {option}"
            )
