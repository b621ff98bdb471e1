"""A row of a table run again from its record: are the numbers those of the record?

Everything comes from the record's fields and hashes, nothing from its command line: the protocol
by its hash, network, reference, extractor, detector and prompts by name and hash, sampler settings
as recorded.

A record -> the job that it is the record of, from names, hashes and settings alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.protocol import Protocol
from bench.records.differences import circumstances, differences
from bench.records.record import Evidence, MethodInfo, MetricValue, ResultRecord
from bench.rows.rows import Job, reference_jobs
from bench.rows.settings import SETTINGS, STUDENT_SAMPLERS, SamplerSettings
from bench.suites.features import Workbench
from bench.suites.geneval.measure import measure_geneval
from bench.suites.geneval.prompts import list_sha256, prompts_of
from bench.suites.geneval.suite import DetectorBench, rendered_jobs
from dimo.errors import DimoError
from dimo.util.files import sha256_file
from dimo.util.terminal import Progress
from dimo.zoo.loading import Generator, load_student, load_teacher, weights_file
from dimo.zoo.students import PUBLISHED_STUDENTS, FoundStudent, find_student, shipped_students
from dimo.zoo.teachers import get_teacher


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
            does not say how it was made; as `dimo.zoo.loading.load_model`, when the job is made.
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

        def load() -> Generator:
            return load_teacher(
                teacher.name, device=device, weights=weights, precision=precision, prompts=prompts
            )
    else:
        run = student or method.student or _student_of(method, weights)
        found = find_student(run, weights=weights)
        _check_weights(method, found.path)
        if found.config.teacher != teacher.name:
            raise DimoError(f"{run} is a student of {found.config.teacher}, not of {teacher.name}")

        def load() -> Generator:
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


def _reference_job(method: MethodInfo, loaded: Generator, protocol: Protocol) -> Job:
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


_ROUNDING = 1e-9  # relative; an interval of no width, [1, 1], holds what differs by rounding


@dataclass(frozen=True)
class Check:
    """One metric, then and now.

    Attributes:
        metric: Name of the metric.
        recorded: The record's value, with its interval.
        found: The value now.
        within: Whether `found` is in the interval, or, where there is none, the recorded value.
        equal: Whether both values are the same to the bit.
    """

    metric: str
    recorded: MetricValue
    found: float
    within: bool
    equal: bool


@dataclass(frozen=True)
class Verification:
    """What running a row again showed.

    Attributes:
        checks: One for each metric of the record, in its order.
        same_images: Whether the images are those of the record; None: it does not name them.
        circumstances: What else is different, then and now: code, packages, device, batch size.
    """

    checks: tuple[Check, ...]
    same_images: bool | None
    circumstances: Mapping[str, tuple[Any, Any]]

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
    *,
    device: torch.device,
    student: str | None = None,
    images: Sequence[Path] = (),
    labels: str = "",
    recursive: bool = False,
    weights: Path | None = None,
    reference: Path | None = None,
    extractor_weights: Path | None = None,
    prompts: Path | None = None,
    allow_code: bool = False,
    progress: Progress = lambda what, done, total, unit: None,
    say: Callable[[str], None] = lambda text: None,
) -> ResultRecord:
    """Measures the record's row once more; the new record is not stored.

    Args:
        record: What is repeated.
        protocol: Its protocol, see `bench.records.record.protocol_of`.
        device: Where networks run.
        student: Run folder or name of the student; None: where the record says it was.
        images: The image set, for a record of one.
        labels: Where its labels come from, as for `dimo eval`.
        recursive: Whether its folders are read with their subfolders.
        weights: Folder of the networks' weights; None: those shipped or fetched.
        reference: File or folder of the reference; None: the embedded one.
        extractor_weights: Of the extractor or the detector; None: the shipped ones.
        prompts: The protocol's official file of prompts, for a row that is made here; None: the
            embedded ones.
        allow_code: Whether the protocol may name an extractor of one's own.
        progress: Told how far it is.
        say: Told in one line what is worth knowing.

    Raises:
        DimoError: Weights, reference, extractor, prompts or images are missing, or have another
            hash than the record names; or the record does not say how it was made.
    """
    method = record.method
    if protocol.prompts is not None and protocol.detector is None:
        raise DimoError(
            f"records of {protocol.name!r} are not repeated by dimo verify; score the images again "
            "with dimo eval, and set both side by side with: dimo results diff"
        )
    is_image_set = method.sampler is None and method.section != "Reference"
    if is_image_set and not images:
        where = ", ".join(record.evidence.images) if record.evidence else ""
        raise DimoError(
            f"{method.name!r} is a set of images{f' ({where})' if where else ''}, which no "
            "network makes again; name it with --images"
        )
    if images and not is_image_set:
        raise DimoError(f"{method.name!r} is no set of images; leave --images out")
    if student is not None and not is_of_student(method):
        raise DimoError(f"{method.name!r} is no row of a student; leave --student out")
    if prompts is not None and (protocol.detector is None or is_image_set):
        raise DimoError(
            f"--prompts {prompts} is not used: {method.name!r} is no row that is made from "
            "prompts; leave it out"
        )
    if not is_image_set and record.seed != protocol.seeds.report:
        raise DimoError(
            f"the record has seed {record.seed}, its protocol {protocol.seeds.report}: it is not "
            "of dimo bench and cannot be repeated"
        )
    if protocol.detector is not None:
        if is_image_set:
            return _judge_set(
                record,
                protocol,
                images,
                device=device,
                weights=extractor_weights,
                progress=progress,
            )
        return _judge_row(
            record,
            protocol,
            device=device,
            student=student,
            weights=weights,
            detector_weights=extractor_weights,
            prompts=prompts,
            progress=progress,
        )
    # without the network first: what is missing shows before anything is loaded
    make_job = (
        None
        if is_image_set
        else job_of(record, protocol, device=device, student=student, weights=weights)
    )
    workbench = Workbench(
        protocol,
        device=device,
        batch_size=record.speed.batch_size or 500,
        weights=extractor_weights,
        reference=reference,
        allow_code=allow_code,
        nonconforming=bool(record.evidence and record.evidence.nonconforming),
        progress=progress,
        say=say,
    )
    if record.evidence is not None:
        _check_hash(
            "extractor",
            workbench.extractor.sha256,
            record.evidence.extractor_sha256,
            "--extractor-weights",
        )
        _check_hash(
            "reference",
            workbench.reference.sha256,
            record.evidence.reference_sha256,
            "--reference",
        )
    if make_job is not None:
        return workbench.measure(make_job()).record
    measured = workbench.measure_paths(
        images,
        name=method.name,
        section=method.section,
        num_steps=method.num_steps,
        recursive=recursive,
        labels=labels,
    )
    assert measured is not None, "this process is alone"
    if record.evidence is not None and measured.record.evidence is not None:
        _check_images(record.evidence, measured.record.evidence, images)
    return measured.record


def _judge_row(
    record: ResultRecord,
    protocol: Protocol,
    *,
    device: torch.device,
    student: str | None,
    weights: Path | None,
    detector_weights: Path | None,
    prompts: Path | None,
    progress: Progress,
) -> ResultRecord:
    """`repeat` of a row that is made here, under a protocol with a detector."""
    assert protocol.prompts is not None
    asked = prompts_of(protocol.prompts, prompts)
    texts = [metadata["prompt"] for metadata in asked]
    make_job = job_of(
        record, protocol, device=device, student=student, weights=weights, prompts=texts
    )
    bench = DetectorBench(
        protocol,
        asked,
        device=device,
        batch_size=record.speed.batch_size or 500,
        weights=detector_weights,
        progress=progress,
    )
    recorded = record.evidence
    if recorded is not None:
        detector, list_of_prompts = _judged_by(recorded)
        _check_hash("detector", bench.detector.sha256, detector, "--extractor-weights")
        _check_hash("prompts", list_sha256(asked), list_of_prompts, "--prompts")
    return bench.measure(make_job()).measured.record


def _judge_set(
    record: ResultRecord,
    protocol: Protocol,
    images: Sequence[Path],
    *,
    device: torch.device,
    weights: Path | None,
    progress: Progress,
) -> ResultRecord:
    """`repeat` of a set of images, under a protocol with a detector."""
    if len(images) > 1:
        raise DimoError(
            f"{len(images)} times --images; allowed: one under {protocol.name!r}, the folder of "
            "all prompts"
        )
    method, recorded = record.method, record.evidence
    again = measure_geneval(
        images[0],
        protocol,
        name=method.name,
        section=method.section,
        num_steps=method.num_steps,
        weights=weights,
        device=device,
        nonconforming=bool(recorded and recorded.nonconforming),
        progress=progress,
    ).measured.record
    if recorded is not None and again.evidence is not None:
        _check_images(recorded, again.evidence, images)
        found, detector = (_judged_by(evidence)[0] for evidence in (again.evidence, recorded))
        _check_hash("detector", found, detector, "--extractor-weights")
    return again


def _judged_by(evidence: Evidence) -> tuple[str, str]:
    """Hashes of detector and prompts, which stand in the places of what a protocol has not."""
    if evidence.detector_sha256 is None:
        return evidence.extractor_sha256, evidence.reference_sha256
    return evidence.detector_sha256, evidence.prompts_sha256 or ""


def compare_runs(record: ResultRecord, again: ResultRecord) -> Verification:
    """Holds a repetition against its record, metric by metric."""
    checks = tuple(
        _check(name, value, again.metrics[name].value) for name, value in record.metrics.items()
    )
    same_images = None
    if record.evidence is not None and again.evidence is not None:
        same_images = record.evidence.images_sha256 == again.evidence.images_sha256
    return Verification(checks, same_images, circumstances(differences(record, again)))


def _check(name: str, recorded: MetricValue, found: float) -> Check:
    low, high = recorded.low, recorded.high
    if low is None or high is None:
        low = high = recorded.value
    slack = _ROUNDING * max(1.0, abs(recorded.value))
    within = low - slack <= found <= high + slack
    return Check(name, recorded, found, within, found == recorded.value)


def _check_hash(what: str, found: str, recorded: str, option: str) -> None:
    if found != recorded:
        raise DimoError(
            f"the {what} has sha256 {found[:12]}..., the record {recorded[:12]}...; "
            f"give the one that was used with {option}"
        )


def _check_images(recorded: Evidence, found: Evidence, paths: Sequence[Path]) -> None:
    for what, new, old in (
        ("images", found.images_sha256, recorded.images_sha256),
        ("labels", found.labels_sha256, recorded.labels_sha256),
    ):
        if new != old:
            raise DimoError(
                f"the {what} of {', '.join(map(str, paths))} have sha256 {new[:12] or '(none)'}, "
                f"the record {old[:12] or '(none)'}: another set than was measured; give that one "
                "with --images, and its labels with --labels"
            )
