"""Drawing images with a loaded teacher or student."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.models import MaskedModel, Tokenizer
from dimo.models.text import Prompts, TextConditioned
from dimo.rng import ImageNoise
from dimo.samplers import get_sampler
from dimo.samplers.base import Samples
from dimo.samplers.inpainting import Inpainting, KnownTokens, known_tokens
from dimo.zoo.students import StudentConfig
from dimo.zoo.teachers import Teacher, TextConditioning

_TEACHER_STEPS = 16
_INITIALIZATION = ("init_mask_ratio", "embedding_noise", "token_initialization")


class Images(Tensor):
    """uint8 [B, 3, H, W] on the CPU."""

    def pil(self) -> list[Any]:
        """A `PIL.Image` of each."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.permute(0, 2, 3, 1).numpy()]


@dataclass(frozen=True)
class Generator:
    """A network ready to sample, with its tokenizer."""

    teacher: Teacher  # for a student, its teacher's row
    model: MaskedModel  # in eval mode
    tokenizer: Tokenizer
    weights_sha256: str  # of the network's weights file
    name: str  # in tables
    student: StudentConfig | None = None
    precision: str = "float32"  # a key of `dimo.models.cpu.PRECISIONS`
    unconditional: MaskedModel | None = None  # for the unconditional half of guidance
    known: KnownTokens | None = None  # of the image that is edited, see `editing`

    @property
    def num_conditions(self) -> int:
        """Number of classes, or of the prompts it was loaded with."""
        return self.model.num_classes

    @property
    def condition_names(self) -> Sequence[str]:
        """One name per class, or the prompts."""
        if isinstance(self.model, TextConditioned):
            return self.model.conditions.prompts
        return self.teacher.class_names

    def editing(self, image: Tensor, mask: Tensor) -> "Generator":
        """The same for edits of an image; as `known_tokens`, and refuses a one-step student."""
        if self.student is not None and METHODS[self.student.method].is_one_step:
            raise DimoError(
                f"{self.name} cannot edit images: it learned to draw from random tokens, not to "
                f"continue known ones; use its teacher, {self.teacher.name}, at one step or more"
            )
        known = known_tokens(image, mask, self.tokenizer, self.teacher.image_size)
        return dataclasses.replace(self, known=known)

    def sample(
        self,
        labels: Sequence[int] | Tensor | None = None,
        *,
        prompts: Sequence[str] | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        batch_size: int = 50,
        **settings: Any,
    ) -> Images:
        """Draws images; image i depends only on the seed, i and its condition.

        They are those of `dimo sample` and `dimo bench` for the same seed and conditions.

        Args:
            labels: One class per image, or the number of a prompt it was loaded with.
            prompts: One prompt per image, in place of labels.
            image: An image to edit, uint8 [3, H, W]: tokens that `mask` leaves out are kept.
            mask: Its pixels to paint again, bool [H, W]; see `dimo.samplers.inpainting`.
            steps: Sampling steps; default: 16 for a teacher, 1 for a one-step student. An edit
                takes no more of them than it has masked tokens.
            sampler: A key of `dimo.samplers.SAMPLERS` for a teacher; default: the teacher's own.
            batch_size: Images at a time; changes speed and memory only.
            **settings: Replace the teacher's or student's settings of the sampler, e.g.
                `temperature`.

        Raises:
            DimoError: Conditions of the wrong kind or out of range, an unknown sampler, or a
                setting that it does not have or refuses; an image without a mask, or as `editing`.
        """
        generator, labels = self._conditioned_on(labels, prompts)
        if (image is None) != (mask is None):
            raise DimoError("an edit takes image= and mask=; give both, or neither")
        if image is not None and mask is not None:
            generator = generator.editing(image, mask)
        sampler, chosen = self._settings(sampler, steps, settings)
        device = next(self.model.parameters()).device
        conditions = torch.as_tensor(labels, dtype=torch.int64, device=device)
        parts = []
        with torch.inference_mode():
            for index in torch.split(torch.arange(len(conditions), device=device), batch_size):
                noise = ImageNoise(seed, index)
                samples = generator.sample_tokens(sampler, conditions[index], noise, **chosen)
                levels = (self.tokenizer.decode(samples.tokens).float() + 1) * 127.5 + 0.5
                parts.append(levels.floor().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(parts).as_subclass(Images)

    def sample_tokens(
        self, sampler: str, labels: Tensor, noise: ImageNoise, *, num_steps: int, **knobs: Any
    ) -> Samples:
        """Samples one grid per label [B] with a key of `dimo.samplers.SAMPLERS` and its knobs."""
        row, known = get_sampler(sampler), self.known
        if known is not None and not row.any_steps:
            num_steps = min(num_steps, known.count)
        if sampler != "one_step":
            knobs["num_steps"] = num_steps
        if row.of_student:
            assert self.student is not None, "this sampler is for a distilled student"
            knobs |= {key: getattr(self.student, key) for key in _INITIALIZATION}
        if self.unconditional is not None:
            assert row.takes_unconditional, "this sampler takes no unconditional model"
            knobs["unconditional"] = self._given_known(self.unconditional)
        samples: Samples = row(self._given_known(self.model), labels, noise, **knobs)
        if known is None:
            return samples
        return dataclasses.replace(samples, tokens=known.completed(samples.tokens))

    def _given_known(self, model: MaskedModel) -> MaskedModel:
        return model if self.known is None else Inpainting(model, self.known)

    def _conditioned_on(
        self, labels: Sequence[int] | Tensor | None, prompts: Sequence[str] | None
    ) -> tuple["Generator", Sequence[int] | Tensor]:
        model = self.model
        if prompts is not None and isinstance(model, TextConditioned):
            text, known = self.teacher.text, model.conditions
            assert text is not None
            assert isinstance(known, Prompts)
            check_prompts(text, prompts)
            new = Prompts(known.encoder, prompts, negative_prompt=text.negative_prompt)
            model = TextConditioned(model.network, new)
            return dataclasses.replace(self, model=model), range(len(prompts))
        if prompts is not None or labels is None or not len(labels):
            example = "prompts=['...']" if self.teacher.text else "labels=[0]"
            raise DimoError(f"{self.name} needs one condition per image; e.g. {example}")
        return self, labels

    def _settings(
        self, sampler: str | None, steps: int | None, settings: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """The sampler and its settings, with the number of steps."""
        student, own = self.student, self.teacher.defaults
        if student is None:
            sampler, steps = sampler or own.sampler, steps or _TEACHER_STEPS
        elif sampler is not None:
            raise DimoError(f"sampler {sampler!r} is for teachers; leave it out for {self.name}")
        else:
            method = METHODS[student.method]
            steps = steps or method.default_steps
            one_step = "one_step" if steps == 1 else "few_step"
            sampler = one_step if method.is_one_step else method.sampler
        knobs = {knob.name: knob for knob in get_sampler(sampler).knobs}
        for key, value in settings.items():
            if key not in knobs:
                allowed = ", ".join(knobs)
                raise DimoError(f"this sampler has no setting {key!r}; allowed: {allowed}")
            if value is not None:
                knobs[key].check(value)
        chosen = {key: value for key, value in vars(own).items() if value is not None}
        if sampler != own.sampler:
            del chosen["mask_schedule"]
        if student is not None:
            chosen["temperature"] = student.temperature
            chosen["guidance_scale"] = student.guidance_scale or own.guidance_scale
        if "temperature" in settings:
            chosen["final_temperature"] = None  # a given temperature holds at every step
        chosen = {key: value for key, value in {**chosen, **settings}.items() if key in knobs}
        return sampler, {"num_steps": steps, **chosen}


def check_prompts(text: TextConditioning, prompts: Sequence[str]) -> None:
    if text.check is not None:
        for prompt in dict.fromkeys(prompts):
            text.check(prompt)
