"""A record -> the job that it is the record of, from names, hashes and settings alone."""

__all__ = ["is_of_student", "job_of"]

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.generate import SETTINGS, STUDENT_SAMPLERS, SamplerSettings
from bench.geneval.bench import rendered_jobs
from bench.jobs import Job, reference_jobs
from bench.protocol import Protocol
from bench.record import MethodInfo, ResultRecord
from dimo.errors import DimoError
from dimo.files import sha256_file
from dimo.students import PUBLISHED_STUDENTS, FoundStudent, find_student, shipped_students
from dimo.teachers import Loaded, get_teacher, load_student, load_teacher, weights_file


def job_of(
    record: ResultRecord,
    protocol: Protocol,
    *,
    device: torch.device,
    student: str | None = None,
    weights: Path | None = None,
    prompts: Sequence[str] | None = None,
) -> Callable[[], Job]:
    """How the record's job is made; names and hashes are checked now, networks loaded later.

    Args:
        record: Of a row that was made by `dimo bench`.
        protocol: The record's.
        device: Where networks run.
        student: Run folder or name of the student; None: where the record says it was.
        weights: Folder of the networks' weights; None: those shipped or fetched.
        prompts: The protocol's, for a teacher of prompts; None: it draws classes.

    Raises:
        DimoError: Weights are missing or have another hash than the record names, or the record
            does not say how it was made; as `dimo.teachers.load_model`, when the job is made.
    """
    method = record.method
    if method.teacher is None:
        raise DimoError(f"{method.name!r} names no teacher: the record does not say how it is made")
    teacher = get_teacher(method.teacher)
    if method.sampler is None:
        return lambda: _reference_job(
            method,
            load_teacher(teacher.name, device=device, weights=weights, prompts=prompts),
            protocol,
        )
    precision = method.network_precision or "float32"
    settings = _settings_of(method, precision)
    if not is_of_student(method):
        _check_weights(method, weights_file(teacher, "transformer", weights))

        def load() -> Loaded:
            return load_teacher(
                teacher.name, device=device, weights=weights, precision=precision, prompts=prompts
            )
    else:
        run = student or method.student or _student_of(method, weights)
        found = find_student(run, weights=weights)
        _check_weights(method, found.path)
        if found.config.teacher != teacher.name:
            raise DimoError(f"{run} is a student of {found.config.teacher}, not of {teacher.name}")

        def load() -> Loaded:
            return load_student(
                run, device=device, weights=weights, precision=precision, prompts=prompts
            )

    return lambda: Job(method.name, method.section, load(), settings)


def is_of_student(method: MethodInfo) -> bool:
    """Whether the row is a distilled model's; some are sampled as their teacher is."""
    return method.sampler in STUDENT_SAMPLERS or method.student is not None


def _settings_of(method: MethodInfo, precision: str) -> SamplerSettings:
    assert method.sampler is not None
    if method.num_steps is None or method.temperature is None:
        raise DimoError(f"{method.name!r} has no number of steps or no temperature in its record")
    chosen = {name: getattr(method, name) for name in SETTINGS}
    chosen["random_start"] = bool(method.random_start)
    return SamplerSettings(
        method.sampler,
        method.num_steps,
        precision=precision,
        selected_by=method.selected_by,
        **chosen,
    )


def _reference_job(method: MethodInfo, loaded: Loaded, protocol: Protocol) -> Job:
    make = rendered_jobs if protocol.detector is not None else reference_jobs
    jobs = {job.name: job for job in make(loaded, protocol)}
    if method.name not in jobs:
        raise DimoError(f"no reference row {method.name!r}; there are: {', '.join(jobs) or 'none'}")
    return jobs[method.name]


def _student_of(method: MethodInfo, weights: Path | None) -> str:
    """The student with a name that a record from before `student` was recorded is of."""
    for name in (*shipped_students(), *PUBLISHED_STUDENTS):
        found = _found(name, weights)
        if found is not None and sha256_file(found.path) == method.weights_sha256:
            return name
    raise DimoError(
        f"the record does not say where student {method.name!r} lies, and no student with a name "
        f"has its weights ({(method.weights_sha256 or 'not recorded')[:12]}...); "
        "give its run folder with --student"
    )


def _found(name: str, weights: Path | None) -> FoundStudent | None:
    try:
        return find_student(name, weights=weights)
    except DimoError:  # a published one that was not fetched
        return None


def _check_weights(method: MethodInfo, path: Path) -> None:
    if method.weights_sha256 is None:
        raise DimoError(f"{method.name!r} has no weights hash in its record; bench it again")
    found = sha256_file(path)
    if found != method.weights_sha256:
        raise DimoError(
            f"{path} has sha256 {found[:12]}..., the record {method.weights_sha256[:12]}...: other "
            "weights than were measured; give those with --student RUN or --weights FOLDER"
        )
