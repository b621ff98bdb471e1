"""Loading teachers and distilled students, and drawing images with them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimo.data.tokens import TokenData, read_tokens, token_data
from dimo.engine.distributed import choose_device
from dimo.errors import DimoError, unknown_name
from dimo.methods import METHODS
from dimo.models import MaskedModel, MaskedNetwork, TextNetwork, Tokenizer
from dimo.models.cpu import prepare_for_inference
from dimo.models.text import Conditions, Prompts, TextConditioned, ZeroText
from dimo.rng import ImageNoise
from dimo.samplers import get_sampler
from dimo.samplers.base import Samples
from dimo.samplers.inpainting import Inpainting, KnownTokens, known_tokens
from dimo.util.files import sha256_file
from dimo.weights.catalog import ASSETS, OFFICIAL, locate
from dimo.zoo.bundled import EncodedImages
from dimo.zoo.students import FoundStudent, StudentConfig, find_student
from dimo.zoo.teachers import TEACHERS, Teacher, TextConditioning, get_teacher

_TEACHER_STEPS = 16
_INITIALIZATION = ("init_mask_ratio", "embedding_noise", "token_initialization")


def weights_file(teacher: Teacher, role: str, folder: Path | None = None) -> Path:
    """The weights file of a role, a key of the row's `weights`; a `DimoError` if it is missing.

    `folder` is searched; None: the package, or `dimo.weights.catalog.default_folder()`.
    """
    name = teacher.weights[role]
    if name in OFFICIAL:
        return locate(name, folder)
    path = (folder or ASSETS) / name
    if not path.is_file():
        train = f"train it with: dimo train --teacher {teacher.name}, and " * teacher.is_bundled
        raise DimoError(
            f"teacher {teacher.name!r} needs {path}; {train}give its folder with --weights"
        )
    return path


def make_network(
    teacher: Teacher,
    conditions: Conditions | None = None,
    architecture: type[MaskedNetwork] | None = None,
    **changes: Any,
) -> MaskedModel:
    """The row's network with fresh weights; `changes` replace its constructor arguments.

    Args:
        conditions: What the labels of a text-conditioned network stand for; None: zeros, to
            inspect the network alone.
        architecture: Replaces the row's.
    """
    build = architecture or teacher.architecture
    return _conditioned(teacher, build(**{**teacher.network, **changes}), conditions)


def load_network(
    teacher: Teacher,
    path: Path,
    conditions: Conditions | None = None,
    architecture: type[MaskedNetwork] | None = None,
) -> MaskedModel:
    """As `make_network`, with the weights of a file, which must fit; in eval mode on the CPU."""
    network = (architecture or teacher.architecture).from_official(path, **teacher.network)
    return _conditioned(teacher, network, conditions).eval()


def _conditioned(
    teacher: Teacher, network: MaskedNetwork, conditions: Conditions | None
) -> MaskedModel:
    if isinstance(network, MaskedModel):
        return network
    text = teacher.text
    if text is None or not isinstance(network, TextNetwork):
        raise TypeError(
            f"{type(network).__name__} of teacher {teacher.name!r} must be a MaskedModel, or a "
            "TextNetwork whose row sets `text`"
        )
    zero = ZeroText(text.length, text.states_dim, text.pooled_dim)
    return TextConditioned(network, zero if conditions is None else conditions)


def load_prompts(
    teacher: Teacher, prompts: Sequence[str] | None, weights: Path | None = None
) -> Prompts | None:
    """The prompts with the teacher's text encoder on the CPU; None if its condition is a class.

    Raises:
        DimoError: Prompts that are missing or that the teacher cannot read, or prompts for a
            class-conditional teacher; a missing or foreign weights file in the folder `weights`.
    """
    text = teacher.text
    if text is None:
        if prompts is not None:
            raise DimoError(
                f"teacher {teacher.name!r} draws classes, not prompts; leave the prompts out"
            )
        return None
    if prompts is None:
        raise DimoError(
            f"teacher {teacher.name!r} draws prompts; give them, to a distillation as a text file "
            "with one per line: --set prompts=FILE"
        )
    _check_prompts(text, prompts)
    files = [weights_file(teacher, "text", weights)] if "text" in teacher.weights else []
    return Prompts(text.encoder(*files), prompts, negative_prompt=text.negative_prompt)


def _check_prompts(text: TextConditioning, prompts: Sequence[str]) -> None:
    if text.check is not None:
        for prompt in dict.fromkeys(prompts):
            text.check(prompt)


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
            _check_prompts(text, prompts)
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


def student_architecture(teacher: Teacher, method: str) -> type[MaskedNetwork]:
    """The class of a student's network, which takes the constructor arguments of its teacher's.

    Raises:
        DimoError: Unknown method, or one that this teacher's network cannot have.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    architecture = METHODS[method].distillation.network(teacher.architecture)
    if architecture is None:
        raise DimoError(
            f"method {method!r} has no student network for teacher {teacher.name!r} "
            f"({teacher.architecture.__name__}); use another --method, or e.g. --teacher digits"
        )
    return architecture


def load_teacher(
    name: str,
    *,
    device: torch.device,
    weights: Path | None = None,
    precision: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Generator:
    """Loads a teacher and its tokenizer.

    Args:
        weights: Folder with the row's weight files; None: the bundled or the fetched ones.
        precision: A key of `dimo.models.cpu.PRECISIONS`; None leaves the network fit for training.
        prompts: What the labels of a text-conditioned teacher stand for.

    Raises:
        DimoError: Unknown teacher or precision; unfit weights file; as `load_prompts`.
    """
    teacher = get_teacher(name)
    path = weights_file(teacher, "transformer", weights)
    return _load(teacher, path, teacher.title, device, weights, precision, prompts=prompts)


def load_student(
    run: str | Path | FoundStudent,
    *,
    device: torch.device,
    weights: Path | None = None,
    precision: str | None = None,
    prompts: Sequence[str] | None = None,
    teacher_unconditional: bool | None = None,
) -> Generator:
    """Loads a distilled student and its tokenizer; arguments as of `load_teacher`.

    Args:
        run: As in `find_student`, or what that returned.
        teacher_unconditional: Also load the teacher's network, for the unconditional half of
            guidance (the official `--lfg` of di4c); None: as in the student's settings.

    Raises:
        DimoError: As `find_student` and `load_teacher`; a one-step student with
            `teacher_unconditional`.
    """
    student = run if isinstance(run, FoundStudent) else find_student(run, weights=weights)
    config, teacher = student.config, get_teacher(student.config.teacher)
    if teacher_unconditional is not None:
        config = dataclasses.replace(config, teacher_unconditional=teacher_unconditional)
    if config.teacher_unconditional and METHODS[config.method].is_one_step:
        raise DimoError(
            f"student {student.title} is sampled without guidance and has no unconditional branch; "
            "leave teacher_unconditional out"
        )
    loaded = _load(
        teacher, student.path, student.title, device, weights, precision, config, prompts
    )
    if not config.teacher_unconditional:
        return loaded
    path = weights_file(teacher, "transformer", weights)
    beside = _ready(load_network(teacher, path), device, precision)
    return dataclasses.replace(loaded, unconditional=beside)


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    weights: str | Path | None = None,
    precision: str | None = "float32",
    prompts: Sequence[str] | None = None,
) -> Generator:
    """Loads a teacher or a student by its name, a run folder, or a file of weights.

    Other arguments are those of `load_teacher`; `Generator.sample` takes other prompts as well.

    Args:
        name_or_path: A key of `TEACHERS`, or as in `find_student`.
        device: "auto" takes a GPU if there is one.

    Raises:
        DimoError: As `load_teacher` and `load_student`; an unknown device.
    """
    folder = None if weights is None else Path(weights)
    name, student = str(name_or_path), None
    if name not in TEACHERS:
        student = find_student(name_or_path, weights=folder)
    text = get_teacher(student.config.teacher if student else name).text
    if prompts is None and text is not None:
        prompts = [text.negative_prompt]
    given: dict[str, Any] = {"weights": folder, "precision": precision, "prompts": prompts}
    given["device"] = choose_device(str(device))
    return load_student(student, **given) if student else load_teacher(name, **given)


def load_tokens(path: Path | None, *, teacher: str, weights: Path | None = None) -> TokenData:
    """Reads what `dimo encode` wrote to `path`; None: encodes the data bundled with the teacher.

    Raises:
        DimoError: No data, a missing tokenizer, or as `dimo.data.tokens.read_tokens`.
    """
    row = get_teacher(teacher)
    if path is None and (row.bundled is None or row.text is not None):
        raise DimoError(
            f"teacher {teacher!r} comes without data; encode a folder or WebDataset of images: "
            f"dimo encode PATH --teacher {teacher} -o tokens.safetensors"
        )
    tokenizer = row.tokenizer(weights_file(row, "tokenizer", weights))
    if path is not None:
        return read_tokens(path, row, tokenizer)
    assert row.bundled is not None
    data = row.bundled.training_data(tokenizer)
    assert isinstance(data, EncodedImages), "bundled classes are a fixed set of images"
    return token_data(data.tokens, data.labels)


def _load(
    teacher: Teacher,
    path: Path,
    title: str,
    device: torch.device,
    weights: Path | None,
    precision: str | None,
    student: StudentConfig | None = None,
    prompts: Sequence[str] | None = None,
) -> Generator:
    # the tokenizer first, so that a missing file is reported before the larger one is read
    tokenizer = teacher.tokenizer(weights_file(teacher, "tokenizer", weights)).to(device)
    conditions = load_prompts(teacher, prompts, weights)
    if conditions is not None:
        conditions.to(device)
    architecture = student_architecture(teacher, student.method) if student else None
    model = _ready(load_network(teacher, path, conditions, architecture), device, precision)
    digest = sha256_file(path)
    return Generator(teacher, model, tokenizer, digest, title, student, precision or "float32")


def _ready(network: MaskedModel, device: torch.device, precision: str | None) -> MaskedModel:
    network = network.to(device)
    return network if precision is None else prepare_for_inference(network, precision)
