"""Distilled students: what is known of each, and where its weights lie."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from dimo.config import DistillationRecipe, DistillRecipe
from dimo.errors import DimoError, unknown_name
from dimo.initialization import TOKEN_INITIALIZATIONS
from dimo.methods.recipes import Di4CRecipe
from dimo.util.files import write_atomic
from dimo.util.schema import Origin, decode, encode
from dimo.weights.catalog import ASSETS, locate
from dimo.weights.files import DI4C_KIND, load_metadata, looks_like, read_state_dict, save_tensors

# x_init of a student that starts from masked tokens
_ALL_MASKED: dict[str, Any] = {
    "init_mask_ratio": 1.0,
    "embedding_noise": 0.0,
    "token_initialization": "masked",
}


@dataclass(frozen=True)
class Method:
    """A distillation method, as far as its students must be told apart.

    Attributes:
        title: Name in tables.
        is_one_step: Its student starts from x_init and is sampled by `one_step` and `few_step`;
            others start from masked tokens, and are sampled by the confidence sampler.
        has_latent: Its network takes a latent beside the teacher's inputs.
        usual_steps: Sampling steps it is looked at with.
    """

    title: str
    is_one_step: bool = False
    has_latent: bool = False
    usual_steps: int = 4


METHODS: dict[str, Method] = {
    "dimo": Method("Di[M]O", is_one_step=True, usual_steps=1),
    "di4c": Method("di4c", has_latent=True),
    "di4c-d": Method("di4c-d", has_latent=True),
    "sdtt": Method("SDTT"),
}


@dataclass(frozen=True)
class StudentConfig:
    """What a distilled student needs to be sampled; `config.json` beside its weights.

    Of the training, None is what its authors did not publish.

    Attributes:
        teacher: A row of `dimo.zoo.teachers`.
        init_mask_ratio: r it is sampled with; of a range of r in training, the recipe's choice.
        embedding_noise: sigma it is sampled with, that of the end of the training.
        temperature: Divides its logits.
        temperature_selected_by: How that was chosen.
        recipe: Name of the recipe.
        seed: Of the training.
        training_seconds: Wall-clock time of the training.
        images_seen: Steps times batch size.
        ablation: Keys of the recipe that an ablation varies, with their values; see `varied`.
        teacher_sha256: Of the teacher's weights file.
        token_initialization: What x_init is made of, see `dimo.initialization`.
        method: A key of `METHODS`; x_init is of the one-step students alone.
        guidance_scale: s at the last step of several; None: that of the teacher's row.
        teacher_unconditional: Guided sampling takes its unconditional branch from the teacher.
        format: Of this file.
    """

    teacher: str
    init_mask_ratio: float
    embedding_noise: float
    temperature: float
    temperature_selected_by: str
    recipe: str
    seed: int | None = None
    training_seconds: float | None = None
    images_seen: int | None = None
    ablation: dict[str, Any] | None = None
    teacher_sha256: str | None = None
    token_initialization: str = "mixed"
    method: str = "dimo"
    guidance_scale: float | None = None
    teacher_unconditional: bool = False
    format: int = 1

    @classmethod
    def of_recipe(cls, recipe: DistillationRecipe, name: str, **training: Any) -> Self:
        """The student that a recipe makes.

        Args:
            recipe: What was done.
            name: Of the recipe.
            **training: `training_seconds`, `images_seen`, `teacher_sha256`, `ablation`, where
                they are known.
        """
        if isinstance(recipe, DistillRecipe):
            training |= {
                "init_mask_ratio": recipe.sampling_mask_ratio,
                "embedding_noise": recipe.embedding_noise,
                "token_initialization": recipe.token_initialization,
            }
        else:
            training |= {**_ALL_MASKED, "guidance_scale": recipe.guidance_scale}
        if isinstance(recipe, Di4CRecipe):
            training["teacher_unconditional"] = recipe.teacher_unconditional
        return cls(
            teacher=recipe.teacher,
            method=recipe.method,
            temperature=recipe.temperature,
            temperature_selected_by=recipe.temperature_selected_by,
            seed=recipe.seed,
            recipe=name,
            **training,
        )


# name of a student published by others = name of its file in `dimo.weights.catalog.OFFICIAL`
PUBLISHED_STUDENTS: dict[str, StudentConfig] = {
    "dimo-maskgit": StudentConfig(
        teacher="maskgit",
        init_mask_ratio=0.6,
        embedding_noise=0.1,
        temperature=7.0,
        temperature_selected_by="Di[M]O paper, fig. 14b and app. D.2: lowest FID of 50,000 images "
        "over 11 temperatures from 2 to 11",
        recipe="of its authors",
    ),
    "di4c-d": StudentConfig(
        teacher="maskgit",
        **_ALL_MASKED,
        temperature=1.0,
        temperature_selected_by="README of sony/di4c for 4 steps: cfg_w 6 (scale 7), r_temp 4.5, "
        "sm_temp 1",
        recipe="of its authors",
        method="di4c-d",
        guidance_scale=7.0,
    ),
}


@dataclass(frozen=True)
class FoundStudent:
    """A student whose files are there: its settings, its weights, and its name in tables."""

    config: StudentConfig
    path: Path
    title: str


def find_student(run: str | Path, *, weights: Path | None = None) -> FoundStudent:
    """Finds a student without loading it: a published or shipped name, a run's folder, or a file.

    Args:
        run: The name, the folder of a finished run, or a file: one that `dimo export` wrote as
            safetensors, or the official one of di4c-d.
        weights: Folder of official files, where a published student is looked for.

    Raises:
        DimoError: No such student, an unfinished run, a config that is none, or a file without
            settings.
    """
    name = str(run)
    if name in PUBLISHED_STUDENTS:
        return _found(PUBLISHED_STUDENTS[name], locate(name, weights), name)
    if Path(run).is_file():
        return _found(_config_of_file(Path(run)), Path(run), Path(run).stem)
    folder = ASSETS / name if name in shipped_students() else Path(run)
    config_path, weights_path = folder / "config.json", folder / "student.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        named = ", ".join([*shipped_students(), *PUBLISHED_STUDENTS])
        state = "is not finished (no student.safetensors)" if folder.is_dir() else "does not exist"
        raise DimoError(
            f"student run {name!r} {state}; students with a name: {named}; "
            "make or finish one with: dimo distill --teacher digits --out RUN --resume"
        )
    return _found(_read_student_config(config_path), weights_path, folder.name)


def _found(config: StudentConfig, path: Path, name: str) -> FoundStudent:
    title = METHODS[config.method].title
    return FoundStudent(config, path, title if name == title else f"{title} ({name})")


def _config_of_file(path: Path) -> StudentConfig:
    """The settings that a file carries, or those of the published student whose layout it has.

    Raises:
        DimoError: It carries none.
    """
    content = load_metadata(path) if path.suffix == ".safetensors" else {}
    if "teacher" in content:
        return _checked_config(content, Origin(str(path), "export the student again"))
    if looks_like(read_state_dict(path)) == DI4C_KIND:
        return PUBLISHED_STUDENTS["di4c-d"]
    raise DimoError(
        f"{path} does not say how it was trained; make a run folder of it with: dimo import"
    )


def save_student(folder: Path, state: dict[str, Tensor], config: StudentConfig) -> None:
    """Writes `student.safetensors` and then `config.json`, which marks the run as finished."""
    content = dataclasses.asdict(config)
    if config.ablation is None:
        del content["ablation"]
    timeless = {key: value for key, value in content.items() if key != "training_seconds"}
    save_tensors(folder / "student.safetensors", state, timeless)
    write_atomic(folder / "config.json", json.dumps(content, indent=2) + "\n")


def varied(recipe: Any, keys: Sequence[str]) -> dict[str, Any] | None:
    """What an ablation notes with a student: the keys that it varies, as the recipe has them.

    Raises:
        DimoError: The recipe has no such key.
    """
    content: dict[str, Any] = encode(recipe)
    for key in keys:
        if key not in content:
            raise unknown_name("key of the recipe to ablate", key, content)
    return {key: content[key] for key in keys} or None


def shipped_students() -> list[str]:
    """Names of the students that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/student.safetensors"))


def _read_student_config(path: Path) -> StudentConfig:
    origin = Origin(str(path), "distil the run again")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise origin.error(f"not valid JSON: {error}") from error
    return _checked_config(content, origin)


def _checked_config(content: object, origin: Origin) -> StudentConfig:
    config, path = decode(StudentConfig, content, origin), origin.source
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS, f"correct {path}")
    if config.token_initialization not in TOKEN_INITIALIZATIONS:
        raise unknown_name(
            "token initialization",
            config.token_initialization,
            TOKEN_INITIALIZATIONS,
            f"correct {path}",
        )
    if config.format != 1:
        raise DimoError(f"{path} has format {config.format}, this version reads 1; update dimo")
    return config
