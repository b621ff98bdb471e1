"""Rows to be: which networks are scored, and with which settings."""

__all__ = [
    "Cost",
    "Job",
    "jobs_of",
    "load_jobs",
    "method_info",
    "reference_jobs",
    "student_job",
    "teacher_jobs",
]

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.generate import SamplerSettings
from bench.images import to_uint8
from bench.protocol import Protocol
from bench.record import MethodInfo, Section
from bench.references import reference_images
from dimo.errors import DimoError, unknown_name
from dimo.masking import tokens_per_step
from dimo.teachers import Loaded, load_student, load_teacher


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
    """

    name: str
    section: Section
    loaded: Loaded
    settings: SamplerSettings | None = None
    images: Tensor | None = None
    labels: Tensor | None = None

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
    training = {}
    if student is not None and settings is not None:
        training = {
            "recipe": student.recipe,
            "seconds": student.training_seconds,
            "images_seen": student.images_seen,
            "seed": student.seed,
        }
    return MethodInfo(
        name=job.name,
        section=job.section,
        teacher=job.loaded.teacher.name,
        sampler=settings.sampler if settings else None,
        num_steps=settings.num_steps if settings else None,
        nfe=cost.nfe if cost else None,
        mask_schedule=settings.mask_schedule if settings else None,
        token_counts=cost.token_counts if cost else None,
        guidance_scale=settings.guidance_scale if settings else None,
        temperature=settings.temperature if settings else None,
        choice_temperature=settings.choice_temperature if settings else None,
        selected_by=settings.selected_by if settings else "nothing to select",
        weights_sha256=job.loaded.weights_sha256 if settings else None,
        training=training,
    )


# name in tables, mask schedule where it is not the teacher's; the rest is as for the teacher
_SAMPLERS = {
    "confidence": ("MaskGIT", None),
    "random": ("Random order", None),
    "halton": ("Halton order", "arccos-halton"),
    "tau_leaping": ("τ-leaping", "log-linear"),
    "theta_trapezoidal": ("θ-trapezoidal", "log-linear"),
}


def teacher_jobs(
    loaded: Loaded,
    steps: Sequence[int],
    overrides: Mapping[str, float],
    samplers: Sequence[str] = ("confidence",),
) -> list[Job]:
    """The teacher at each number of steps, with its defaults unless `overrides` say otherwise.

    Its own sampler makes the rows of the section "Teacher", others those of "Sampler"; these take
    the teacher's guidance and temperature.

    Raises:
        DimoError: Unknown sampler, or a number of steps that the grid does not take.
    """
    defaults = dataclasses.asdict(loaded.teacher.defaults) | dict(overrides)
    if overrides:
        defaults["selected_by"] = "given on the command line"
    jobs = []
    for sampler in samplers:
        if sampler not in _SAMPLERS:
            raise unknown_name("sampler", sampler, _SAMPLERS)
        name, schedule = _SAMPLERS[sampler]
        chosen = dict(defaults)
        if sampler != "confidence":
            chosen["choice_temperature"] = None
            chosen["mask_schedule"] = schedule or defaults["mask_schedule"]
        section: Section = "Teacher" if sampler == "confidence" else "Sampler"
        for num_steps in steps:
            if schedule != "log-linear":  # the others reveal at least a token a step
                tokens_per_step(chosen["mask_schedule"], num_steps, loaded.model.num_tokens)
            settings = SamplerSettings(sampler=sampler, num_steps=num_steps, **chosen)
            jobs.append(Job(name, section, loaded, settings))
    return jobs


def student_job(loaded: Loaded, temperature: float | None) -> Job:
    """A one-step student at the temperature its run chose, or at the given one."""
    assert loaded.student is not None
    chosen = (loaded.student.temperature, loaded.student.temperature_selected_by)
    if temperature is not None:
        chosen = (temperature, "given on the command line")
    settings = SamplerSettings(sampler="one_step", temperature=chosen[0], selected_by=chosen[1])
    return Job(loaded.name, "Distill.", loaded, settings)


def jobs_of(
    loaded: Loaded,
    steps: Sequence[int],
    overrides: Mapping[str, float],
    samplers: Sequence[str] = ("confidence",),
) -> list[Job]:
    """The jobs of one network: a teacher at each number of steps, or a student at one."""
    if loaded.student is None:
        return teacher_jobs(loaded, steps, overrides, samplers)
    return [student_job(loaded, overrides.get("temperature"))]


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
    overrides: Mapping[str, float] | None = None,
    samplers: Sequence[str] = ("confidence",),
) -> list[Job]:
    """Loads the networks: the teacher at each number of steps, then each student.

    Args:
        teacher: A name of `dimo.teachers`.
        students: Run folders or shipped names.
        steps: Step counts of the teacher; empty for no teacher row.
        device: Where to put the networks.
        weights: Folder of the teacher's weights; the shipped ones by default.
        overrides: Sampler settings that replace the defaults of every row that has them.
        samplers: How the teacher is sampled; keys of `dimo.samplers.SAMPLERS`.

    Raises:
        DimoError: Unknown or missing networks, a student of another teacher, bad settings.
    """
    given = dict(overrides or {})
    for key, value in given.items():
        if value <= 0:
            raise DimoError(f"--{key.replace('_', '-')} {value:g} must be above 0; 1 is as trained")
    source = load_teacher(teacher, device=device, weights=weights)
    jobs = teacher_jobs(source, steps, given, samplers)
    for name in students:
        loaded = load_student(name, device=device, weights=weights)
        if loaded.teacher.name != teacher:
            raise DimoError(
                f"student {name!r} was distilled from {loaded.teacher.name!r}, "
                f"not from {teacher!r}; use --teacher {loaded.teacher.name}"
            )
        jobs.append(student_job(loaded, given.get("temperature")))
    return jobs
