"""What a row of the table of teachers says; the table itself is `dimo.teachers`."""

__all__ = ["Architecture", "Network", "SamplerDefaults", "Teacher", "TextConditioning"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from dimo.models import Tokenizer
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.meissonic import Meissonic
from dimo.models.scenes import SceneTransformer
from dimo.models.text import TextConditioned, TextEncoder
from dimo.worlds import World

Network: TypeAlias = MaskGIT | HaltonMaskGIT | TextConditioned
Architecture: TypeAlias = (
    type[MaskGIT] | type[HaltonMaskGIT] | type[Meissonic] | type[SceneTransformer]
)


@dataclass(frozen=True)
class SamplerDefaults:
    """Settings of the multi-step sampler in comparisons, and how they were chosen.

    Attributes:
        sampler: The teacher's own sampler, a key of `dimo.samplers.SAMPLERS`.
        mask_schedule: Of that sampler; another one takes its own default.
        guidance_scale: s, 1 = off.
        temperature: Divides the logits.
        selected_by: Where the values come from.
        choice_temperature: Of the confidence noise; None: the sampler's default, if it has any.
        final_temperature: Of the last step; None: `temperature` throughout.
        random_start: Whether each image starts at a place of its own in the Halton order.
    """

    sampler: str
    mask_schedule: str
    guidance_scale: float
    temperature: float
    selected_by: str
    choice_temperature: float | None = None
    final_temperature: float | None = None
    random_start: bool = False


@dataclass(frozen=True)
class TextConditioning:
    """How a teacher reads prompts.

    Attributes:
        encoder: Builds the text encoder from its weights file, the row's role "text"; from nothing
            where the row has no such role.
        negative_prompt: What stands for no condition in guidance.
        length: Tokens of an encoded prompt.
        states_dim: Width of each.
        pooled_dim: Width of the vector of the whole prompt.
        check: Raises a `DimoError` for a prompt that it cannot read; None: it reads any.
    """

    encoder: Callable[..., TextEncoder]
    negative_prompt: str
    length: int
    states_dim: int
    pooled_dim: int
    check: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Teacher:
    """One row of the table.

    Attributes:
        name: What `--teacher` takes.
        title: Name in tables.
        architecture: The class of the network.
        network: Its constructor arguments.
        tokenizer: Builds the tokenizer from its weights file.
        weights: Role ("transformer", "tokenizer", "text") -> a name of `dimo.official.OFFICIAL`, or
            the name of a file that comes with the package.
        image_size: Side of its images in pixels.
        num_tokens: L.
        num_classes: Size of the condition; 0: it is text, and its prompts are numbered instead.
        names: Returns one name a class, for captions.
        label_smoothing: Of the teacher's training; the auxiliary model uses the same.
        defaults: Sampler settings for comparisons.
        recipe: The Di[M]O recipe taken when none is named; None: there is none yet.
        other_recipes: Those of the other methods, by their keys in `dimo.students.METHODS`.
        text: How it reads prompts; None: its condition is a class.
        world: The embedded data it is trained from; None: its weights are published.
    """

    name: str
    title: str
    architecture: Architecture
    network: Mapping[str, Any]
    tokenizer: Callable[[Path], Tokenizer]
    weights: Mapping[str, str]
    image_size: int
    num_tokens: int
    num_classes: int
    names: Callable[[], tuple[str, ...]]
    label_smoothing: float
    defaults: SamplerDefaults
    recipe: str | None = None
    other_recipes: Mapping[str, str] = field(default_factory=dict)
    text: TextConditioning | None = None
    world: World | None = None

    @property
    def recipes(self) -> dict[str, str]:
        """The recipe that each distillation method takes when none is named."""
        return {**({"dimo": self.recipe} if self.recipe else {}), **self.other_recipes}

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""
        return self.names()

    @property
    def is_embedded(self) -> bool:
        """Whether its weights come with the package, and its training data too."""
        return self.world is not None
