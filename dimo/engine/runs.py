"""A run folder, from a recipe to weights: distillation of a student, training of a teacher."""

import dataclasses
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from dimo import rng
from dimo.config import DistillationRecipe, DistillRecipe, TrainRecipe, load_recipe, to_toml
from dimo.data.tokens import load_tokens
from dimo.engine.distributed import Ranks, ranks
from dimo.engine.loop import OnStep, Watcher, fit
from dimo.errors import DimoError
from dimo.methods.di4c.method import Di4CTask
from dimo.methods.di4c.network import Di4CStudent
from dimo.methods.dimo.method import DistillTask
from dimo.methods.pretraining import TeacherTask
from dimo.methods.recipes import Di4CRecipe
from dimo.methods.sdtt.method import SDTTTask
from dimo.models.cpu import has_bfloat16
from dimo.models.text import prompts_from_file
from dimo.util.files import remove_temporaries, sha256_file, write_atomic
from dimo.weights.files import save_tensors
from dimo.zoo.bundled import OnTokenizer
from dimo.zoo.loading import (
    load_network,
    load_prompts,
    make_network,
    student_architecture,
    weights_file,
)
from dimo.zoo.students import StudentConfig, save_student
from dimo.zoo.teachers import Teacher, get_teacher

Trained = TypeVar("Trained", bound=DistillationRecipe | TrainRecipe)


def for_device(recipe: Trained, device: torch.device) -> Trained:
    """The recipe, in float32 where it asks for bfloat16 on a CPU that has no such instructions."""
    if recipe.precision != "bfloat16" or device.type != "cpu" or has_bfloat16():
        return recipe
    return dataclasses.replace(recipe, precision="float32")


def distill(
    recipe: DistillationRecipe,
    out: Path,
    *,
    recipe_name: str,
    device: torch.device,
    weights: Path | None = None,
    data: Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    watchers: Sequence[Watcher] = (),
    ablation: dict[str, Any] | None = None,
) -> StudentConfig:
    """Distils a teacher into a student by the recipe's method and writes the run folder.

    The folder holds `recipe.toml`, `metrics.jsonl`, `checkpoints/` and, once finished,
    `student.safetensors` (the EMA) and `config.json`. The ranks that `torchrun` started share
    each batch. An unfinished run of the same recipe goes on, with `resume` or without.

    Args:
        recipe: What to do.
        out: The run folder.
        recipe_name: Stored with the student.
        device: Where to train.
        weights: Folder of the teacher's weights; None: those shipped, or those fetched.
        data: Encoded images, as `dimo encode` writes them, for a method that needs data; None:
            the embedded data of the teacher.
        resume: There must be an unfinished run in `out`.
        on_step: As in `dimo.engine.loop.fit`.
        watchers: As in `dimo.engine.loop.fit`.
        ablation: Noted with the student, see `dimo.zoo.students.varied`.

    Raises:
        DimoError: No weights of the teacher, or some that are not finite; no data, or data for a
            method that takes none; a network that the method does not have; a batch that does not
            split; `out` holds something else, a finished run, a run of another recipe or one
            that is running; nothing to resume; or as `dimo.engine.loop.fit`.
    """
    with ranks() as group:
        return _distill(
            recipe,
            out,
            recipe_name,
            device,
            weights,
            data,
            resume,
            on_step,
            watchers,
            ablation,
            group,
        )


def _distill(
    recipe: DistillationRecipe,
    out: Path,
    recipe_name: str,
    device: torch.device,
    weights: Path | None,
    data: Path | None,
    resume: bool,
    on_step: OnStep | None,
    watchers: Sequence[Watcher],
    ablation: dict[str, Any] | None,
    group: Ranks,
) -> StudentConfig:
    """`distill` among ranks; nothing of the networks outlives it, see
    `dimo.engine.distributed.ranks`."""
    recipe, row = for_device(recipe, device), get_teacher(recipe.teacher)
    path = weights_file(row, "transformer", weights)
    task = _distillation_of(recipe, row, path, weights, data, device, group)
    with _opened(out, recipe, out / "config.json", resume, group):
        seconds = fit(task, out, resume=True, on_step=on_step, watchers=watchers)
        config = StudentConfig.of_recipe(
            recipe,
            recipe_name,
            training_seconds=round(seconds, 1),
            images_seen=recipe.steps * recipe.batch_size,
            teacher_sha256=sha256_file(path),
            ablation=ablation,
        )
        state = task.ema.state_dict() if row.bundled is None else row.bundled.stored(task.ema)
        group.alike(lambda: save_student(out, state, config) if group.is_first else None)
    return config


def _distillation_of(
    recipe: DistillationRecipe,
    row: Teacher,
    path: Path,
    weights: Path | None,
    data: Path | None,
    device: torch.device,
    group: Ranks,
) -> DistillTask | Di4CTask | SDTTTask:
    """The training of the recipe's method; what the student has beyond its teacher is fresh."""
    architecture = student_architecture(row, recipe.method)
    prompts = load_prompts(row, _drawn_prompts(recipe, row), weights)
    if prompts is not None:
        prompts.to(device)
    teacher = load_network(row, path, prompts)
    torch.manual_seed(rng.stream_seed(recipe.seed, "weights"))
    student = make_network(row, prompts, architecture, dropout=recipe.dropout)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    if isinstance(recipe, DistillRecipe):
        if data is not None:
            raise DimoError(f"method {recipe.method!r} takes no data; leave out --data {data}")
        task = DistillTask(recipe, teacher, student, row.label_smoothing, device, group)
        if prompts is not None:
            task.inputs += f" prompts {prompts.sha256}"
        return task
    images = load_tokens(data, teacher=row.name, weights=weights)
    if isinstance(recipe, Di4CRecipe):
        assert isinstance(student, Di4CStudent)
        return Di4CTask(recipe, teacher, student, images, device, group)
    return SDTTTask(recipe, teacher, student, images, device, group)


def _drawn_prompts(recipe: DistillationRecipe, row: Teacher) -> Sequence[str] | None:
    """Those of the recipe's file, or of the teacher's world; None for classes.

    Raises:
        DimoError: A method that knows classes alone, or the file is not one of prompts.
    """
    if not isinstance(recipe, DistillRecipe):
        if row.text is not None:
            raise DimoError(
                f"method {recipe.method!r} distils teachers of classes, and {row.name!r} draws "
                "prompts; use --method dimo"
            )
        return None
    if recipe.prompts is not None:
        return prompts_from_file(recipe.prompts)
    if row.bundled is None or row.bundled.prompts is None:
        return None
    return row.bundled.prompts()


def train_teacher(
    recipe: TrainRecipe,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    on_step: OnStep | None = None,
    watchers: Sequence[Watcher] = (),
    on_tokenizer: OnTokenizer = lambda done: None,
) -> None:
    """Trains an embedded teacher from its data; `out` then works as `--weights`.

    Args:
        recipe: What to do.
        out: The run folder; gets the tokenizer's and the transformer's weights.
        device: Where to train.
        resume: There must be an unfinished run in `out`.
        on_step: As in `dimo.engine.loop.fit`.
        watchers: As in `dimo.engine.loop.fit`.
        on_tokenizer: Told the steps done of a tokenizer that is a network.

    Raises:
        DimoError: The teacher has no embedded data; or as `distill`.
    """
    with ranks() as group:
        _train_teacher(recipe, out, device, resume, on_step, watchers, on_tokenizer, group)


def _train_teacher(
    recipe: TrainRecipe,
    out: Path,
    device: torch.device,
    resume: bool,
    on_step: OnStep | None,
    watchers: Sequence[Watcher],
    on_tokenizer: OnTokenizer,
    group: Ranks,
) -> None:
    """`train_teacher` among ranks, as `_distill`."""
    recipe, teacher = for_device(recipe, device), get_teacher(recipe.teacher)
    world = teacher.bundled
    if world is None:
        raise DimoError(
            f"teacher {teacher.name!r} is not trained here, its weights are published; "
            f"fetch them with: dimo weights fetch {teacher.weights['transformer']}"
        )
    finished = out / teacher.weights["transformer"]
    codebook = out / teacher.weights["tokenizer"]
    provenance = {"recipe": to_toml(recipe), "data": world.data}

    def fit_tokenizer() -> None:
        if group.is_first and not codebook.is_file():
            tokenizer = world.fit_tokenizer(
                codebook_size=teacher.network["codebook_size"],
                steps=recipe.tokenizer_steps,
                seed=recipe.seed,
                on_step=on_tokenizer,
            )
            save_tensors(codebook, world.stored(tokenizer), provenance)

    def save() -> None:
        if group.is_first:
            save_tensors(finished, world.stored(task.ema), provenance)

    with _opened(out, recipe, finished, resume, group):
        group.alike(fit_tokenizer)
        data = world.training_data(teacher.tokenizer(codebook))
        captions = world.captions() if world.captions is not None else None
        prompts = load_prompts(teacher, captions)
        torch.manual_seed(rng.stream_seed(recipe.seed, "weights"))
        network = make_network(teacher, prompts, dropout=recipe.dropout)
        task = TeacherTask(recipe, network, data, device, group)
        fit(task, out, resume=True, on_step=on_step, watchers=watchers)
        group.alike(save)


@contextmanager
def _opened(
    out: Path, recipe: DistillationRecipe | TrainRecipe, finished: Path, resume: bool, group: Ranks
) -> Iterator[None]:
    """The run folder, made or found fit to go on, and locked against a second process."""
    locks: list[int] = []

    def claim() -> None:
        if group.is_first:
            _check(out, recipe, finished, resume)
            locks.append(_lock(out))
            write_atomic(out / "recipe.toml", to_toml(recipe))
            remove_temporaries(out, "*")

    group.alike(claim)
    try:
        yield
    finally:
        for handle in locks:
            os.close(handle)


def _check(
    out: Path, recipe: DistillationRecipe | TrainRecipe, finished: Path, resume: bool
) -> None:
    """
    Raises:
        DimoError: The folder is no place for this run, or no run to go on with.
    """
    path = out / "recipe.toml"
    if not path.is_file():
        if resume:
            raise DimoError(f"no run to resume at {out}; start it without --resume")
        if out.exists() and any(not p.name.endswith(".tmp") for p in out.iterdir()):
            raise DimoError(f"output {out} exists and is not empty; choose another --out")
        return
    found = load_recipe(type(recipe), str(path))
    there = dataclasses.asdict(found)
    here = dataclasses.asdict(recipe)
    told = [f"{k} = {there[k]!r} there, {here[k]!r} here" for k in here if here[k] != there[k]]
    if told:
        raise DimoError(
            f"output {out} is not empty, it holds a run of another recipe ({', '.join(told)}); "
            "go on with the same, or choose another --out"
        )
    if finished.is_file():
        raise DimoError(
            f"output {out} is not empty, it holds the finished run of this recipe "
            f"({recipe.steps} steps); use it, or choose another --out"
        )


def _lock(out: Path) -> int:
    """Locks the folder as long as the returned handle is open; a killed process lets go.

    Raises:
        DimoError: Another process has it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise DimoError(
            f"cannot use output {out}: {error.strerror}; choose another --out"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DimoError(f"the run in {out} is going on in another process; wait for it") from None
    except OSError:
        pass  # a file system without locks
    return handle
