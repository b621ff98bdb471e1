"""A run folder, from a recipe to weights: distillation of a student, training of a teacher."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from dimo import rng
from dimo.config import load_distillation, load_recipe, to_toml
from dimo.engine.checkpoint import kept_steps, latest_checkpoint
from dimo.engine.distributed import Runtime, choose_device, ranks
from dimo.engine.loop import OnStep, Watcher, differences, fit
from dimo.errors import DimoError, unknown_name
from dimo.methods import METHODS
from dimo.methods.base import DistillationRecipe, Task, TeacherDefaults
from dimo.methods.pretraining import TeacherTask, TrainingData, TrainRecipe
from dimo.models.cpu import has_bfloat16
from dimo.models.text import Prompts, prompts_from_file
from dimo.samplers import get_sampler
from dimo.util.files import remove_temporaries, sha256_file, try_lock, write_atomic
from dimo.weights.files import save_tensors
from dimo.zoo.bundled import BundledData, EncodedImages
from dimo.zoo.loading import (
    load_network,
    load_prompts,
    load_tokens,
    make_network,
    student_architecture,
    weights_file,
)
from dimo.zoo.students import (
    RUN_FILES,
    StudentConfig,
    check_unused,
    find_student,
    recipe_sha256,
    save_student,
)
from dimo.zoo.teachers import TEACHER_WEIGHTS, Teacher, get_teacher

Trained = TypeVar("Trained", bound=DistillationRecipe | TrainRecipe)


def for_device(recipe: Trained, device: torch.device) -> Trained:
    """The recipe, in float32 where it asks for bfloat16 on a CPU without such instructions."""
    if recipe.precision != "bfloat16" or device.type != "cpu" or has_bfloat16():
        return recipe
    return dataclasses.replace(recipe, precision="float32")


def find_recipe(
    teacher: str = "", method: str = "", recipe: str = "", settings: Sequence[str] = ()
) -> tuple[str, DistillationRecipe]:
    """The name of a distillation recipe, and the recipe with `settings`, `key=value` overrides.

    `recipe` is the name or path of a .toml, by default that of teacher and method. `teacher` and
    `method`, a key of `dimo.methods.METHODS`, are by default those of the recipe; without one,
    digits and dimo.

    Raises:
        DimoError: Unknown names, no recipe for that teacher and method, or one of others.
    """
    row = get_teacher(teacher or "digits")
    if method and method not in METHODS:
        raise unknown_name("method", method, METHODS)
    name = recipe or row.recipes.get(method or "dimo")
    if name is None:
        raise DimoError(
            f"there is no recipe of method {method or 'dimo'!r} for teacher {row.name!r} yet; "
            "name one with --recipe NAME or --recipe FILE.toml"
        )
    # a recipe that several teachers share names one of them
    shared = [f"teacher={json.dumps(row.name)}"] if teacher and name in row.recipes.values() else []
    if row.data is not None:  # its temperature was chosen for another teacher
        shared.append(f'temperature_selected_by="recipe {Path(name).stem}, not tuned"')
    loaded = load_distillation(name, [*shared, *settings])
    check_named(name, "teacher", teacher and row.name, get_teacher(loaded.teacher).name)
    check_named(name, "method", method, loaded.method)
    return Path(name).stem, loaded


def check_named(recipe: str, key: str, given: str, own: str) -> None:
    """Refuses an option that contradicts what the recipe names; "" is no option."""
    if given and given != own:
        raise DimoError(
            f"recipe {recipe!r} is one of {key} {own!r}, not {given!r}; leave --{key} out, or name "
            "another recipe"
        )


def distill_teacher(
    teacher: str = "",
    *,
    method: str = "",
    recipe: str = "",
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    device: str = "auto",
    weights: Path | None = None,
    data: Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> Path:
    """Distils a teacher as `dimo distill` does, without its pictures and scores.

    Arguments are those of `find_recipe`, `dimo.engine.distributed.choose_device` and `distill`.
    Returns the run folder (runs/RECIPE unless `out` is given), which `dimo.load` takes.
    """
    name, loaded = find_recipe(teacher, method, recipe, settings)
    folder = Path(out or Path("runs") / name)
    options: dict[str, Any] = {"weights": weights, "data": data, "resume": resume}
    with ranks() as group:
        runtime = Runtime(choose_device(device), group)
        distill(loaded, folder, recipe_name=name, runtime=runtime, on_step=on_step, **options)
    return folder


def distill(
    recipe: DistillationRecipe,
    out: Path,
    *,
    recipe_name: str,
    runtime: Runtime,
    weights: Path | None = None,
    data: Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    watchers: Sequence[Watcher] = (),
    ablation: dict[str, Any] | None = None,
) -> StudentConfig:
    """Distils a teacher into a student by the recipe's method and writes the run folder.

    The folder holds `recipe.toml`, `metrics.jsonl`, `checkpoints/` and, once finished,
    `student.safetensors` (the EMA) and `config.json`. An unfinished run of the same recipe is
    continued, with `resume` or without.

    Args:
        recipe: As from `find_recipe`, like `recipe_name`, which is stored with the student.
        out: The run folder.
        runtime: Where to train; its ranks share each batch.
        weights: Folder of the teacher's weights; None: the bundled or downloaded ones.
        data: Encoded images, as `dimo encode` writes them; None: the teacher's bundled data.
        resume: Require an unfinished run in `out`.
        on_step: As for `dimo.engine.loop.fit`, like `watchers`.
        ablation: Stored with the student, see `dimo.zoo.students.varied`.

    Raises:
        DimoError: Weights or data are missing or do not fit the method; `out` holds other files, a
            finished run, a run of another recipe or one in progress; or as for `fit`.
    """
    recipe, row = for_device(recipe, runtime.device), get_teacher(recipe.teacher)
    path, group = weights_file(row, "transformer", weights), runtime.ranks
    task = _task(recipe, row, path, weights, data, runtime)
    with _opened(out, recipe, out / "config.json", resume, runtime):
        seconds = fit(task, out, resume=True, on_step=on_step, watchers=watchers, warn=runtime.warn)
        config = StudentConfig.of_recipe(
            recipe,
            recipe_name,
            recipe_sha256=recipe_sha256(recipe),
            training_seconds=round(seconds, 1),
            images_seen=recipe.steps * recipe.batch_size,
            teacher_sha256=sha256_file(path),
            ablation=ablation,
        )
        ema = task.networks["ema"]
        state = ema.state_dict() if row.bundled is None else row.bundled.stored(ema)
        group.synchronized(lambda: save_student(out, state, config) if group.is_first else None)
    return config


def _task(
    recipe: DistillationRecipe,
    row: Teacher,
    path: Path,
    weights: Path | None,
    data: Path | None,
    runtime: Runtime,
) -> Task:
    """The task of the recipe's method; modules that the teacher lacks have fresh weights."""
    method = METHODS[recipe.method]
    architecture = student_architecture(row, recipe.method)
    if data is not None and not method.needs_data:
        raise DimoError(f"method {recipe.method!r} takes no data; leave out --data {data}")
    prompts = load_prompts(row, _drawn_prompts(recipe, row), weights)
    if prompts is not None:
        prompts.to(runtime.device)
    teacher = load_network(row, path, prompts)
    torch.manual_seed(rng.stream_seed(recipe.seed, "weights"))
    student = make_network(row, prompts, architecture, dropout=recipe.dropout)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    begun = None if recipe.init_from is None else find_student(recipe.init_from, weights=weights)
    if begun is not None:
        if begun.config.teacher != row.name:
            raise DimoError(
                f"student {recipe.init_from!r} was distilled from {begun.config.teacher!r}, not "
                f"from {row.name!r}; start from a student of this teacher"
            )
        network = load_network(row, begun.path, prompts, architecture)
        student.load_state_dict(network.state_dict())
    images = load_tokens(data, teacher=row.name, weights=weights) if method.needs_data else None
    make = method.distillation.task
    task = make(recipe, teacher, student, images, _defaults(row), runtime)
    if prompts is not None:
        task.inputs += f" prompts {prompts.sha256}"
    if begun is not None:
        task.inputs += f" student {sha256_file(begun.path)}"
    return task


def _defaults(row: Teacher) -> TeacherDefaults:
    own = row.defaults
    knobs = {knob.name for knob in get_sampler(own.sampler).knobs}
    settings = {
        key: value for key, value in vars(own).items() if key in knobs and value is not None
    }
    return TeacherDefaults(row.label_smoothing, own.sampler, settings)


def _drawn_prompts(recipe: DistillationRecipe, row: Teacher) -> Sequence[str] | None:
    """The prompts of the recipe's file, or the teacher's bundled ones; None for classes."""
    method = METHODS[recipe.method]
    if method.needs_data:
        if row.text is None:
            return None
        raise DimoError(
            f"method {recipe.method!r} distils teachers of classes, and {row.name!r} draws "
            "prompts; use --method dimo"
        )
    if (path := method.distillation.prompts_file(recipe)) is not None:
        return prompts_from_file(path)
    return None if row.bundled is None or row.bundled.prompts is None else row.bundled.prompts()


def train_teacher(
    recipe: TrainRecipe,
    out: Path,
    *,
    runtime: Runtime,
    weights: Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    watchers: Sequence[Watcher] = (),
) -> None:
    """Trains a bundled teacher from its data, or a new one by a recipe with a `size`.

    A bundled teacher's run folder gets the weights of tokenizer and transformer and then works as
    `--weights`. For a new teacher, `out` already holds what `dimo.zoo.teachers.save_teacher` and
    `dimo.data.encode.encode_images` wrote, and gets the weights. Arguments as for `distill`;
    `weights` is the folder of published tokenizers, and the runtime shows the progress of training
    a bundled one.

    Raises:
        DimoError: The teacher has no data; or as for `distill`.
    """
    recipe = for_device(recipe, runtime.device)
    row, group = get_teacher(recipe.teacher or str(out)), runtime.ranks
    if not row.has_data:
        raise DimoError(
            f"teacher {row.name!r} cannot be trained here, its weights are published; "
            f"fetch them with: dimo weights fetch {row.weights['transformer']}"
        )
    finished, bundled = out / row.weights["transformer"], row.bundled

    def save() -> None:
        if group.is_first:
            state = task.ema.state_dict() if bundled is None else bundled.stored(task.ema)
            save_tensors(finished, state, {"recipe": to_toml(recipe), "data": source})

    with _opened(out, recipe, finished, resume, runtime):
        data: TrainingData
        prompts: Prompts | None = None
        if bundled is None:
            tokens = load_tokens(None, teacher=row.name, weights=weights)
            data = EncodedImages(tokens.tokens, tokens.labels)
            source = f"{len(tokens.labels):,} images, tokens of sha256 {tokens.sha256}"
        else:
            codebook, source = out / row.weights["tokenizer"], bundled.data
            group.synchronized(lambda: _fit_tokenizer(recipe, row, bundled, codebook, runtime))
            data = bundled.training_data(row.tokenizer(codebook))
            prompts = load_prompts(row, None if bundled.captions is None else bundled.captions())
        torch.manual_seed(rng.stream_seed(recipe.seed, "weights"))
        network = make_network(row, prompts, dropout=recipe.dropout)
        task = TeacherTask(recipe, network, data, runtime)
        fit(task, out, resume=True, on_step=on_step, watchers=watchers, warn=runtime.warn)
        group.synchronized(save)


def _fit_tokenizer(
    recipe: TrainRecipe, row: Teacher, bundled: BundledData, path: Path, runtime: Runtime
) -> None:
    """Trains the tokenizer of a bundled teacher on the first rank, unless it is there."""
    if not runtime.ranks.is_first or path.is_file():
        return
    steps = recipe.tokenizer_steps
    tokenizer = bundled.fit_tokenizer(
        codebook_size=row.network["codebook_size"],
        steps=steps,
        seed=recipe.seed,
        on_step=lambda done: runtime.progress("tokenizer", done, steps, "steps"),
    )
    provenance = {"recipe": to_toml(recipe), "data": bundled.data}
    save_tensors(path, bundled.stored(tokenizer), provenance)


@contextmanager
def _opened(
    out: Path,
    recipe: DistillationRecipe | TrainRecipe,
    finished: Path,
    resume: bool,
    runtime: Runtime,
) -> Iterator[None]:
    """The run folder, created or checked to be this run's, and locked against other processes."""
    locks: list[int] = []

    def claim() -> None:
        if runtime.ranks.is_first:
            _check(out, recipe, finished, resume, runtime.device)
            locks.append(_lock(out))
            finished.unlink(missing_ok=True)  # of a run that is to become longer
            write_atomic(out / "recipe.toml", to_toml(recipe))
            for name in _files(recipe):
                remove_temporaries(out, name)

    runtime.ranks.synchronized(claim)
    try:
        yield
    finally:
        for handle in locks:
            os.close(handle)


def _files(recipe: DistillationRecipe | TrainRecipe) -> tuple[str, ...]:
    """What a run may write to its folder."""
    if not recipe.teacher:
        return (*RUN_FILES, TEACHER_WEIGHTS)
    names = get_teacher(recipe.teacher).weights.values()
    return (*RUN_FILES, *(name for name in names if not Path(name).is_absolute()))


def _check(
    out: Path,
    recipe: DistillationRecipe | TrainRecipe,
    finished: Path,
    resume: bool,
    device: torch.device,
) -> None:
    """Refuses a folder that is in use for something else, or holds no run to resume."""
    path, checkpoints = out / "recipe.toml", out / "checkpoints"
    if path.is_file():
        old = dataclasses.asdict(load_recipe(type(recipe), str(path)))
    elif (newest := latest_checkpoint(checkpoints)) is not None:
        old = newest[1]["recipe"]  # the file is lost, and written again
    else:
        if resume:
            raise DimoError(f"no run to resume at {out}; start it without --resume")
        check_unused(out, _files(recipe))
        return
    _, refused = differences(old, recipe, device)
    if refused:
        raise DimoError(
            f"output {out} is not empty, it holds a run of another recipe ({refused}); "
            "continue with the same recipe, or choose another --out"
        )
    if finished.is_file() and old["steps"] == recipe.steps:
        raise DimoError(
            f"output {out} is not empty, it holds the finished run of this recipe "
            f"({recipe.steps} steps); use it, let it take more with --set steps=N, or choose "
            "another --out"
        )
    if finished.is_file() and not kept_steps(checkpoints):
        raise DimoError(
            f"output {out} holds a finished run without the checkpoints that more steps need; "
            "choose another --out, and start it from this student with --init-from"
        )


def _lock(out: Path) -> int:
    """Creates and locks the folder; returns the handle that holds the lock."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise DimoError(
            f"cannot use output {out}: {error.strerror}; choose another --out"
        ) from None
    if not try_lock(handle):
        os.close(handle)
        raise DimoError(f"another process is running in {out}; wait until it ends")
    return handle
