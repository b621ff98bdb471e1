"""Sampler settings of rows, checked before any weights are read, and images sampled with them.

Image i depends on model, settings, seed and i alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Self

import torch

from bench.images.codec import ImageBatch, to_uint8
from bench.protocol import Protocol, list_protocols, load_protocol
from bench.protocol.networks import BUNDLED_PROMPTS
from dimo.errors import DimoError, unknown_name
from dimo.masking import check_steps
from dimo.methods import METHODS
from dimo.models.cpu import check_precision
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS, Knob, all_knobs, get_sampler, teacher_samplers
from dimo.samplers.base import Samples
from dimo.zoo.generator import Generator
from dimo.zoo.students import StudentConfig
from dimo.zoo.teachers import SamplerDefaults, Teacher, get_teacher


@dataclass(frozen=True, init=False)
class SamplerSettings:
    """What the model may choose, as opposed to what the protocol fixes.

    `settings.theta` is `settings.knobs["theta"]`, and None if the sampler has no such knob.

    Raises:
        DimoError: Unknown sampler, or a setting that this sampler does not have.
    """

    sampler: str  # a key of `dimo.samplers.SAMPLERS`
    num_steps: int
    knobs: Mapping[str, Any]  # value of each knob of the sampler
    precision: str  # of the network; set when it is loaded
    selected_by: str  # how these values were chosen

    def __init__(
        self,
        sampler: str,
        num_steps: int = 1,
        *,
        precision: str = "float32",
        selected_by: str = "default",
        **knobs: Any,
    ) -> None:
        own = settings_of(sampler)
        for name, value in knobs.items():
            if name not in own and value is not None and value is not False:
                known = ", ".join(sorted(own))
                raise DimoError(f"sampler {sampler!r} has no {name} ({value}); it has {known}")
        given = {name: knobs[name] for name in own if knobs.get(name) is not None}
        fields = (sampler, num_steps, {**own, **given}, precision, selected_by)
        for name, value in zip(self.__dataclass_fields__, fields, strict=True):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "knobs" or name not in all_knobs():
            raise AttributeError(name)
        return self.knobs.get(name)

    def changed(self, **changes: Any) -> Self:
        """A copy with changes; a new `temperature` alone holds at every step."""
        if "temperature" in changes:
            changes = {"final_temperature": None, **changes}
        return type(self)(**{**self.plain(), **changes})

    def plain(self) -> dict[str, Any]:
        """All values by name, as keyword arguments of this class."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields.pop("knobs"), **fields}


def settings_of(sampler: str) -> Mapping[str, Any]:
    """The settings a sampler has beside its number of steps, with its own defaults."""
    return get_sampler(sampler).defaults


def sample_tokens(
    loaded: Generator,
    settings: SamplerSettings,
    *,
    labels: torch.Tensor,
    seed: int,
    index: torch.Tensor,
) -> Samples:
    """Tokens of images `index` [B] under conditions `labels` [B]."""
    given = {name: value for name, value in settings.knobs.items() if value is not None}
    return loaded.sample_tokens(
        settings.sampler, labels, ImageNoise(seed, index), num_steps=settings.num_steps, **given
    )


@torch.inference_mode()
def sample_images(
    loaded: Generator,
    settings: SamplerSettings,
    *,
    labels: torch.Tensor,
    seed: int,
    index: torch.Tensor,
    uint8: str,
) -> ImageBatch:
    """Images `index` [B] under conditions `labels` [B], rounded by the rule `uint8`."""
    samples = sample_tokens(loaded, settings, labels=labels, seed=seed, index=index)
    images = to_uint8(loaded.tokenizer.decode(samples.tokens), uint8)
    return ImageBatch(images, index, labels, samples.nfe)


@torch.inference_mode()
def generate(
    loaded: Generator,
    settings: SamplerSettings,
    *,
    seed: int,
    num_images: int,
    batch_size: int,
    uint8: str,
    device: torch.device,
) -> Iterator[ImageBatch]:
    """Samples images 0..num_images-1 in order; the label of image i is i modulo the conditions.

    `batch_size` changes no image; `uint8` is the rounding rule of the protocol.
    """
    for start in range(0, num_images, batch_size):
        index = torch.arange(start, min(start + batch_size, num_images), device=device)
        labels = index % loaded.num_conditions
        yield sample_images(loaded, settings, labels=labels, seed=seed, index=index, uint8=uint8)


@dataclass(frozen=True)
class Choice:
    """Sampler overrides from the command line; empty: the defaults of teacher and sampler.

    Raises:
        DimoError: Unknown sampler, schedule, knob or precision; a value out of range.
    """

    samplers: tuple[str, ...] = ()  # of teachers
    schedules: tuple[str, ...] = ()  # one row for each, with the samplers that accept it
    settings: Mapping[str, Any] = field(default_factory=dict)  # knob -> value, where a row has it
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        for sampler in self.samplers:
            if sampler not in teacher_samplers():
                raise unknown_name("sampler", sampler, teacher_samplers())
        allowed = {name for sampler in SAMPLERS.values() for name in sampler.schedules}
        for schedule in self.schedules:
            if schedule not in allowed:
                raise unknown_name("schedule", schedule, allowed)
        for name, value in self.settings.items():
            knob_named(name).check(value)


def knob_named(name: str) -> Knob:
    """The knob of that name; a `DimoError` if no sampler has it."""
    knobs = all_knobs()
    if name not in knobs:
        raise unknown_name("sampler setting", name, knobs)
    return knobs[name]


def teacher_settings(
    teacher: Teacher, steps: Sequence[int], choice: Choice
) -> list[SamplerSettings]:
    """One row per sampler, schedule and number of steps.

    Values come from `choice`, else from the teacher, else from the sampler. A teacher's schedule
    applies to its own sampler only. The number of steps must be in the range of the sampler.
    """
    own = teacher.defaults
    rows = []
    for sampler in choice.samplers or (own.sampler,):
        defaults = _defaults(sampler, own)
        words = own.selected_by
        if sampler != own.sampler:
            words = f"guidance and temperature as for the teacher ({words}), else the sampler's own"
        rows += _rows(sampler, steps, defaults, words, teacher.num_tokens, choice)
    return rows


def student_settings(
    student: StudentConfig, num_tokens: int, steps: Sequence[int], choice: Choice
) -> list[SamplerSettings]:
    """One row per number of steps, at the temperature of `choice`, else that of the student.

    One-step students have their own samplers. Students of other methods start from masked tokens
    and are sampled by confidence with their teacher's settings. Errors as `teacher_settings`.
    """
    if not METHODS[student.method].is_one_step:
        return _multi_step_settings(student, num_tokens, steps, choice)
    rows = []
    for num_steps in steps:
        sampler = "one_step" if num_steps == 1 else "few_step"
        defaults = {**settings_of(sampler), "temperature": student.temperature}
        words = student.temperature_selected_by
        if num_steps > 1:
            words = f"temperature as for one step: {words}"
        if "temperature" in choice.settings:
            words = ""
        rows += _rows(sampler, [num_steps], defaults, words, num_tokens, choice)
    return rows


def _multi_step_settings(
    student: StudentConfig, num_tokens: int, steps: Sequence[int], choice: Choice
) -> list[SamplerSettings]:
    own, sampler = get_teacher(student.teacher).defaults, METHODS[student.method].sampler
    defaults = {**_defaults(sampler, own), "temperature": student.temperature}
    if student.guidance_scale is not None:
        defaults["guidance_scale"] = student.guidance_scale
    words = f"temperature: {student.temperature_selected_by}; else as its teacher"
    if student.teacher_unconditional:
        words += "; its unconditional branch is the teacher"
    return _rows(sampler, steps, defaults, words, num_tokens, choice)


def _defaults(sampler: str, own: SamplerDefaults) -> dict[str, Any]:
    """Defaults of the teacher, else of the sampler; a schedule applies to the teacher's sampler."""
    defaults = dict(settings_of(sampler))
    for name in defaults:
        value = getattr(own, name, None)
        if value is not None and (name != "mask_schedule" or sampler == own.sampler):
            defaults[name] = value
    return defaults


def check_used(rows: Sequence[SamplerSettings], choice: Choice) -> None:
    """Refuses a sampler, schedule or setting that no row uses; names the samplers that have it."""
    used = sorted({row.sampler for row in rows})
    for sampler in choice.samplers:
        if sampler not in used:
            raise DimoError(
                f"--sampler {sampler} is for teachers, and no teacher has a row; "
                "leave it out, or name a teacher with step counts"
            )
    for name, value in choice.settings.items():
        if not any(name in settings_of(sampler) for sampler in used):
            having = [key for key, sampler in SAMPLERS.items() if name in sampler.defaults]
            raise _unused(knob_named(name).given(value), used, having)
    for schedule in choice.schedules:
        if not any(row.mask_schedule == schedule for row in rows):
            having = [key for key, sampler in SAMPLERS.items() if schedule in sampler.schedules]
            raise _unused(f"--schedule {schedule}", used, having)


def protocol_for(
    teacher: Teacher, named: str | PathLike[str] | None = None, *, option: str = "--protocol"
) -> Protocol:
    """The protocol of that name or file, else the teacher's own.

    Raises:
        DimoError: It is unknown or does not fit, or the teacher has none; `option` names one.
    """
    name = named or teacher.protocol
    if not name:
        fitting = ", ".join(protocol.name for protocol in fitting_protocols(teacher)) or "none"
        raise DimoError(
            f"teacher {teacher.name!r} has no protocol of its own; name one with {option} (bundled "
            f"ones that fit: {fitting})"
        )
    protocol = load_protocol(name)
    check_protocol(teacher, protocol)
    return protocol


def check_protocol(teacher: Teacher, protocol: Protocol) -> None:
    """Refuses a teacher whose image size or conditions do not fit; names protocols that do."""
    if _fits(teacher, protocol):
        return
    fitting = [other.name for other in fitting_protocols(teacher)]
    images, side = protocol.images, teacher.image_size
    size = " x ".join(map(str, images.resolution)) if any(images.resolution) else "any"
    conditions = f"{images.num_classes:,} {'prompts' if protocol.prompts else 'classes'}"
    made = "prompts" if teacher.text else f"{teacher.num_classes:,} classes"
    raise DimoError(
        f"protocol {protocol.name!r} is for {size} images of {conditions}, and teacher "
        f"{teacher.name!r} makes {side} x {side} of {made}; "
        f"protocols that fit: {', '.join(fitting) or 'none'}"
    )


def fitting_protocols(teacher: Teacher) -> list[Protocol]:
    """Bundled protocols for images of this size and these conditions, sorted by name."""
    return [protocol for protocol in list_protocols() if _fits(teacher, protocol)]


def _fits(teacher: Teacher, protocol: Protocol) -> bool:
    images, side = protocol.images, teacher.image_size
    if teacher.text is None and protocol.prompts is None:
        return (images.resolution, images.num_classes) == ((side, side), teacher.num_classes)
    if teacher.text is None or protocol.prompts is None:
        return False
    known = (protocol.prompts.name == BUNDLED_PROMPTS) == teacher.is_bundled
    return known and images.resolution in ((0, 0), (side, side))


def _rows(
    sampler: str,
    steps: Sequence[int],
    defaults: Mapping[str, Any],
    selected_by: str,
    num_tokens: int,
    choice: Choice,
) -> list[SamplerSettings]:
    given = {name: value for name, value in choice.settings.items() if name in defaults}
    row_of_sampler = get_sampler(sampler)
    known = [schedule for schedule in choice.schedules if schedule in row_of_sampler.schedules]
    names = [name.replace("_", " ") for name in given] + ["schedule"] * bool(known)
    if names:
        rest = f"; else {selected_by}" if selected_by else ""
        selected_by = f"{', '.join(names)} given on the command line{rest}"
    if not row_of_sampler.any_steps:
        for num_steps in steps:
            check_steps(num_steps, num_tokens)
    fixed = {**defaults, "precision": choice.precision, "selected_by": selected_by}
    return [
        SamplerSettings(sampler, num_steps, **fixed).changed(**given, **changes)
        for changes in [{"mask_schedule": schedule} for schedule in known] or [{}]
        for num_steps in steps
    ]


def _unused(option: str, used: Sequence[str], having: Sequence[str]) -> DimoError:
    return DimoError(
        f"{option} has no effect: no selected sampler ({', '.join(used) or 'none'}) uses it; "
        f"it applies to {', '.join(having)}"
    )
