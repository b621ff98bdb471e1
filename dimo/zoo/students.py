"""Distilled students: the settings of each, and where its weights are."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from dimo.config import load_distillation
from dimo.engine.checkpoint import STATE_FILE, is_checkpoint, kept_steps, read_checkpoint
from dimo.engine.loop import FREE_KEYS
from dimo.errors import DimoError, unknown_name
from dimo.initialization import TOKEN_INITIALIZATIONS
from dimo.methods import METHODS
from dimo.methods.base import ALL_MASKED, DistillationRecipe
from dimo.util.files import sha256_bytes, write_atomic
from dimo.util.schema import Origin, canonical_json, decode, encode
from dimo.weights.catalog import ASSETS, locate
from dimo.weights.download import HUB, fetch_snapshot, hash_file
from dimo.weights.files import DI4C_KIND, Checkpoint, looks_like, read_weights, save_tensors

# keys of a recipe in which two runs that train the same may differ
_OF_A_RUN = (
    *("seed", "temperature", "temperature_selected_by", "ema_on_cpu", "precision"),
    *FREE_KEYS,
)


STUDENT_FILES = ("student.safetensors", "config.json")  # a finished run has both

# What a run writes to its folder. Whatever else is there, such as the log of a batch system, is not
# ours: it neither forbids a start nor is it touched.
RUN_FILES = (
    *("recipe.toml", "metrics.jsonl", "checkpoints", *STUDENT_FILES),
    *("curve.jsonl", "samples", "tensorboard"),
)


@dataclass(frozen=True)
class StudentConfig:
    """What sampling a student takes, and how it was trained; `config.json` beside its weights.

    None marks facts of the training that the authors did not publish.
    """

    teacher: str  # a key of `dimo.zoo.teachers.TEACHERS`
    init_mask_ratio: float  # r in sampling
    embedding_noise: float  # sigma in sampling
    temperature: float
    temperature_selected_by: str
    recipe: str
    recipe_sha256: str | None = None  # first digits, see `recipe_sha256`
    seed: int | None = None
    training_seconds: float | None = None
    images_seen: int | None = None  # steps times batch size
    ablation: dict[str, Any] | None = None  # see `varied`
    teacher_sha256: str | None = None  # of the teacher's weights file
    token_initialization: str = "mixed"
    method: str = "dimo"
    guidance_scale: float | None = None  # at the last of several steps; None: the teacher's
    teacher_unconditional: bool = False  # the unconditional half of guidance is the teacher's
    format: int = 1

    @classmethod
    def of_recipe(cls, recipe: DistillationRecipe, name: str, **training: Any) -> Self:
        """The student of a recipe called `name`, with what is known of its training."""
        return cls(
            teacher=recipe.teacher,
            method=recipe.method,
            temperature=recipe.temperature,
            temperature_selected_by=recipe.temperature_selected_by,
            seed=recipe.seed,
            recipe=name,
            **METHODS[recipe.method].distillation.student_settings(recipe),
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
        **ALL_MASKED,
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
    """A student whose files exist: its settings, its weights, and its name in tables."""

    config: StudentConfig
    path: Path
    title: str
    address: str | None = None  # hf://OWNER/REPO@COMMIT, if it is from Hugging Face


def find_student(run: str | Path, *, weights: Path | None = None) -> FoundStudent:
    """Finds a student without loading it.

    Args:
        run: A published or shipped name, the folder of a finished run or of a checkpoint (see
            `checkpoint_of`), a file: one that `dimo export` wrote with settings, or the
            official one of di4c-d; or `hf://OWNER/REPO[@REVISION]`, what `dimo export --push`
            wrote.
        weights: Folder of official files, where a published student is looked for.

    Raises:
        DimoError: Unknown student, unfinished run, invalid config, or file without settings; as
            `dimo.weights.download.fetch_snapshot`.
    """
    name = str(run)
    if name.startswith(HUB):
        return _on_hub(name)
    if name in PUBLISHED_STUDENTS:
        return _found(PUBLISHED_STUDENTS[name], locate(name, weights), name)
    try:
        is_file = Path(run).is_file()
    except OSError as error:  # e.g. too long for a path
        named = ", ".join([*shipped_students(), *PUBLISHED_STUDENTS])
        raise DimoError(
            f"student {name[:40]!r}... of {len(name)} characters is no path ({error.strerror}); "
            f"give a run folder, or a name: {named}"
        ) from error
    if is_file:
        return _found(_config_of_file(Path(run)), Path(run), Path(run).stem)
    if is_checkpoint(Path(run)):
        return _of_checkpoint(Path(run))
    folder = ASSETS / name if name in shipped_students() else Path(run)
    if not all((folder / file).is_file() for file in STUDENT_FILES):
        named = ", ".join([*shipped_students(), *PUBLISHED_STUDENTS])
        state = "is not finished (no student.safetensors)" if folder.is_dir() else "does not exist"
        raise DimoError(
            f"student run {name!r} {state}; students with a name: {named}; "
            "make or finish one with: dimo distill --teacher digits --out RUN --resume"
        )
    return _in_folder(folder, folder.name, "distil the run again")


def _on_hub(address: str) -> FoundStudent:
    commit, folder = fetch_snapshot(
        address, [*STUDENT_FILES, hash_file(Path(STUDENT_FILES[0])).name]
    )
    if missing := [file for file in STUDENT_FILES if not (folder / file).is_file()]:
        raise DimoError(
            f"{address} is no student of dimo, it has no {' and no '.join(missing)}; give one that "
            "dimo export --push made"
        )
    name = commit.removeprefix(HUB).partition("@")[0]
    student = _in_folder(folder, name, "export and push the student again")
    return dataclasses.replace(student, address=commit)


def _in_folder(folder: Path, name: str, next_step: str) -> FoundStudent:
    weights, config = (folder / file for file in STUDENT_FILES)
    origin = Origin(str(config), next_step)
    try:
        content = json.loads(config.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise origin.error(f"not valid JSON: {error}") from error
    return _found(_checked_config(content, origin), weights, name)


def checkpoint_of(run: str, step: int) -> str:
    """The checkpoint of a run after `step` steps, which `find_student` takes.

    Raises:
        DimoError: There is none.
    """
    path = Path(run) / "checkpoints" / f"step-{step:07d}"
    if not is_checkpoint(path):
        if not (steps := kept_steps(path.parent)):
            raise DimoError(
                f"{run!r} has no checkpoints; they lie in the folder of a run: leave --checkpoint "
                "out, or give that folder"
            )
        raise DimoError(
            f"run {run!r} has no checkpoint of step {step}, only of {steps}; the newest two are "
            "kept, and others by --set keep_every=N"
        )
    return str(path)


def _of_checkpoint(folder: Path) -> FoundStudent:
    """The EMA of a run after some of its steps."""
    found, run = read_checkpoint(folder), folder.parent.parent
    if found is None:
        raise DimoError(
            f"checkpoint {folder} is damaged; there are those of steps {kept_steps(folder.parent)}"
        )
    step, state = found
    recipe, name = load_distillation(str(run / "recipe.toml")), f"{run.name}, step {step}"
    config = StudentConfig.of_recipe(
        recipe,
        name,
        training_seconds=round(float(state["seconds"]), 1),
        images_seen=step * recipe.batch_size,
    )
    return _found(config, folder / STATE_FILE, name)


def _found(config: StudentConfig, path: Path, name: str) -> FoundStudent:
    title = METHODS[config.method].title
    return FoundStudent(config, path, title if name == title else f"{title} ({name})")


def _config_of_file(path: Path) -> StudentConfig:
    """The settings that a file carries, or those of the published student whose layout it has."""
    found = read_weights(path)
    if (config := stored_config(found, path)) is not None:
        return config
    if looks_like(found.state) == DI4C_KIND:
        return PUBLISHED_STUDENTS["di4c-d"]
    raise DimoError(
        f"{path} does not say how it was trained; make a run folder of it with: dimo import"
    )


def stored_config(found: Checkpoint, path: Path) -> StudentConfig | None:
    """The settings that `dimo export` stored in the file `path`; None if there are none."""
    if "teacher" not in found.settings:
        return None
    return _checked_config(found.settings, Origin(str(path), "export the student again"))


def save_student(folder: Path, state: dict[str, Tensor], config: StudentConfig) -> None:
    """Writes `student.safetensors` and then `config.json`, which marks the run as finished."""
    content = _config_content(config)
    timeless = {key: value for key, value in content.items() if key != "training_seconds"}
    save_tensors(folder / "student.safetensors", state, timeless)
    save_config(folder, config)


def save_config(folder: Path, config: StudentConfig) -> None:
    """Writes `config.json`."""
    write_atomic(folder / "config.json", json.dumps(_config_content(config), indent=2) + "\n")


def _config_content(config: StudentConfig) -> dict[str, Any]:
    content = dataclasses.asdict(config)
    if config.ablation is None:
        del content["ablation"]
    return content


def check_unused(out: Path, names: Sequence[str] = RUN_FILES) -> None:
    """Refuses a file, and a folder that has one of the files that are about to be written."""
    if out.exists() and not out.is_dir():
        raise DimoError(f"output {out} is a file; choose a folder as --out")
    if present := [name for name in names if (out / name).exists()]:
        raise DimoError(
            f"output {out} is not empty, it has {', '.join(present)}; choose another --out"
        )


def recipe_sha256(recipe: DistillationRecipe) -> str:
    """First 12 digits of the SHA-256 of the keys that decide what is trained, without the seed."""
    content = {key: value for key, value in encode(recipe).items() if key not in _OF_A_RUN}
    newer = ("init_from", "auxiliary_warmup_steps", "teacher_final_temperature", "fully_masked")
    for key in newer:
        if not content.get(key, ...):
            del content[key]  # as in hashes from before there was the key
    return sha256_bytes(canonical_json([recipe.method, content]).encode())[:12]


def varied(recipe: Any, keys: Sequence[str]) -> dict[str, Any] | None:
    """The recipe keys that an ablation varies, with their values, to be noted with a student."""
    content: dict[str, Any] = encode(recipe)
    for key in keys:
        if key not in content:
            raise unknown_name("key of the recipe to ablate", key, content)
    return {key: content[key] for key in keys} or None


def shipped_students() -> list[str]:
    """Names of the students that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/student.safetensors"))


def _checked_config(content: object, origin: Origin) -> StudentConfig:
    config, path = decode(StudentConfig, content, origin), origin.source
    for what, name, known in (
        ("method", config.method, METHODS),
        ("token initialization", config.token_initialization, TOKEN_INITIALIZATIONS),
    ):
        if name not in known:
            raise unknown_name(what, name, known, f"correct {path}")
    if config.format != 1:
        raise DimoError(f"{path} has format {config.format}, this version reads 1; update dimo")
    return config
