"""Exporting and importing students: the official Di[M]O layout, or the same keys as safetensors."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from dimo.config import load_distillation
from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.util.files import replacing, sha256_file
from dimo.weights.files import check_state, read_state_dict, save_tensors
from dimo.zoo.loading import load_network, student_architecture
from dimo.zoo.students import StudentConfig, check_unused, find_student, save_student
from dimo.zoo.teachers import Teacher, get_teacher

_SUFFIXES = (".bin", ".safetensors")


def export_student(
    run: str | Path, out: Path, *, weights: Path | None = None, force: bool = False
) -> StudentConfig:
    """Writes a student's network to one file, under the keys of its teacher's official code.

    A `.bin` is the layout of the official Di[M]O student (`pytorch_model.bin`): a pickle of the
    bare state dict, which `torch.load(..., weights_only=True)` reads. A `.safetensors` has the same
    keys and carries the student's settings as metadata. Both hold the same bits as the run.

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
    state = _checked_state(get_teacher(student.config.teacher), student.path, student.config.method)
    if out.suffix == ".safetensors":
        timeless = dataclasses.asdict(student.config)
        del timeless["training_seconds"]
        save_tensors(out, state, timeless)
    else:
        with replacing(out) as temporary, temporary.open("wb") as file:
            torch.save({key: value.contiguous() for key, value in state.items()}, file)
    return student.config


def import_student(
    path: Path,
    out: Path,
    *,
    teacher: str,
    init_mask_ratio: float | None = None,
    embedding_noise: float | None = None,
    temperature: float | None = None,
) -> StudentConfig:
    """Makes a run folder (`student.safetensors`, `config.json`) from a Di[M]O student's file.

    Args:
        path: Weights as `export_student` or the official code writes them.
        out: The run folder, new or without a run.
        teacher: The teacher whose network every key and shape must fit.
        init_mask_ratio: r of the student's training, 0 to 1; None: as in the teacher's recipe.
        embedding_noise: sigma of the student's training, 0 to 1; None: as in the recipe.
        temperature: Divides the logits in sampling, above 0; None: as in the recipe.

    Raises:
        DimoError: Unknown teacher; a value out of range, or none for a teacher without a recipe; a
            file that is missing, damaged or of another network; a folder that cannot be used.
    """
    row = get_teacher(teacher)
    values = {
        "init_mask_ratio": init_mask_ratio,
        "embedding_noise": embedding_noise,
        "temperature": temperature,
    }
    chosen_by = "given to dimo import"
    if None in values.values():
        if temperature is None:
            chosen_by = f"as in the recipe of teacher {teacher!r}"
        if row.recipe is None:
            raise DimoError(
                f"teacher {teacher!r} has no recipe to take defaults from; give "
                "--init-mask-ratio, --embedding-noise and --temperature"
            )
        recipe = load_distillation(row.recipe)
        defaults = METHODS["dimo"].distillation.student_settings(recipe)
        defaults = {**defaults, "temperature": recipe.temperature}
        values = {name: defaults[name] if v is None else v for name, v in values.items()}
    for name, value in values.items():
        assert value is not None
        is_temperature = name == "temperature"
        if not (0 < value < float("inf") if is_temperature else 0 <= value <= 1):
            allowed = "above 0" if is_temperature else "0 to 1"
            option = f"--{name.replace('_', '-')}"
            raise DimoError(f"{option} {value:g} is out of range; allowed: {allowed}")
    check_unused(out)
    _checked_state(row, path, "dimo")
    config = StudentConfig(
        teacher=teacher,
        **values,  # type: ignore[arg-type]
        temperature_selected_by=chosen_by,
        recipe=f"imported from {path.name}, sha256 {sha256_file(path)[:12]}",
    )
    save_student(out, load_network(row, path).state_dict(), config)
    return config


def _checked_state(teacher: Teacher, path: Path, method: str) -> dict[str, Tensor]:
    """The state dict of a file in full precision, in the key order of the student's network."""
    with torch.device("meta"):
        network = student_architecture(teacher, method)(**teacher.network)
    state = check_state(network, read_state_dict(path), name=str(path))
    own = network.state_dict()
    other = next((key for key, value in state.items() if value.dtype != own[key].dtype), None)
    if other is not None:
        raise DimoError(
            f"weights {path}: {other} is {state[other].dtype}, but {own[other].dtype} is needed; "
            "give the file in full precision"
        )
    return {key: state[key] for key in own}
