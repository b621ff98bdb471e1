"""(model, sampler settings, seed) -> image batches. Image i depends on the seed and i alone."""

__all__ = [
    "ALL_SAMPLERS",
    "SETTINGS",
    "STUDENT_SAMPLERS",
    "SamplerSettings",
    "generate",
    "sample_images",
    "sample_tokens",
    "settings_of",
]

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from bench.images import ImageBatch, to_uint8
from dimo.errors import DimoError, unknown_name
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS
from dimo.samplers.few_step import sample_few_step
from dimo.samplers.one_step import sample_one_step
from dimo.samplers.types import Samples
from dimo.teachers import Loaded

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
    loaded: Loaded,
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
    loaded: Loaded,
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
    loaded: Loaded,
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
