"""A run folder, from a recipe to weights: distillation of a student, training of a teacher."""

__all__ = ["distill", "train_teacher"]

from collections.abc import Sequence
from pathlib import Path

import torch

from dimo import rng
from dimo.config import DistillRecipe, TrainRecipe, to_toml
from dimo.errors import DimoError
from dimo.files import sha256_file, write_atomic
from dimo.students import StudentConfig, save_student
from dimo.tasks import DistillTask, TeacherTask
from dimo.teachers import get_teacher, load_network, weights_file
from dimo.train import OnStep, Watcher, fit
from dimo.weights import save_tensors


def distill(
    recipe: DistillRecipe,
    out: Path,
    *,
    recipe_name: str,
    device: torch.device,
    weights: Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    watchers: Sequence[Watcher] = (),
) -> StudentConfig:
    """Distils a teacher into a one-step student and writes the run folder.

    The folder holds `recipe.toml`, `metrics.jsonl`, `checkpoints/` and, once finished,
    `student.safetensors` (the EMA) and `config.json`.

    Args:
        recipe: What to do.
        out: The run folder.
        recipe_name: Stored with the student.
        device: Where to train.
        weights: Folder of the teacher's weights; None: those shipped, or those fetched.
        resume: Go on from the newest checkpoint in `out`.
        on_step: As in `dimo.train.fit`.
        watchers: As in `dimo.train.fit`.

    Raises:
        DimoError: No weights of the teacher; `out` holds a run (without `resume`), nothing to
            resume, or another run.
    """
    row = get_teacher(recipe.teacher)
    path = weights_file(row, "transformer", weights)
    _open(out, to_toml(recipe), resume)
    teacher = load_network(row, path)
    student = row.architecture(**{**row.network, "dropout": recipe.dropout})
    student.load_state_dict(teacher.state_dict())
    task = DistillTask(recipe, teacher, student, row.label_smoothing, device)
    seconds = fit(task, out, resume=resume, on_step=on_step, watchers=watchers)
    config = StudentConfig(
        teacher=recipe.teacher,
        init_mask_ratio=recipe.sampling_mask_ratio,
        embedding_noise=recipe.embedding_noise,
        token_initialization=recipe.token_initialization,
        temperature=recipe.temperature,
        temperature_selected_by=recipe.temperature_selected_by,
        seed=recipe.seed,
        recipe=recipe_name,
        training_seconds=round(seconds, 1),
        images_seen=recipe.steps * recipe.batch_size,
        teacher_sha256=sha256_file(path),
    )
    save_student(out, task.ema, config)
    return config


def train_teacher(
    recipe: TrainRecipe,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> None:
    """Trains an embedded teacher from its data; `out` then works as `--weights`.

    Args:
        recipe: What to do.
        out: The run folder; gets the tokenizer's and the transformer's weights.
        device: Where to train.
        resume: Go on from the newest checkpoint in `out`.
        on_step: As in `dimo.train.fit`.

    Raises:
        DimoError: The teacher has no embedded data; or as `distill`.
    """
    from dimo.datasets import digits
    from dimo.models.digits import DigitsTokenizer

    teacher = get_teacher(recipe.teacher)
    if not teacher.is_embedded:
        raise DimoError(
            f"teacher {teacher.name!r} is not trained here, its weights are published; "
            f"fetch them with: dimo weights fetch {teacher.weights['transformer']}"
        )
    _open(out, to_toml(recipe), resume)
    images, labels = digits.load()
    size = teacher.network["codebook_size"]
    tokenizer = DigitsTokenizer.fit(images, codebook_size=size, seed=recipe.seed)
    torch.manual_seed(rng.stream_seed(recipe.seed, "weights"))
    network = teacher.architecture(**{**teacher.network, "dropout": recipe.dropout})
    task = TeacherTask(recipe, network, tokenizer.encode(images), labels, device)
    fit(task, out, resume=resume, on_step=on_step)
    provenance = {"recipe": to_toml(recipe), "data": "scikit-learn digits, 1,797 images"}
    save_tensors(out / teacher.weights["tokenizer"], tokenizer.state_dict(), provenance)
    save_tensors(out / teacher.weights["transformer"], task.ema.state_dict(), provenance)


def _open(out: Path, recipe: str, resume: bool) -> None:
    path = out / "recipe.toml"
    if resume and not path.is_file():
        raise DimoError(f"no run to resume at {out}; start it without --resume")
    if not resume and out.exists() and any(out.iterdir()):
        raise DimoError(
            f"output {out} exists and is not empty; "
            "continue it with --resume or choose another --out"
        )
    if not resume:
        write_atomic(path, recipe)
