"""(model, sampler settings, seed) -> image batches. Image i depends on the seed and i alone."""

__all__ = ["SamplerSettings", "generate", "sample_images", "sample_tokens"]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.images import ImageBatch, to_uint8
from dimo.errors import unknown_name
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS
from dimo.samplers.one_step import sample_one_step
from dimo.samplers.types import Samples
from dimo.teachers import Loaded


@dataclass(frozen=True)
class SamplerSettings:
    """What the model may choose, as opposed to what the protocol fixes.

    Attributes:
        sampler: A key of `dimo.samplers.SAMPLERS`, or "one_step" of a student.
        num_steps: Sampling steps.
        temperature: Divides the logits.
        mask_schedule: How many tokens each step reveals; None: the sampler's own.
        guidance_scale: s at the last step, 1 = off; None: the sampler has none.
        choice_temperature: Of the confidence noise; None: the sampler has none.
        selected_by: How these values were chosen.
    """

    sampler: str
    num_steps: int = 1
    temperature: float = 1.0
    mask_schedule: str | None = None
    guidance_scale: float | None = None
    choice_temperature: float | None = None
    selected_by: str = "default"


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
        DimoError: Unknown sampler, or settings the sampler refuses.
    """
    noise = ImageNoise(seed, index)
    if settings.sampler == "one_step":
        assert loaded.student is not None, "one_step samples a distilled student"
        return sample_one_step(
            loaded.model,
            labels,
            noise,
            init_mask_ratio=loaded.student.init_mask_ratio,
            embedding_noise=loaded.student.embedding_noise,
            temperature=settings.temperature,
        )
    if settings.sampler not in SAMPLERS:
        raise unknown_name("sampler", settings.sampler, [*SAMPLERS, "one_step"])
    given: dict[str, Any] = {
        name: value
        for name in ("mask_schedule", "guidance_scale", "choice_temperature")
        if (value := getattr(settings, name)) is not None
    }
    return SAMPLERS[settings.sampler](
        loaded.model,
        labels,
        noise,
        num_steps=settings.num_steps,
        temperature=settings.temperature,
        **given,
    )


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
    """Makes images 0..num_images-1 in order; the label of image i is i modulo the classes.

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
        labels = index % loaded.teacher.num_classes
        yield sample_images(loaded, settings, labels=labels, seed=seed, index=index, uint8=uint8)
