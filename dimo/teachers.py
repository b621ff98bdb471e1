"""The table of teachers, and how a teacher or a distilled student is loaded.

A row says how to build the network and the tokenizer, which weights they take, how the teacher
was trained as far as distillation must know, and the sampler settings it is compared with.
"""

__all__ = [
    "TEACHERS",
    "Loaded",
    "Network",
    "SamplerDefaults",
    "Teacher",
    "TextConditioning",
    "get_teacher",
    "load_model",
    "load_network",
    "load_prompts",
    "load_student",
    "load_teacher",
    "make_network",
    "student_architecture",
    "weights_file",
]

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dimo.datasets import imagenet
from dimo.errors import DimoError, unknown_name
from dimo.files import sha256_file
from dimo.models import MaskedModel, Tokenizer
from dimo.models.clip_text import CLIPText
from dimo.models.di4c import Di4CStudent
from dimo.models.diffusers_vq import DiffusersVQ
from dimo.models.digits import DigitsTokenizer
from dimo.models.halton import SIZES, HaltonMaskGIT
from dimo.models.llamagen_vq import LlamaGenVQ
from dimo.models.maskgit import MaskGIT
from dimo.models.meissonic import Meissonic
from dimo.models.precision import in_precision
from dimo.models.scenes import SceneTokenizer, SceneTransformer, SceneWords
from dimo.models.text import TextConditioned
from dimo.models.vqgan import VQGAN
from dimo.networks import load_network, load_prompts, make_network, weights_file
from dimo.rows import Architecture, Network, SamplerDefaults, Teacher, TextConditioning
from dimo.students import METHODS, FoundStudent, StudentConfig, find_student
from dimo.worlds import DIGITS, SCENES


def _digits() -> Teacher:
    return Teacher(
        name="digits",
        title="MaskGIT",
        architecture=MaskGIT,
        network={
            "img_size": 64,
            "hidden_dim": 128,
            "codebook_size": 256,
            "depth": 3,
            "heads": 4,
            "mlp_dim": 512,
            "dropout": 0.1,
            "nclass": 10,
        },
        tokenizer=DigitsTokenizer.from_file,
        weights={
            "transformer": "digits-teacher.safetensors",
            "tokenizer": "digits-tokenizer.safetensors",
        },
        image_size=8,
        num_tokens=16,
        num_classes=10,
        names=lambda: tuple("0123456789"),
        label_smoothing=0.0,
        defaults=SamplerDefaults(
            sampler="confidence",
            mask_schedule="arccos",
            guidance_scale=1.0,
            temperature=1.0,
            choice_temperature=4.5,
            selected_by="as Maskgit-pytorch (choice temperature 4.5, temperature 1), no guidance",
        ),
        recipe="digits",
        other_recipes={
            "di4c": "digits-di4c",
            "di4c-d": "digits-di4c-d",
            "sdtt": "digits-sdtt",
        },
        world=DIGITS,
    )


def _maskgit(name: str, side: int, *, w: float, choice_temperature: float, steps: int) -> Teacher:
    """Maskgit-pytorch v1.0 at `side` pixels, with the settings its README gives for `steps`."""
    return Teacher(
        name=name,
        title="MaskGIT",
        architecture=MaskGIT,
        network={"img_size": side},
        tokenizer=partial(VQGAN.from_file, image_size=side),
        weights={"transformer": f"maskgit-{side}", "tokenizer": "maskgit-vqgan"},
        image_size=side,
        num_tokens=(side // 16) ** 2,
        num_classes=1000,
        names=imagenet.class_names,
        label_smoothing=0.1,
        defaults=SamplerDefaults(
            sampler="confidence",
            mask_schedule="arccos",
            guidance_scale=1 + w,
            temperature=1.0,
            choice_temperature=choice_temperature,
            selected_by=f"README of Maskgit-pytorch for {side} x {side} and {steps} steps: w {w:g} "
            f"(scale {1 + w:g}), r_temp {choice_temperature:g}, sm_temp 1; its token counts are "
            "those of the schedule arccos-v1",
        ),
        recipe="maskgit",
        other_recipes={"di4c": "maskgit-di4c", "di4c-d": "maskgit-di4c-d"},
    )


_FINAL_INVERSE_TEMPERATURE = 1.2  # sm_temp_max


def _halton(size: str, side: int, *, w: float) -> Teacher:
    """Halton-MaskGIT at `side` pixels; its CFG w is (1 + w) c - w u, so the scale is 1 + w.

    Args:
        size: A key of `SIZES`.
        side: Of the images.
        w: The CFG of its README's table.
    """
    return Teacher(
        name=f"halton-{size}",
        title=f"Halton-MaskGIT-{size}",
        architecture=HaltonMaskGIT,
        network={**SIZES[size], "input_size": side // 16},
        tokenizer=partial(LlamaGenVQ.from_official, image_size=side),
        weights={"transformer": f"halton-{size}-{side}", "tokenizer": "llamagen-vq16"},
        image_size=side,
        num_tokens=(side // 16) ** 2,
        num_classes=1000,
        names=imagenet.class_names,
        label_smoothing=0.0,
        defaults=SamplerDefaults(
            sampler="halton",
            mask_schedule="arccos-halton",
            guidance_scale=1 + w,
            temperature=1.0,
            final_temperature=1 / _FINAL_INVERSE_TEMPERATURE,
            random_start=True,
            selected_by=f"README of Halton-MaskGIT for {side} x {side} and 32 steps: CFG {w:g} "
            f"(scale {1 + w:g}); inverse temperature 1 to 1.2 and random start of its example",
        ),
        recipe="halton",
    )


# The official pipeline's and Di[M]O's, word for word ("signature" stands twice there).
_NEGATIVE_PROMPT = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, "
    "jpeg artifacts, signature, sketch, duplicate, ugly, identifying mark"
)


def _meissonic() -> Teacher:
    return Teacher(
        name="meissonic",
        title="Meissonic",
        architecture=Meissonic,
        network={},
        tokenizer=partial(DiffusersVQ.from_official, image_size=1024),
        weights={"transformer": "meissonic", "tokenizer": "meissonic-vq", "text": "meissonic-text"},
        image_size=1024,
        num_tokens=4096,
        num_classes=0,
        names=tuple,
        label_smoothing=0.0,
        defaults=SamplerDefaults(
            sampler="meissonic",
            mask_schedule="cosine-amused",
            guidance_scale=9.0,
            temperature=1.0,
            choice_temperature=2.0,
            selected_by="defaults of the official pipeline (48 steps, scale 9, temperature (2, 0)) "
            "and its inference script's negative prompt",
        ),
        recipe="meissonic",
        text=TextConditioning(
            encoder=CLIPText.from_official,
            negative_prompt=_NEGATIVE_PROMPT,
            length=77,
            states_dim=1024,
            pooled_dim=1024,
        ),
    )


def _scenes() -> Teacher:
    return Teacher(
        name="scenes",
        title="MaskGIT-scenes",
        architecture=SceneTransformer,
        network={
            "hidden_dim": 160,
            "codebook_size": 256,
            "depth": 6,
            "heads": 4,
            "mlp_dim": 320,
        },
        tokenizer=SceneTokenizer.from_file,
        weights={
            "transformer": "scenes-teacher.safetensors",
            "tokenizer": "scenes-tokenizer.safetensors",
        },
        image_size=32,
        num_tokens=64,
        num_classes=0,
        names=tuple,
        label_smoothing=0.0,
        defaults=SamplerDefaults(
            sampler="confidence",
            mask_schedule="arccos",
            guidance_scale=3.0,
            temperature=1.0,
            choice_temperature=4.5,
            selected_by="as digits, with guidance 3; not tuned",
        ),
        recipe="scenes",
        text=TextConditioning(
            encoder=SceneWords,
            negative_prompt="",
            length=SceneWords.length,
            states_dim=SceneWords.width,
            pooled_dim=SceneWords.width,
            check=SceneWords.check,
        ),
        world=SCENES,
    )


TEACHERS: dict[str, Teacher] = {
    teacher.name: teacher
    for teacher in (
        _digits(),
        _scenes(),
        _maskgit("maskgit", 256, w=3.0, choice_temperature=4.5, steps=8),
        _maskgit("maskgit-512", 512, w=2.8, choice_temperature=7.0, steps=15),
        _halton("tiny", 256, w=1.5),
        _halton("small", 256, w=1.0),
        _halton("base", 256, w=0.7),
        _halton("large", 384, w=0.5),  # published for 384 alone
        _meissonic(),
    )
}


@dataclass(frozen=True)
class Loaded:
    """A network ready to sample, with its tokenizer and the hash of its weights file.

    Attributes:
        teacher: Its row, or that of its teacher.
        model: The network in eval mode.
        tokenizer: Of the same row.
        weights_sha256: Of the network's weights file.
        name: Name in tables.
        student: None for a teacher.
        precision: What the network computes in, see `dimo.models.precision`.
        unconditional: Predicts without the condition in guided sampling; None: the network itself.
    """

    teacher: Teacher
    model: MaskedModel
    tokenizer: Tokenizer
    weights_sha256: str
    name: str
    student: StudentConfig | None = None
    precision: str = "float32"
    unconditional: MaskedModel | None = None

    @property
    def num_conditions(self) -> int:
        """Classes, or prompts that were given."""
        return self.model.num_classes

    @property
    def condition_names(self) -> Sequence[str]:
        """One name a class, or the prompts."""
        if isinstance(self.model, TextConditioned):
            return self.model.conditions.prompts
        return self.teacher.class_names


def get_teacher(name: str) -> Teacher:
    """The row of that name.

    Raises:
        DimoError: Unknown teacher.
    """
    if name not in TEACHERS:
        raise unknown_name("teacher", name, TEACHERS)
    return TEACHERS[name]


def student_architecture(teacher: Teacher, method: str) -> Architecture:
    """The class of a student's network, which takes the constructor arguments of its teacher's.

    Args:
        teacher: The row.
        method: A key of `dimo.students.METHODS`.

    Raises:
        DimoError: Unknown method, or one that this teacher's network cannot have.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if not METHODS[method].has_latent:
        return teacher.architecture
    if teacher.architecture is not MaskGIT:
        raise DimoError(
            f"method {method!r} needs a teacher with the MaskGIT network, and that of "
            f"{teacher.name!r} is {teacher.architecture.__name__}; use e.g. --teacher digits"
        )
    return Di4CStudent


def load_teacher(
    name: str,
    *,
    device: torch.device,
    weights: Path | None = None,
    precision: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Loaded:
    """Loads a teacher and its tokenizer in eval mode.

    Args:
        name: A key of `TEACHERS`.
        device: Where to put both.
        weights: Folder with the row's weight files; None: those shipped, or those fetched.
        precision: Makes the network ready for sampling in it, see `dimo.models.precision`; None:
            leaves it as it is, to be trained too.
        prompts: What the labels stand for, if the teacher draws prompts; else None.

    Raises:
        DimoError: Unknown teacher or precision; a missing or foreign weights file; as
            `load_prompts`.
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
) -> Loaded:
    """Loads a distilled student, found or to be found by `find_student`, with its tokenizer.

    Args:
        run: As in `find_student`.
        device: Where to put the networks.
        weights: Folder of the weights; None: those shipped, or those fetched.
        precision: As in `load_teacher`.
        teacher_unconditional: Loads the teacher's network too, for the unconditional branch of
            guided sampling (the official `--lfg` of di4c); None: as the student's settings say.

    Raises:
        DimoError: As `find_student` and `load_prompts`; weights that do not fit; unknown precision;
            a one-step student with a teacher beside it.
    """
    found = run if isinstance(run, FoundStudent) else find_student(run, weights=weights)
    config, teacher = found.config, get_teacher(found.config.teacher)
    if teacher_unconditional is not None:
        config = dataclasses.replace(config, teacher_unconditional=teacher_unconditional)
    if config.teacher_unconditional and METHODS[config.method].is_one_step:
        raise DimoError(
            f"student {found.title} is sampled without guidance and has no unconditional branch; "
            "leave teacher_unconditional out"
        )
    loaded = _load(teacher, found.path, found.title, device, weights, precision, config, prompts)
    if not config.teacher_unconditional:
        return loaded
    path = weights_file(teacher, "transformer", weights)
    beside = _ready(load_network(teacher, path), device, precision)
    return dataclasses.replace(loaded, unconditional=beside)


def load_model(
    name: str,
    *,
    device: torch.device,
    weights: Path | None = None,
    precision: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Loaded:
    """The teacher of that name, else the student of that name or in that folder."""
    load = load_teacher if name in TEACHERS else load_student
    return load(name, device=device, weights=weights, precision=precision, prompts=prompts)


def _load(
    teacher: Teacher,
    path: Path,
    title: str,
    device: torch.device,
    weights: Path | None,
    precision: str | None,
    student: StudentConfig | None = None,
    prompts: Sequence[str] | None = None,
) -> Loaded:
    # the tokenizer first: what is missing or foreign shows before the larger file is read
    tokenizer = teacher.tokenizer(weights_file(teacher, "tokenizer", weights)).to(device)
    conditions = load_prompts(teacher, prompts, weights)
    if conditions is not None:
        conditions.to(device)
    method = student.method if student else None
    architecture = student_architecture(teacher, method) if method else teacher.architecture
    model = _ready(load_network(teacher, path, conditions, architecture), device, precision)
    digest = sha256_file(path)
    return Loaded(teacher, model, tokenizer, digest, title, student, precision or "float32")


def _ready(network: Network, device: torch.device, precision: str | None) -> Network:
    """The network on the device, ready for sampling in a precision."""
    network = network.to(device)
    return network if precision is None else in_precision(network, precision)
