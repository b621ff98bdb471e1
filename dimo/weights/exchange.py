"""Exporting and importing students: official layouts, safetensors, and folders for a hub."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimo.config import load_distillation
from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.samplers import LARGEST
from dimo.util.files import replacing, sha256_file, write_atomic
from dimo.weights.download import hash_file, record_sha256
from dimo.weights.files import (
    DI4C_KIND,
    Checkpoint,
    check_state,
    looks_like,
    read_weights,
    save_pickle,
    save_tensors,
    sha256_weights,
)
from dimo.zoo.loading import student_architecture
from dimo.zoo.students import (
    STUDENT_FILES,
    FoundStudent,
    StudentConfig,
    check_unused,
    find_student,
    save_config,
    save_student,
    stored_config,
)
from dimo.zoo.teachers import Teacher, get_teacher

_SUFFIXES = (".bin", ".safetensors")
_PIPELINE = Path(__file__).with_name("pipeline.py")  # imports diffusers, and is only copied
_UNMARKED = "dimo"  # the method of a file without settings


def export_student(
    run: str | Path, out: Path, *, weights: Path | None = None, force: bool = False
) -> StudentConfig:
    """Writes a student's network to one file, under the keys of its teacher's official code.

    A `.bin` is the layout of the official Di[M]O student (`pytorch_model.bin`): a pickle of the
    bare state dict, which `torch.load(..., weights_only=True)` reads. Students that this layout
    cannot tell apart, those of another method or initialization, have it under `model_state_dict`,
    as the official code of di4c, with their settings beside it. A `.safetensors` has the same keys
    and carries the settings as metadata. All hold the same bits as the run.

    Args:
        run: As in `find_student`, like `weights`.
        out: The file; its suffix chooses the format.

    Raises:
        DimoError: No such student or an unfinished run; weights that do not fit its teacher;
            another suffix; a file that exists or cannot be written.
    """
    if out.suffix not in _SUFFIXES:
        raise DimoError(
            f"output {out} has the suffix {out.suffix!r}; allowed: {' and '.join(_SUFFIXES)}, "
            "e.g. pytorch_model.bin"
        )
    student = find_student(run, weights=weights)
    if out.exists() and (not force or out.is_dir()):
        raise DimoError(f"output {out} exists; replace a file with --force or choose another -o")
    config, stored = student.config, read_weights(student.path)
    state = _checked_state(get_teacher(config.teacher), stored.state, student.path, config.method)
    settings = dataclasses.asdict(config)
    del settings["training_seconds"]
    if out.suffix == ".safetensors":
        save_tensors(out, state, settings)
        return config
    bare = {key: value.contiguous() for key, value in state.items()}
    is_official = config.method == _UNMARKED and config.token_initialization == "mixed"
    save_pickle(out, bare if is_official else {"model_state_dict": bare, "dimo": settings})
    return config


def export_folder(
    student: FoundStudent, out: Path, card: str, *, diffusers: bool = False, force: bool = False
) -> list[Path]:
    """Writes a student as a folder that can be uploaded to a hub and loaded like a run.

    `student.safetensors` is the student's own file if it is of that format, so that records name
    it; else it holds the same tensors. Beside it are its SHA-256, as sha256sum writes it,
    `config.json`, the run's `recipe.toml` if there is one, and the model card as `README.md`.

    Args:
        diffusers: Add what `DiffusionPipeline.from_pretrained` of diffusers loads.

    Returns:
        The files.

    Raises:
        DimoError: Weights that do not fit the teacher; a folder that has one of the files, without
            `force`, or cannot be written.
    """
    weights, config = (out / file for file in STUDENT_FILES)
    recipe, readme = student.path.with_name("recipe.toml"), out / "README.md"
    files = [weights, hash_file(weights), readme, config]
    if recipe.is_file():
        files.append(out / recipe.name)
    if diffusers:
        files += [out / _PIPELINE.name, out / "model_index.json"]
    if not force:
        check_unused(out, [file.name for file in files])
    row = get_teacher(student.config.teacher)
    stored = read_weights(student.path)
    state = _checked_state(row, stored.state, student.path, student.config.method)
    if student.path.suffix == ".safetensors":
        with replacing(weights) as temporary:
            shutil.copyfile(student.path, temporary)
        save_config(out, student.config)
    else:
        save_student(out, state, student.config)
    record_sha256(weights, sha256_file(weights))
    write_atomic(readme, card)
    if recipe.is_file():
        write_atomic(out / recipe.name, recipe.read_bytes())
    if diffusers:
        write_atomic(out / _PIPELINE.name, _PIPELINE.read_bytes())
        index = {"_class_name": [_PIPELINE.stem, "DimoPipeline"]}
        write_atomic(out / "model_index.json", json.dumps(index) + "\n")
    return files


def import_student(
    path: Path,
    out: Path,
    *,
    teacher: str,
    init_mask_ratio: float | None = None,
    embedding_noise: float | None = None,
    temperature: float | None = None,
    ema: bool = True,
) -> StudentConfig:
    """Makes a run folder (`student.safetensors`, `config.json`) from a student's file.

    Settings that the file carries are kept, with the method. A file without any is a student of
    di4c-d if it has the keys of one, or else of Di[M]O.

    Args:
        path: Weights as `export_student` or the official code writes them.
        out: The run folder, new or without a run.
        teacher: The teacher whose network every key and shape must fit.
        init_mask_ratio: r of the student's training, 0 to 1; None: as in the file or, without
            settings there, in the teacher's recipe.
        embedding_noise: sigma of the student's training, 0 to 1; None: likewise.
        temperature: Divides the logits in sampling, above 0; None: likewise.
        ema: As for `dimo.weights.files.read_weights`.

    Raises:
        DimoError: Unknown teacher, or not that of the file; a value out of range, or none for a
            teacher without a recipe; a file that is missing, damaged or of another network; a
            folder that cannot be used.
    """
    row = get_teacher(teacher)
    values = {
        "init_mask_ratio": init_mask_ratio,
        "embedding_noise": embedding_noise,
        "temperature": temperature,
    }
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        is_temperature = name == "temperature"
        if not (0 < value <= LARGEST if is_temperature else 0 <= value <= 1):
            allowed = f"above 0, at most {LARGEST:g}" if is_temperature else "0 to 1"
            option = f"--{name.replace('_', '-')}"
            raise DimoError(f"{option} {value:g} is out of range; allowed: {allowed}")
    check_unused(out)
    found = read_weights(path, ema=ema)
    config = _settings(found, row, path, given)
    state = _checked_state(row, found.state, path, config.method)
    part = f", its {found.part}" if found.part else ""
    origin = f"imported from {path.name}{part}, sha256 {sha256_weights(path)[:12]}"
    config = dataclasses.replace(config, recipe=origin)
    save_student(out, state, config)
    return config


def _settings(
    found: Checkpoint, row: Teacher, path: Path, given: dict[str, float]
) -> StudentConfig:
    """How the student of a file is sampled: as given, as its file says, or as in the recipe."""
    chosen = {"temperature_selected_by": "given to dimo import"} if "temperature" in given else {}
    changes: dict[str, Any] = {**given, **chosen}
    config = stored_config(found, path)
    if config is not None:
        if config.teacher != row.name:
            raise DimoError(
                f"{path} is a student of teacher {config.teacher!r}, not of {row.name!r}; give "
                f"--teacher {config.teacher}"
            )
        return dataclasses.replace(config, **changes)
    method = "di4c-d" if looks_like(found.state) == DI4C_KIND else _UNMARKED
    if method in row.recipes:
        recipe = load_distillation(row.recipes[method])
        settings = METHODS[method].distillation.student_settings(recipe)
        settings["temperature"] = recipe.temperature
        settings["temperature_selected_by"] = f"as in the recipe of teacher {row.name!r}"
        changes = {**settings, **changes}
    elif len(given) < 3:
        raise DimoError(
            f"teacher {row.name!r} has no recipe of {METHODS[method].title} to take defaults from; "
            "give --init-mask-ratio, --embedding-noise and --temperature"
        )
    return StudentConfig(teacher=row.name, method=method, recipe="", **changes)


def _checked_state(
    teacher: Teacher, state: dict[str, Tensor], path: Path, method: str
) -> dict[str, Tensor]:
    """A state dict that fits, in the key order of the student's network and with its own types."""
    with torch.device("meta"):
        network = student_architecture(teacher, method)(**teacher.network)
    state = check_state(network, state, name=str(path))
    return {key: state[key] for key in network.state_dict()}
