"""Rows to be: which networks are scored, and with which settings."""

__all__ = [
    "Cost",
    "Job",
    "jobs_of",
    "load_jobs",
    "load_models",
    "method_info",
    "reference_jobs",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.generate import SETTINGS, SamplerSettings
from bench.images import to_uint8
from bench.plan import Choice, check_used, student_settings, teacher_settings
from bench.protocol import Protocol
from bench.record import MethodInfo, Section, Tuning
from bench.references import reference_images
from dimo.errors import DimoError
from dimo.students import PUBLISHED_STUDENTS, StudentConfig, find_student
from dimo.teachers import TEACHERS, Loaded, get_teacher, load_model

_RECORDED = ("sampler", "num_steps", *SETTINGS)  # of the settings, by the same name in a record


@dataclass(frozen=True)
class Job:
    """One row to be: a network with sampler settings, or a fixed set of images.

    Attributes:
        name: Name in tables.
        section: Block of the table.
        loaded: The network; for a fixed set, whose tokenizer and teacher it belongs to.
        settings: Sampler settings; None for a fixed set.
        images: The fixed set, uint8 [N, 3, H, W]; None for a network.
        labels: Of the fixed set, int64 [N].
        student: Run folder or name that the student was loaded by.
        tuning: How the settings were chosen, if by a sweep (`bench.tuning`).
    """

    name: str
    section: Section
    loaded: Loaded
    settings: SamplerSettings | None = None
    images: Tensor | None = None
    labels: Tensor | None = None
    student: str | None = None
    tuning: Tuning | None = None

    @property
    def caption(self) -> str:
        """The name with the number of steps, for progress."""
        if self.settings is None or self.settings.sampler == "one_step":
            return self.name
        return f"{self.name}, {self.settings.num_steps} steps"


@dataclass(frozen=True)
class Cost:
    """What sampling costs: network forwards an image, and tokens revealed at each step."""

    nfe: int
    token_counts: tuple[int, ...]


def method_info(job: Job, cost: Cost | None) -> MethodInfo:
    """The part of a record that says what was scored; `cost` is None for a fixed set."""
    settings, student = job.settings, job.loaded.student
    training: dict[str, Any] = {}
    if student is not None and settings is not None:
        training = {
            "recipe": student.recipe,
            "seconds": student.training_seconds,
            "images_seen": student.images_seen,
            "seed": student.seed,
            **({"ablation": student.ablation} if student.ablation else {}),
        }
    chosen = {name: getattr(settings, name, None) for name in _RECORDED}
    # no random start and float32 go without saying, as in records from before there was a choice
    chosen["random_start"] = chosen["random_start"] or None
    precision = settings.precision if settings else "float32"
    return MethodInfo(
        name=job.name,
        section=job.section,
        teacher=job.loaded.teacher.name,
        nfe=cost.nfe if cost else None,
        token_counts=cost.token_counts if cost else None,
        selected_by=settings.selected_by if settings else "nothing to select",
        weights_sha256=job.loaded.weights_sha256 if settings else None,
        training=training,
        network_precision=None if precision == "float32" else precision,
        student=job.student,
        tuning=job.tuning,
        **chosen,
    )


# rows of a sampler that is not the teacher's own
_SAMPLER_NAMES = {
    "confidence": "Confidence order",
    "random": "Random order",
    "halton": "Halton order",
    "tau_leaping": "τ-leaping",
    "theta_trapezoidal": "θ-trapezoidal",
}


def jobs_of(
    loaded: Loaded,
    steps: Sequence[int],
    overrides: Mapping[str, Any],
    samplers: Sequence[str] = (),
    *,
    schedules: Sequence[str] = (),
    student_steps: Sequence[int] = (1,),
) -> list[Job]:
    """The jobs of one network: a teacher at `steps`, or a student at `student_steps`.

    A teacher's own sampler makes rows of the section "Teacher", others those of "Sampler". What
    a row does not have of `overrides` and `schedules` is left out, see `bench.plan.check_used`.

    Args:
        loaded: The network.
        steps: Step counts of a teacher.
        overrides: Settings that replace the defaults, keys of `bench.plan.RANGES`.
        samplers: How a teacher is sampled; empty: by its own sampler.
        schedules: A row for each; empty: the default of each sampler.
        student_steps: Step counts of a student.

    Raises:
        DimoError: Unknown sampler or schedule, a setting or a number of steps out of range.
    """
    choice = Choice(tuple(samplers), tuple(schedules), overrides, loaded.precision)
    if loaded.student is None:
        return _teacher_jobs(loaded, teacher_settings(loaded.teacher, steps, choice))
    length = loaded.teacher.num_tokens
    return _student_jobs(loaded, student_settings(loaded.student, length, student_steps, choice))


def _teacher_jobs(loaded: Loaded, rows: Sequence[SamplerSettings]) -> list[Job]:
    own = loaded.teacher.defaults.sampler
    return [
        Job(loaded.name, "Teacher", loaded, row)
        if row.sampler == own
        else Job(_SAMPLER_NAMES[row.sampler], "Sampler", loaded, row)
        for row in rows
    ]


def _student_jobs(loaded: Loaded, rows: Sequence[SamplerSettings]) -> list[Job]:
    return [Job(loaded.name, "Distill.", loaded, row) for row in rows]


def reference_jobs(loaded: Loaded, protocol: Protocol) -> list[Job]:
    """Real data, and real data through the tokenizer: the best any model on its tokens can do."""
    images, labels = reference_images(protocol)
    with torch.inference_mode():
        decoded = loaded.tokenizer.decode(loaded.tokenizer.encode(images))
    again = to_uint8(decoded, protocol.images.uint8).cpu()
    return [
        Job("Real data", "Reference", loaded, images=images, labels=labels),
        Job("Tokenizer reconstruction", "Reference", loaded, images=again, labels=labels),
    ]


def load_jobs(
    teacher: str,
    students: Sequence[str],
    steps: Sequence[int],
    *,
    device: torch.device,
    weights: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    samplers: Sequence[str] = (),
    schedules: Sequence[str] = (),
    student_steps: Sequence[int] = (1,),
    precision: str = "float32",
) -> list[Job]:
    """Loads the networks: the teacher at each number of steps, then each student.

    All names, settings and files are checked before the first network is loaded.

    Args:
        teacher: A name of `dimo.teachers`.
        students: Run folders, shipped or published names.
        steps: Step counts of the teacher; empty for no teacher row.
        device: Where to put the networks.
        weights: Folder of the weights; None: those shipped, or those fetched.
        overrides: Settings that replace the defaults of every row that has them, keys of
            `bench.plan.RANGES`.
        samplers: How the teacher is sampled; empty: by its own sampler.
        schedules: A row for each; empty: the default of each sampler.
        student_steps: Step counts of the students.
        precision: What the networks compute in, one of `dimo.models.precision.PRECISIONS`.

    Raises:
        DimoError: Unknown or missing networks, a student of another teacher, bad settings.
    """
    get_teacher(teacher)
    named = [teacher] if steps else []
    for name in students:
        found = find_student(name, weights=weights)
        if found.config.teacher != teacher:
            raise DimoError(
                f"student {name!r} was distilled from {found.config.teacher!r}, "
                f"not from {teacher!r}; use --teacher {found.config.teacher}"
            )
        named.append(f"./{name}" if name in TEACHERS else name)  # a folder called like a teacher
    return load_models(
        named,
        steps,
        device=device,
        weights=weights,
        overrides=overrides,
        samplers=samplers,
        schedules=schedules,
        student_steps=student_steps,
        precision=precision,
    )


def load_models(
    names: Sequence[str],
    steps: Sequence[int],
    *,
    device: torch.device,
    weights: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    samplers: Sequence[str] = (),
    schedules: Sequence[str] = (),
    student_steps: Sequence[int] = (1,),
    precision: str = "float32",
) -> list[Job]:
    """As `load_jobs`, for any teachers and students in the order they are named."""
    overrides = overrides or {}
    choice = Choice(tuple(samplers), tuple(schedules), overrides, precision)
    planned: list[SamplerSettings] = []
    for name in names:
        if name in TEACHERS:
            planned += teacher_settings(TEACHERS[name], steps, choice)
            continue
        student = _find_student(name, weights)
        length = get_teacher(student.teacher).num_tokens
        planned += student_settings(student, length, student_steps, choice)
    check_used(planned, choice)

    def rows(name: str) -> list[Job]:
        loaded = load_model(name, device=device, weights=weights, precision=precision)
        found = jobs_of(
            loaded, steps, overrides, samplers, schedules=schedules, student_steps=student_steps
        )
        return [replace(job, student=name) if loaded.student else job for job in found]

    return [job for name in names for job in rows(name)]


def _find_student(name: str, weights: Path | None) -> StudentConfig:
    try:
        return find_student(name, weights=weights).config
    except DimoError as error:
        if name in PUBLISHED_STUDENTS:
            raise
        raise DimoError(f"{name} is no teacher ({', '.join(TEACHERS)}), and {error}") from error
