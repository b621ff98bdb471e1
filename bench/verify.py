"""A row of a table run again from its record: are the numbers those of the record?

Everything comes from the record's fields and hashes, nothing from its command line: the protocol
by its hash, network, reference, extractor, detector and prompts by name and hash, sampler settings
as recorded.
"""

__all__ = ["Check", "Verification", "compare_runs", "repeat"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.differences import circumstances, differences
from bench.evaluate import Progress
from bench.geneval.bench import DetectorBench
from bench.geneval.measure import measure_geneval
from bench.geneval.prompts import list_sha256, prompts_of
from bench.protocol import Protocol
from bench.record import Evidence, MetricValue, ResultRecord
from bench.remake import is_of_student, job_of
from bench.run import Workbench
from dimo.errors import DimoError

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
        protocol: Its protocol, see `bench.record.protocol_of`.
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
