"""The table of teachers: how each is built, loaded, sampled, and how it was trained.

A row of your own can be added from outside the package: `TEACHERS["mine"] = Teacher(...)`. A run of
`dimo train --data` is a teacher, too, by the path of its folder.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from dimo.errors import DimoError, unknown_name
from dimo.models import MaskedNetwork, Tokenizer
from dimo.models.digits import DigitsTokenizer
from dimo.models.halton import SIZES, HaltonMaskGIT
from dimo.models.maskgit import SIZES as MASKGIT_SIZES
from dimo.models.maskgit import MaskGIT
from dimo.models.meissonic import Meissonic
from dimo.models.scenes import SceneTokenizer, SceneTransformer, SceneWords
from dimo.models.snapshot import CLIPText, DiffusersVQ
from dimo.models.text import TextEncoder
from dimo.models.vqgan import VQGAN, LlamaGenVQ
from dimo.util.files import write_atomic
from dimo.util.schema import Origin, decode, encode
from dimo.weights.catalog import ASSETS
from dimo.zoo.bundled import DIGITS, SCENES, BundledData


@dataclass(frozen=True)
class SamplerDefaults:
    """Settings of the multi-step sampler in comparisons; None: the sampler's default.

    `mask_schedule` applies to the teacher's own sampler; another one takes its own default.
    """

    sampler: str  # a key of `dimo.samplers.SAMPLERS`
    mask_schedule: str
    guidance_scale: float
    temperature: float
    selected_by: str  # where the values come from
    choice_temperature: float | None = None
    final_temperature: float | None = None
    random_start: bool = False


@dataclass(frozen=True)
class TextConditioning:
    """How a teacher reads prompts.

    Attributes:
        encoder: Builds the text encoder from its weights file, the row's role "text"; without
            arguments if the row has no such role.
        check: Raises a `DimoError` for a prompt that the encoder cannot read; None: it reads any.
    """

    encoder: Callable[..., TextEncoder]
    negative_prompt: str  # the null condition of guidance
    length: int  # tokens of an encoded prompt
    states_dim: int  # width of a token's state
    pooled_dim: int  # width of the prompt's pooled vector
    check: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Teacher:
    """One row of the table.

    Attributes:
        architecture: Class of the network: a `MaskedModel`, or a `TextNetwork` if `text` is set.
        weights: Role ("transformer", "tokenizer", "text") -> a key of
            `dimo.weights.catalog.OFFICIAL`, or the name of a bundled file.
        label_smoothing: Used in the teacher's training, and by the auxiliary model.
        bundled: The data set it was trained on, if the package has it; None: published weights.
    """

    name: str  # its key in `TEACHERS`
    title: str  # its name in tables
    architecture: type[MaskedNetwork]
    network: Mapping[str, Any]  # constructor arguments
    tokenizer: Callable[[Path], Tokenizer]  # of its weights file
    weights: Mapping[str, str]
    image_size: int  # side of the images in pixels
    num_tokens: int
    num_classes: int  # 0: the condition is text
    names: Callable[[], tuple[str, ...]]  # one per class, for captions
    label_smoothing: float
    defaults: SamplerDefaults
    protocol: str = ""  # name or file of the protocol it is scored under by default; "": none
    recipe: str | None = None  # of Di[M]O
    other_recipes: Mapping[str, str] = field(default_factory=dict)  # by method
    text: TextConditioning | None = None  # None: the condition is a class
    bundled: BundledData | None = None
    data: Path | None = None  # token cache of its training, if it was trained here

    @property
    def recipes(self) -> dict[str, str]:
        """The default recipe of each method."""
        return {**({"dimo": self.recipe} if self.recipe else {}), **self.other_recipes}

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return self.names()

    @property
    def is_bundled(self) -> bool:
        """Whether weights and training data come with the package."""
        return self.bundled is not None

    @property
    def has_data(self) -> bool:
        """Whether its training data are at hand: bundled, or those of a run of `dimo train`."""
        return self.is_bundled or self.data is not None


# What a run of `dimo train --data` has beside the files of every run
TEACHER_FILE, TEACHER_WEIGHTS = "teacher.json", "teacher.safetensors"
TOKENS_FILE = "tokens.safetensors"

# name -> its weights, as in `Teacher.weights`, and a function of their path and `image_size`
TOKENIZERS: dict[str, tuple[str, Callable[..., Tokenizer]]] = {
    "maskgit-vqgan": ("maskgit-vqgan", VQGAN.from_file),
    "llamagen-vq16": ("llamagen-vq16", LlamaGenVQ.from_official),
    "digits": (
        str(ASSETS / "digits-tokenizer.safetensors"),
        lambda path, image_size: DigitsTokenizer.from_file(path),
    ),
    "scenes": (
        str(ASSETS / "scenes-tokenizer.safetensors"),
        lambda path, image_size: SceneTokenizer.from_file(path),
    ),
}


_BASELINES = {method: f"digits-{method}" for method in ("di4c", "di4c-d", "sdtt")}


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
        protocol="digits",
        recipe="digits",
        other_recipes={**_BASELINES, "dimo-fd": "digits-dimo-fd"},
        bundled=DIGITS,
    )


@cache
def _imagenet_classes() -> tuple[str, ...]:
    """Short English names, from the metadata of torchvision's classifiers."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])


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
        names=_imagenet_classes,
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
        protocol=f"imagenet{side}-adm",
        recipe="maskgit",
        other_recipes={m: f"maskgit-{m}" for m in ("di4c", "di4c-d", "dimo-fd")},
    )


def _halton(size: str, side: int, *, w: float) -> Teacher:
    """Halton-MaskGIT at `side` pixels, with the CFG w of its README: (1 + w) c - w u."""
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
        names=_imagenet_classes,
        label_smoothing=0.0,
        defaults=SamplerDefaults(
            sampler="halton",
            mask_schedule="arccos-halton",
            guidance_scale=1 + w,
            temperature=1.0,
            final_temperature=1 / 1.2,  # sm_temp_max
            random_start=True,
            selected_by=f"README of Halton-MaskGIT for {side} x {side} and 32 steps: CFG {w:g} "
            f"(scale {1 + w:g}); inverse temperature 1 to 1.2 and random start of its example",
        ),
        protocol="imagenet256-adm" if side == 256 else "",
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
        protocol="geneval-hf",  # `geneval` reads the verdicts of a detector that dimo does not run
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
        network={"hidden_dim": 160, "codebook_size": 256, "depth": 6, "heads": 4, "mlp_dim": 320},
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
        protocol="scenes-geneval",
        recipe="scenes",
        other_recipes={"dimo-fd": "scenes-dimo-fd"},
        text=TextConditioning(
            encoder=SceneWords,
            negative_prompt="",
            length=SceneWords.length,
            states_dim=SceneWords.width,
            pooled_dim=SceneWords.width,
            check=SceneWords.check,
        ),
        bundled=SCENES,
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


def is_teacher(name: str) -> bool:
    """Whether `get_teacher` takes it: a key of `TEACHERS`, or the folder of a trained teacher."""
    with suppress(OSError):  # e.g. too long for a path
        return name in TEACHERS or (Path(name) / TEACHER_FILE).is_file()
    return False


def get_teacher(name: str) -> Teacher:
    """The row of that name, or of that folder of a run of `dimo train --data`.

    Raises:
        DimoError: There is none, or the folder's `teacher.json` is damaged.
    """
    if name in TEACHERS:
        return TEACHERS[name]
    if not is_teacher(name):
        advice = "or the folder of a run of: dimo train --data"
        raise unknown_name("teacher", name, TEACHERS, advice)
    folder = Path(name).resolve()
    return trained_teacher(folder, _read_config(folder))


@dataclass(frozen=True)
class TeacherConfig:
    """What makes the folder of a run of `dimo train --data` a teacher; its `teacher.json`."""

    size: str  # a key of `dimo.models.maskgit.SIZES`
    tokenizer: str  # a key of `TOKENIZERS`, or the path of a VQGAN's weights
    image_size: int  # side in pixels
    num_tokens: int
    codebook_size: int
    class_names: tuple[str, ...]
    label_smoothing: float
    protocol: str = ""  # name or path of the protocol that it is scored under by default
    format: int = 1


def find_tokenizer(name: str) -> tuple[str, Callable[..., Tokenizer]]:
    """The row of `TOKENIZERS`, or that of a VQGAN file, whose configuration is in or beside it."""
    if name in TOKENIZERS:
        return TOKENIZERS[name]
    if not Path(name).is_file():
        raise unknown_name("tokenizer", name, TOKENIZERS, "or give the weights file of a VQGAN")
    return str(Path(name).resolve()), TOKENIZERS["maskgit-vqgan"][1]


def save_teacher(folder: Path, config: TeacherConfig) -> Teacher:
    """Makes a folder a teacher that is still to be trained, or finds that it is this one.

    Raises:
        DimoError: The folder is another teacher, or cannot be written.
    """
    path = folder / TEACHER_FILE
    if path.is_file():
        old = encode(_read_config(folder))
        for key, value in encode(config).items():
            if value != old[key]:
                raise DimoError(
                    f"{folder} is a teacher with {key} {old[key]!r}, not {value!r}; choose another "
                    "--out"
                )
    else:
        write_atomic(path, json.dumps(encode(config), indent=2, ensure_ascii=False) + "\n")
    return trained_teacher(folder.resolve(), config)


def _read_config(folder: Path) -> TeacherConfig:
    origin = Origin(str(folder / TEACHER_FILE), "train the teacher again, in another folder")
    try:
        content = json.loads((folder / TEACHER_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise origin.error(f"cannot be read: {error}") from error
    config = decode(TeacherConfig, content, origin)
    if config.format != 1 or config.size not in MASKGIT_SIZES:
        raise origin.error(f"format {config.format}, size {config.size!r}, unknown to this version")
    return config


def trained_teacher(folder: Path, config: TeacherConfig) -> Teacher:
    """The row of a run of `dimo train --data` in `folder`, an absolute path."""
    file, load = find_tokenizer(config.tokenizer)
    return Teacher(
        name=str(folder),
        title=f"MaskGIT ({folder.name})",
        architecture=MaskGIT,
        network={
            **MASKGIT_SIZES[config.size],
            "img_size": 16 * round(config.num_tokens**0.5),
            "codebook_size": config.codebook_size,
            "nclass": len(config.class_names),
        },
        tokenizer=partial(load, image_size=config.image_size),
        weights={"transformer": str(folder / TEACHER_WEIGHTS), "tokenizer": file},
        image_size=config.image_size,
        num_tokens=config.num_tokens,
        num_classes=len(config.class_names),
        names=lambda: config.class_names,
        label_smoothing=config.label_smoothing,
        defaults=_digits().defaults,
        protocol=config.protocol,
        recipe="digits" if config.size == "tiny" else "maskgit",
        other_recipes=_BASELINES if config.size == "tiny" else {},
        data=folder / TOKENS_FILE,
    )
