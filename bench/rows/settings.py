"""(model, sampler settings, seed) -> image batches. Image i depends on the seed and i alone.

Which sampler settings make which rows: pure functions, checked before any weights are read.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from bench.images.codec import ImageBatch, to_uint8
from bench.protocol import Protocol, list_protocols
from bench.protocol.catalog import BUNDLED_PROMPTS
from dimo.errors import DimoError, unknown_name
from dimo.masking import DECODING_SCHEDULES, UNMASKING_RATES, check_steps
from dimo.methods import METHODS
from dimo.models.cpu import check_precision
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS
from dimo.samplers.base import Samples
from dimo.samplers.student import sample_few_step, sample_one_step
from dimo.zoo.loading import Generator
from dimo.zoo.students import StudentConfig
from dimo.zoo.teachers import SamplerDefaults, Teacher, get_teacher

STUDENT_SAMPLERS: Mapping[str, Callable[..., Samples]] = {
    "one_step": sample_one_step,
    "few_step": sample_few_step,
}
# of teachers, then of students
ALL_SAMPLERS: Mapping[str, Callable[..., Samples]] = {**SAMPLERS, **STUDENT_SAMPLERS}

# what a sampler may have beside its number of steps; fields of `SamplerSettings`
SETTINGS = (
    "mask_schedule",
    "guidance_scale",
    "temperature",
    "final_temperature",
    "choice_temperature",
    "theta",
    "random_start",
    "top_k",
    "top_p",
)


@dataclass(frozen=True)
class SamplerSettings:
    """What the model may choose, as opposed to what the protocol fixes.

    None (and no random start): the sampler's own default, or it has no such setting.

    Attributes:
        sampler: A key of `dimo.samplers.SAMPLERS`, or "one_step" or "few_step" of a student.
        num_steps: Sampling steps.
        temperature: Divides the logits.
        mask_schedule: How many tokens each step reveals, or at what rate.
        guidance_scale: Strongest s, 1 = off.
        choice_temperature: Of the confidence noise.
        theta: Where in a step of theta-trapezoidal the second prediction is.
        final_temperature: Of the last step, for a temperature that changes on the way.
        random_start: Whether each image starts at a place of its own in the Halton order.
        top_k: Draws among the k likeliest tokens only.
        top_p: Draws among the likeliest tokens that together reach this probability.
        precision: What the network computes in; set when it is loaded.
        selected_by: How these values were chosen.

    Raises:
        DimoError: Unknown sampler, or a setting that this sampler does not have.
    """

    sampler: str
    num_steps: int = 1
    temperature: float = 1.0
    mask_schedule: str | None = None
    guidance_scale: float | None = None
    choice_temperature: float | None = None
    theta: float | None = None
    final_temperature: float | None = None
    random_start: bool = False
    top_k: int | None = None
    top_p: float | None = None
    precision: str = "float32"
    selected_by: str = "default"

    def __post_init__(self) -> None:
        takes = settings_of(self.sampler)
        for name in SETTINGS:
            value = getattr(self, name)
            if name not in takes and value is not None and value is not False:
                known = ", ".join(sorted(takes))
                raise DimoError(f"sampler {self.sampler!r} has no {name} ({value}); it has {known}")

    def changed(self, **changes: Any) -> Self:
        """A copy with changes; a new `temperature` alone holds at every step."""
        if "temperature" in changes:
            changes = {"final_temperature": None, **changes}
        return dataclasses.replace(self, **changes)


@functools.cache
def settings_of(sampler: str) -> Mapping[str, Any]:
    """The settings a sampler has beside its number of steps, with its own defaults.

    Raises:
        DimoError: Unknown sampler.
    """
    if sampler not in ALL_SAMPLERS:
        raise unknown_name("sampler", sampler, ALL_SAMPLERS)
    parameters = inspect.signature(ALL_SAMPLERS[sampler]).parameters
    return {name: parameters[name].default for name in SETTINGS if name in parameters}


def sample_tokens(
    loaded: Generator,
    settings: SamplerSettings,
    *,
    labels: torch.Tensor,
    seed: int,
    index: torch.Tensor,
) -> Samples:
    """Tokens of images `index` [B] under conditions `labels` [B].

    Raises:
        DimoError: Settings the sampler refuses.
    """
    given = {
        name: value
        for name in settings_of(settings.sampler)
        if (value := getattr(settings, name)) is not None
    }
    if settings.sampler != "one_step":
        given["num_steps"] = settings.num_steps
    if settings.sampler in STUDENT_SAMPLERS:
        assert loaded.student is not None, "this sampler is for a distilled student"
        given["init_mask_ratio"] = loaded.student.init_mask_ratio
        given["embedding_noise"] = loaded.student.embedding_noise
        given["token_initialization"] = loaded.student.token_initialization
    if loaded.unconditional is not None:
        assert settings.sampler == "confidence", "only this sampler takes another model beside"
        given["unconditional"] = loaded.unconditional
    sample = ALL_SAMPLERS[settings.sampler]
    return sample(loaded.model, labels, ImageNoise(seed, index), **given)


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
    """Images `index` [B] under conditions `labels` [B], rounded by the rule `uint8`.

    Raises:
        DimoError: As `sample_tokens`.
    """
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
    """Makes images 0..num_images-1 in order; the label of image i is i modulo the conditions.

    Args:
        loaded: Network and tokenizer.
        settings: How to sample.
        seed: The protocol's seed.
        num_images: How many.
        batch_size: How many at a time; has no influence on any image.
        uint8: Rounding rule of the protocol.
        device: Where the network is.
    """
    for start in range(0, num_images, batch_size):
        index = torch.arange(start, min(start + batch_size, num_images), device=device)
        labels = index % loaded.num_conditions
        yield sample_images(loaded, settings, labels=labels, seed=seed, index=index, uint8=uint8)


# numeric settings -> whether a value is allowed, and the rule in words
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x > 0, "above 0; 1 is as trained"),
    "guidance_scale": (lambda x: x > 0, "above 0; 1 is off"),
    "final_temperature": (lambda x: x > 0, "above 0; 1 is as trained"),
    "choice_temperature": (lambda x: x >= 0, "at least 0; 0 is no noise"),
    "theta": (lambda x: 0 < x < 1, "strictly between 0 and 1; e.g. 0.5"),
    "top_k": (lambda x: x >= 1, "at least 1; all tokens without this option"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1; all tokens without this option"),
}

_CONTINUOUS = ("tau_leaping", "theta_trapezoidal")  # any number of predictions, rates
_FEW_STEP_SCHEDULES = ("arccos", "cosine")


@dataclass(frozen=True)
class Choice:
    """What a user asks of the rows; nothing: the defaults of teacher, student and sampler.

    Attributes:
        samplers: How teachers are sampled; empty: by their own sampler.
        schedules: A row for each, of the samplers that know it.
        settings: Values that replace defaults in the rows that have the setting.
        precision: What the networks compute in.

    Raises:
        DimoError: Unknown sampler, schedule or precision; a value out of range.
    """

    samplers: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        for sampler in self.samplers:
            if sampler not in SAMPLERS:
                raise unknown_name("sampler", sampler, SAMPLERS)
        for schedule in self.schedules:
            if schedule not in (*DECODING_SCHEDULES, *UNMASKING_RATES):
                allowed = {*DECODING_SCHEDULES, *UNMASKING_RATES}
                raise unknown_name("schedule", schedule, allowed)
        for name, value in self.settings.items():
            is_allowed, words = RANGES[name]
            if not is_allowed(value):
                raise DimoError(f"{_option(name)} {value:g} must be {words}")


def teacher_settings(
    teacher: Teacher, steps: Sequence[int], choice: Choice
) -> list[SamplerSettings]:
    """A row for each sampler, schedule and number of steps.

    A sampler has the teacher's defaults, its own where the teacher says nothing or is sampled by
    another one (the schedule), and what `choice` says.

    Raises:
        DimoError: A number of steps that the grid does not take.
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
    """A student at each number of steps, at the temperature that was chosen for it, or as given.

    A one-step student by its own samplers; one of another method, which starts from masked tokens,
    by the confidence sampler with its teacher's settings.

    Raises:
        DimoError: A number of steps that the grid does not take.
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
    """A sampler's settings: the teacher's, the sampler's own where the teacher says nothing.

    A schedule is only of the sampler it was named for.
    """
    defaults = dict(settings_of(sampler))
    for name in defaults:
        value = getattr(own, name, None)
        if value is not None and (name != "mask_schedule" or sampler == own.sampler):
            defaults[name] = value
    return defaults


def check_used(rows: Sequence[SamplerSettings], choice: Choice) -> None:
    """A sampler or setting that no row has would be ignored without a word.

    Raises:
        DimoError: Names the setting, and the samplers that have it.
    """
    used = sorted({row.sampler for row in rows})
    for sampler in choice.samplers:
        if sampler not in used:
            raise DimoError(
                f"--sampler {sampler} is for teachers, and no teacher has a row; "
                "leave it out, or name a teacher with step counts"
            )
    for name, value in choice.settings.items():
        if not any(name in settings_of(sampler) for sampler in used):
            having = [sampler for sampler in ALL_SAMPLERS if name in settings_of(sampler)]
            raise _unused(_option(name), f"{value:g}", used, having)
    for schedule in choice.schedules:
        if not any(row.mask_schedule == schedule for row in rows):
            having = [sampler for sampler in ALL_SAMPLERS if schedule in _schedules_of(sampler)]
            raise _unused("--schedule", schedule, used, having)


def check_protocol(teacher: Teacher, protocol: Protocol) -> None:
    """Images of another size or other classes have nothing to do with a protocol's reference.

    Raises:
        DimoError: Names the protocols that fit.
    """
    if _fits(teacher, protocol):
        return
    fitting = [found.name for found in fitting_protocols(teacher)]
    images, side = protocol.images, teacher.image_size
    size = " x ".join(map(str, images.resolution)) if any(images.resolution) else "any"
    wanted = f"{images.num_classes:,} {'prompts' if protocol.prompts else 'classes'}"
    made = "prompts" if teacher.text else f"{teacher.num_classes:,} classes"
    raise DimoError(
        f"protocol {protocol.name!r} is for {size} images of {wanted}, and teacher "
        f"{teacher.name!r} makes {side} x {side} of {made}; "
        f"protocols that fit: {', '.join(fitting) or 'none'}"
    )


def fitting_protocols(teacher: Teacher) -> list[Protocol]:
    """The shipped protocols for images of this size and these classes, sorted by name."""
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
    known = [schedule for schedule in choice.schedules if schedule in _schedules_of(sampler)]
    names = [name.replace("_", " ") for name in given] + ["schedule"] * bool(known)
    if names:
        rest = f"; else {selected_by}" if selected_by else ""
        selected_by = f"{', '.join(names)} given on the command line{rest}"
    rows = []
    for changes in [{"mask_schedule": schedule} for schedule in known] or [{}]:
        for num_steps in steps:
            if sampler not in _CONTINUOUS:
                check_steps(num_steps, num_tokens)
            row = SamplerSettings(
                sampler,
                num_steps,
                precision=choice.precision,
                selected_by=selected_by,
                **defaults,
            )
            rows.append(row.changed(**given, **changes))
    return rows


def _schedules_of(sampler: str) -> Collection[str]:
    if sampler in _CONTINUOUS:
        return UNMASKING_RATES
    if sampler == "few_step":
        return _FEW_STEP_SCHEDULES
    return DECODING_SCHEDULES if "mask_schedule" in settings_of(sampler) else ()


def _unused(option: str, value: str, used: Sequence[str], having: Sequence[str]) -> DimoError:
    return DimoError(
        f"{option} {value} is a setting of no row: samplers {', '.join(used) or 'none'}; "
        f"it is one of {', '.join(having)}"
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
