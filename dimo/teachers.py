"""The table of teachers, and how a teacher or a distilled student is loaded.

A row says how to build the network and the tokenizer, which weights they take, how the teacher
was trained as far as distillation must know, and the sampler settings it is compared with.
"""

__all__ = [
    "TEACHERS",
    "Loaded",
    "SamplerDefaults",
    "StudentConfig",
    "Teacher",
    "get_teacher",
    "load_model",
    "load_student",
    "load_teacher",
    "save_student",
    "shipped_students",
]

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dimo.errors import DimoError, unknown_name
from dimo.files import sha256_file, write_atomic
from dimo.models import Tokenizer
from dimo.models.digits import DigitsTokenizer
from dimo.models.maskgit import MaskGIT
from dimo.weights import ASSETS, save_tensors


@dataclass(frozen=True)
class SamplerDefaults:
    """Settings of the multi-step sampler in comparisons, and how they were chosen."""

    mask_schedule: str
    guidance_scale: float
    temperature: float
    choice_temperature: float
    selected_by: str


@dataclass(frozen=True)
class Teacher:
    """One row of the table.

    Attributes:
        name: What `--teacher` takes.
        network: Constructor arguments of `MaskGIT`.
        tokenizer: Builds the tokenizer from its weights file.
        weights: Role ("transformer", "tokenizer") -> file name.
        num_classes: Size of the condition.
        class_names: One name a class, for captions.
        label_smoothing: Of the teacher's training; the auxiliary model uses the same.
        defaults: Sampler settings for comparisons.
        recipe: The distillation recipe taken when none is named.
    """

    name: str
    network: Mapping[str, Any]
    tokenizer: Callable[[Path], Tokenizer]
    weights: Mapping[str, str]
    num_classes: int
    class_names: tuple[str, ...]
    label_smoothing: float
    defaults: SamplerDefaults
    recipe: str


TEACHERS: dict[str, Teacher] = {
    "digits": Teacher(
        name="digits",
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
        num_classes=10,
        class_names=tuple("0123456789"),
        label_smoothing=0.0,
        defaults=SamplerDefaults(
            mask_schedule="arccos",
            guidance_scale=1.0,
            temperature=1.0,
            choice_temperature=4.5,
            selected_by="as Maskgit-pytorch (choice temperature 4.5, temperature 1), no guidance",
        ),
        recipe="digits",
    ),
}


@dataclass(frozen=True)
class StudentConfig:
    """What a distilled student needs to be sampled; `config.json` beside its weights."""

    teacher: str
    init_mask_ratio: float
    embedding_noise: float
    temperature: float
    temperature_selected_by: str
    seed: int
    recipe: str
    training_seconds: float
    images_seen: int
    teacher_sha256: str
    format: int = 1


@dataclass(frozen=True)
class Loaded:
    """A network ready to sample, with its tokenizer and the hash of its weights file."""

    teacher: Teacher
    model: MaskGIT
    tokenizer: Tokenizer
    weights_sha256: str
    name: str
    student: StudentConfig | None = None  # None for a teacher


def get_teacher(name: str) -> Teacher:
    """The row of that name.

    Raises:
        DimoError: Unknown teacher.
    """
    if name not in TEACHERS:
        raise unknown_name("teacher", name, TEACHERS)
    return TEACHERS[name]


def load_teacher(name: str, *, device: torch.device, weights: Path | None = None) -> Loaded:
    """Loads a teacher and its tokenizer in eval mode.

    Args:
        name: A key of `TEACHERS`.
        device: Where to put both.
        weights: Folder with the row's weight files; the shipped ones by default.

    Raises:
        DimoError: Unknown teacher; a missing or foreign weights file.
    """
    teacher = get_teacher(name)
    path = _weights_file(teacher, "transformer", weights)
    model = MaskGIT.from_official(path, **teacher.network).to(device)
    return Loaded(teacher, model, _tokenizer(teacher, device, weights), sha256_file(path), name)


def load_student(run: str | Path, *, device: torch.device, weights: Path | None = None) -> Loaded:
    """Loads a distilled student: a shipped name, or the folder of a finished run.

    Raises:
        DimoError: No such run, an unfinished one, or weights that do not fit.
    """
    folder = ASSETS / str(run) if str(run) in shipped_students() else Path(run)
    config_path, weights_path = folder / "config.json", folder / "student.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        shipped = ", ".join(shipped_students()) or "none"
        state = "is not finished (no student.safetensors)" if folder.is_dir() else "does not exist"
        raise DimoError(
            f"student run {str(run)!r} {state}; shipped students: {shipped}; "
            "make or finish one with: dimo distill --teacher digits --out RUN --resume"
        )
    config = _read_student_config(config_path)
    teacher = get_teacher(config.teacher)
    model = MaskGIT.from_official(weights_path, **teacher.network).to(device)
    digest = sha256_file(weights_path)
    tokenizer = _tokenizer(teacher, device, weights)
    return Loaded(teacher, model, tokenizer, digest, f"Di[M]O ({folder.name})", config)


def load_model(name: str, *, device: torch.device, weights: Path | None = None) -> Loaded:
    """The teacher of that name, else the student of that name or in that folder."""
    if name in TEACHERS:
        return load_teacher(name, device=device, weights=weights)
    return load_student(name, device=device, weights=weights)


def save_student(folder: Path, model: MaskGIT, config: StudentConfig) -> None:
    """Writes `student.safetensors` and then `config.json`, which marks the run as finished."""
    content = dataclasses.asdict(config)
    timeless = {key: value for key, value in content.items() if key != "training_seconds"}
    save_tensors(folder / "student.safetensors", model.state_dict(), timeless)
    write_atomic(folder / "config.json", json.dumps(content, indent=2) + "\n")


def shipped_students() -> list[str]:
    """Names of the students that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/student.safetensors"))


def _read_student_config(path: Path) -> StudentConfig:
    try:
        content = json.loads(path.read_text())
        config = StudentConfig(**content)
    except (ValueError, TypeError) as error:
        raise DimoError(
            f"{path} is not a student's config: {error}; distil the run again"
        ) from error
    if config.format != 1:
        raise DimoError(f"{path} has format {config.format}, this version reads 1; update dimo")
    return config


def _weights_file(teacher: Teacher, role: str, folder: Path | None) -> Path:
    path = (folder or ASSETS) / teacher.weights[role]
    if not path.is_file():
        raise DimoError(f"teacher {teacher.name!r} needs {path}; give its folder with --weights")
    return path


def _tokenizer(teacher: Teacher, device: torch.device, folder: Path | None) -> Tokenizer:
    return teacher.tokenizer(_weights_file(teacher, "tokenizer", folder)).to(device)
