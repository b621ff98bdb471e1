"""Benchmark rows before they are measured: networks with sampler settings, or fixed image sets.

Commands name a network as `[NAME=]MODEL[@STEPS]`.
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from bench.images.codec import ImageInfo
from bench.records.record import MethodInfo, Section
from bench.records.selection import Tuning
from bench.rows.settings import (
    Choice,
    SamplerSettings,
    check_used,
    student_settings,
    teacher_settings,
)
from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.samplers import SAMPLERS
from dimo.samplers.base import Samples
from dimo.weights.download import HUB
from dimo.zoo.generator import Generator
from dimo.zoo.loading import load_student, load_teacher
from dimo.zoo.students import PUBLISHED_STUDENTS, FoundStudent, checkpoint_of, find_student
from dimo.zoo.teachers import TEACHERS, Teacher, get_teacher, is_teacher

_FORM = "[NAME=]MODEL[@STEPS], e.g. runs/mine, di4c=runs/mine or di4c=runs/mine@2,4"


@dataclass(frozen=True)
class Candidate:
    """A network as named on the command line."""

    model: str  # name of a teacher or student, a run folder, a file, or an hf:// address
    name: str | None = None  # in tables; None: its default name
    steps: tuple[int, ...] = ()  # empty: those of the command


def parse_candidate(text: str) -> Candidate:
    """Reads `[NAME=]MODEL[@STEPS]`.

    An existing path is taken as it is. Otherwise the first `=` ends NAME unless a slash precedes
    it, and the last `@` begins STEPS unless a slash follows it, so a path may contain both, as in
    `./a=b` or `runs/@2/mine`. To give `a` steps where a path `a@2` exists, write `a/@2`. In
    `hf://OWNER/REPO@REVISION@STEPS` only numbers are steps.
    """
    name, model = _split_name(text)
    if name is not None and not name:
        raise DimoError(f"{text!r} has an empty name; allowed: {_FORM}")
    model, steps = _split_steps(model)
    if not model:
        raise DimoError(f"{text!r} names no model; allowed: {_FORM}")
    if steps is None:
        return Candidate(model, name)
    parts = [part.strip() for part in steps.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part) for part in parts):
        raise DimoError(
            f"steps {steps!r} of {text!r} are not allowed; give whole numbers from 1: {_FORM}"
        )
    return Candidate(model, name, tuple(dict.fromkeys(map(int, parts))))


def at_checkpoint(text: str, step: int | None) -> str:
    """`[NAME=]MODEL[@STEPS]` with a run's checkpoint after `step` steps as MODEL.

    Teachers stay as they are; None changes nothing. Errors as `dimo.zoo.students.checkpoint_of`.
    """
    candidate = parse_candidate(text)
    if step is None or is_teacher(candidate.model):
        return text
    name = "" if candidate.name is None else f"{candidate.name}="
    steps = f"@{','.join(map(str, candidate.steps))}" if candidate.steps else ""
    return f"{name}{checkpoint_of(candidate.model, step)}{steps}"


def _split_name(text: str) -> tuple[str | None, str]:
    name, sign, rest = text.partition("=")
    if not sign or "/" in name or _exists(text) or _exists(_split_steps(text)[0]):
        return None, text.strip()
    return name.strip(), rest.strip()


def _split_steps(text: str) -> tuple[str, str | None]:
    model, sign, steps = text.rpartition("@")
    is_revision = HUB in model and not re.fullmatch(r"[\d,\s]+", steps)
    if not sign or "/" in steps or is_revision or _exists(text):
        return text, None
    return model.strip(), steps


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # e.g. too long for a name
        return False


Arrays: TypeAlias = dict[str, npt.NDArray[Any]]  # one row per image
Look: TypeAlias = Callable[[Any, range], Arrays]


class RowImages(ABC):
    """Images 0..count-1 of a row."""

    caption: str  # for progress
    count: int
    labels: npt.NDArray[np.int64] | None  # of all images; None: unknown
    paths: Sequence[Path] = ()  # of the files, if they are files
    notes: Sequence[str] = ()  # for the record
    samples: Samples | None = None  # tells what a network's images cost
    # what they depend on beside files of the tokenizer; None: an interrupted row is not resumed
    identity: Mapping[str, Any] | None = None

    @abstractmethod
    def read(self, rows: range) -> tuple[Any, Sequence[ImageInfo] | None]:
        """Some images, uint8 [B, 3, H, W], or of files a list of [H, W, 3] with their infos."""

    def found(self, look: Look, read: Any, rows: range) -> Arrays:
        """What a look finds of images that were read."""
        return look(read, rows)


@dataclass(frozen=True)
class Job:
    """One row before it is measured: a network with sampler settings, or a fixed set of images."""

    name: str  # in tables
    section: Section  # block of the table
    loaded: Generator  # for a fixed set, the network whose tokenizer or classes it has
    settings: SamplerSettings | None = None  # None for a fixed set
    images: RowImages | None = None  # the fixed set
    student: str | None = None  # where it was loaded from: run, name or hf:// address
    tuning: Tuning | None = None  # the sweep that chose the settings (`bench.tuning`)

    @property
    def caption(self) -> str:
        """The name with the number of steps, for progress."""
        if self.settings is None or self.settings.sampler == "one_step":
            return self.name
        return f"{self.name}, {self.settings.num_steps} steps"


_KNOB_FIELDS = (  # knobs with a field of their own in records
    *("mask_schedule", "guidance_scale", "temperature", "choice_temperature"),
    *("final_temperature", "theta", "random_start", "top_k", "top_p"),
)


def method_info(job: Job, samples: Samples | None) -> MethodInfo:
    """The part of a record that describes the row; `samples`, of a network, say what it costs."""
    settings, student = job.settings, job.loaded.student
    training: dict[str, Any] = {}
    if student is not None and settings is not None:
        training = {
            "recipe": student.recipe,
            "method": student.method,
            "seconds": student.training_seconds,
            "images_seen": student.images_seen,
            "seed": student.seed,
            **({"recipe_sha256": student.recipe_sha256} if student.recipe_sha256 else {}),
            **({"ablation": student.ablation} if student.ablation else {}),
        }
    # False and float32 are left out, as in records from before there was a choice
    knobs = {
        name: None if value is False else value
        for name, value in (settings.knobs if settings else {}).items()
    }
    precision = settings.precision if settings else "float32"
    fields = {name: knobs.pop(name, None) for name in _KNOB_FIELDS}
    others = {name: value for name, value in knobs.items() if value is not None}
    return MethodInfo(
        name=job.name,
        section=job.section,
        teacher=job.loaded.teacher.name,
        sampler=settings.sampler if settings else None,
        num_steps=settings.num_steps if settings else None,
        nfe=samples.nfe if samples else None,
        token_counts=tuple(samples.token_counts) if samples else None,
        selected_by=settings.selected_by if settings else "nothing to select",
        weights_sha256=job.loaded.weights_sha256 if settings else None,
        training=training,
        network_precision=None if precision == "float32" else precision,
        student=job.student,
        tuning=job.tuning,
        settings=others or None,
        **fields,
    )


_AS_PUBLISHED = Choice()


def jobs_of(
    loaded: Generator,
    steps: Sequence[int],
    choice: Choice = _AS_PUBLISHED,
    *,
    student_steps: Sequence[int] = (1,),
) -> list[Job]:
    """The jobs of one network: a teacher at `steps`, or a student at `student_steps`.

    Rows of the teacher's own sampler are in the section "Teacher", others in "Sampler". Settings of
    `choice` that a row's sampler does not have are ignored; the precision is that of the network.
    """
    choice = dataclasses.replace(choice, precision=loaded.precision)
    teacher, student = loaded.teacher, loaded.student
    if student is None:
        return _jobs(loaded, teacher_settings(teacher, steps, choice))
    return _jobs(loaded, student_settings(student, teacher.num_tokens, student_steps, choice))


def _jobs(
    loaded: Generator, rows: Sequence[SamplerSettings], student: str | None = None
) -> list[Job]:
    if loaded.student is not None:
        return [Job(loaded.name, "Distill.", loaded, row, student=student) for row in rows]
    own = loaded.teacher.defaults.sampler
    return [
        Job(loaded.name, "Teacher", loaded, row)
        if row.sampler == own
        else Job(SAMPLERS[row.sampler].label, "Sampler", loaded, row)
        for row in rows
    ]


@dataclass(frozen=True)
class Planned:
    """A network and its rows, before any weights are read."""

    teacher: Teacher
    rows: Sequence[SamplerSettings]  # at least one
    student: FoundStudent | None = None  # None for a teacher
    model: str | None = None  # name or address of the student
    name: str | None = None  # in tables; None: its default name


def plan_jobs(
    teacher: str,
    models: Sequence[str],
    steps: Sequence[int],
    *,
    weights: Path | None = None,
    choice: Choice = _AS_PUBLISHED,
    student_steps: Sequence[int] = (1,),
) -> list[Planned]:
    """A teacher at each number of steps, then its students; checks settings and files.

    Args:
        teacher: Its name; "": the teacher of the first student, else `digits`.
        models: Students, as for `parse_candidate`.
        steps: Step counts of the teacher (empty: no teacher row) and of multi-step students.
        student_steps: Step counts of one-step students.

    Raises:
        DimoError: Unknown or missing networks, a student of another teacher, bad settings.
    """
    candidates = [parse_candidate(text) for text in models]
    students = [find_student(candidate.model, weights=weights) for candidate in candidates]
    row = get_teacher(teacher or (students[0].config.teacher if students else "digits"))
    planned = [Planned(row, teacher_settings(row, steps, choice))] if steps else []
    for candidate, student in zip(candidates, students, strict=True):
        own = student.config.teacher
        if own != row.name:
            advice = "bench the students of one teacher at a time"
            raise DimoError(
                f"student {candidate.model!r} was distilled from {own!r}, not from {row.name!r}; "
                f"{f'use --teacher {own}' if teacher else advice}"
            )
        planned.append(_plan_student(candidate, student, steps, student_steps, choice))
    return _checked(planned, choice)


def plan_models(
    models: Sequence[str],
    steps: Sequence[int],
    *,
    weights: Path | None = None,
    choice: Choice = _AS_PUBLISHED,
    student_steps: Sequence[int] = (1,),
) -> list[Planned]:
    """As `plan_jobs`, for any teachers and students in the given order."""
    planned = []
    for text in models:
        candidate = parse_candidate(text)
        if is_teacher(candidate.model):
            row = get_teacher(candidate.model)
            settings = teacher_settings(row, candidate.steps or steps, choice)
            planned.append(Planned(row, settings, name=candidate.name))
        else:
            student = _find_student(candidate.model, weights)
            planned.append(_plan_student(candidate, student, steps, student_steps, choice))
    return _checked(planned, choice)


def _checked(planned: list[Planned], choice: Choice) -> list[Planned]:
    if not planned:
        raise DimoError("there is nothing to score; name step counts with --steps or a --student")
    check_used([settings for entry in planned for settings in entry.rows], choice)
    return planned


def load_planned(
    planned: Sequence[Planned],
    *,
    device: torch.device,
    weights: Path | None = None,
    prompts: Sequence[str] | None = None,
) -> list[Job]:
    """Loads the networks in the precision of their rows; arguments and errors as `load_teacher`."""
    jobs = []
    for entry in planned:
        precision = entry.rows[0].precision  # one choice made all rows
        given: dict[str, Any] = {"weights": weights, "precision": precision, "prompts": prompts}
        if entry.student is None:
            loaded = load_teacher(entry.teacher.name, device=device, **given)
        else:
            loaded = load_student(entry.student, device=device, **given)
        if entry.name is not None:
            loaded = dataclasses.replace(loaded, name=entry.name)
        jobs += _jobs(loaded, entry.rows, entry.model)
    return jobs


def _plan_student(
    candidate: Candidate,
    student: FoundStudent,
    steps: Sequence[int],
    student_steps: Sequence[int],
    choice: Choice,
) -> Planned:
    teacher = get_teacher(student.config.teacher)
    is_one_step = METHODS[student.config.method].is_one_step
    counts = candidate.steps or (student_steps if is_one_step else steps)
    if not counts:
        raise DimoError(
            f"{candidate.model!r} has no step counts; name them, e.g. {candidate.model}@2,4"
        )
    settings = student_settings(student.config, teacher.num_tokens, counts, choice)
    model = student.address or candidate.model  # with the commit
    return Planned(teacher, settings, student, model, candidate.name)


def _find_student(name: str, weights: Path | None) -> FoundStudent:
    try:
        return find_student(name, weights=weights)
    except DimoError as error:
        if name in PUBLISHED_STUDENTS:
            raise
        raise DimoError(f"{name} is no teacher ({', '.join(TEACHERS)}), and {error}") from error


def image_set_method(name: str, section: Section, num_steps: int | None) -> MethodInfo:
    """The method of images in files, of which little is known."""
    return MethodInfo(
        name=name,
        section=section,
        teacher=None,
        sampler=None,
        num_steps=num_steps,
        nfe=None,
        mask_schedule=None,
        token_counts=None,
        guidance_scale=None,
        temperature=None,
        choice_temperature=None,
        selected_by="not known",
        weights_sha256=None,
        training={},
    )
