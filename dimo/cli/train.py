"""`dimo train`."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples
from dimo.errors import DimoError, unknown_name
from dimo.util import terminal

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

    from dimo.engine.distributed import Runtime
    from dimo.engine.loop import Watcher
    from dimo.methods.base import DistillationRecipe
    from dimo.methods.pretraining import ExtractorRecipe, TrainRecipe


_OWN, _BUNDLED = (
    "Data of your own",
    "What comes with the package",
)  # sections of `dimo train --help`
_BATCH = 64  # images at a time, encoded; changes speed and memory only


@app.command(
    epilog=examples(
        "dimo train --data photos/ --tokenizer maskgit-vqgan --out runs/photos",
        "dimo train --data set.zip --centre-crop 256 --tokenizer llamagen-vq16",
        "dimo train --teacher digits --out runs/my-teacher",
    )
)
def train(
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            rich_help_panel=_OWN,
            help="Images to train a new teacher on: folder with one folder per class, or of one "
            "class, .zip, .tar (WebDataset) or .npz; may be repeated.",
        ),
    ] = [],  # noqa: B006
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_OWN,
            help="maskgit-vqgan, llamagen-vq16, digits, scenes, or the weights file of a VQGAN.",
        ),
    ] = "",
    labels: Annotated[
        str,
        typer.Option(metavar="SOURCE", rich_help_panel=_OWN, help="Labels, as of dimo encode."),
    ] = "",
    centre_crop: Annotated[
        int | None,
        typer.Option(
            "--centre-crop",
            metavar="SIDE",
            min=1,
            rich_help_panel=_OWN,
            help="Fit images of any size to SIDE pixels, as dimo encode does; default: they all "
            "have one size.",
        ),
    ] = None,
    mirror: Annotated[
        bool,
        typer.Option("--mirror", rich_help_panel=_OWN, help="Also train on mirror images."),
    ] = False,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_OWN,
            help="Protocol that the teacher and its students are scored under by default, also "
            "during training, e.g. a file of dimo protocols new.",
        ),
    ] = "",
    teacher: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_BUNDLED,
            help="Teacher to train from its bundled data; default: the recipe's.",
        ),
    ] = "",
    extractor: Annotated[
        str,
        typer.Option(
            metavar="NAME", rich_help_panel=_BUNDLED, help="Feature extractor to train instead."
        ),
    ] = "",
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Recipe name or .toml; default: that of the teacher, or small with --data "
            "(others: tiny, base).",
        ),
    ] = "",
    settings: opt.Settings = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder; default: runs/NAME.")
    ] = None,
    resume: opt.Resume = False,
    weights: opt.Weights = None,
    device: opt.Device = "auto",
) -> None:
    """Train a teacher on images of your own, or what comes with the package anew.

    With --data, images are encoded (RUN/tokens.safetensors) and a masked transformer is trained on
    their tokens; RUN is then a teacher for --teacher and --model of the other commands.
    """
    if bool(data) + bool(teacher) + bool(extractor) > 1 or not (
        data or teacher or extractor or recipe
    ):
        raise DimoError(
            "train needs one of --data, --teacher and --extractor; e.g. --data photos/ --tokenizer "
            "maskgit-vqgan"
        )
    if extractor:
        _train_extractor(extractor, recipe, settings, out)
        return
    from dimo.config import load_recipe
    from dimo.engine.distributed import Runtime, choose_device, ranks
    from dimo.engine.runs import check_named, train_teacher
    from dimo.methods.pretraining import TrainRecipe
    from dimo.zoo.teachers import get_teacher

    if teacher:
        get_teacher(teacher)
    name, place = recipe or (f"{teacher}-teacher" if teacher else "small"), choose_device(device)
    loaded = load_recipe(TrainRecipe, name, settings)
    check_named(name, "teacher", teacher, loaded.teacher)
    if bool(data) != bool(loaded.size) or bool(data) != bool(tokenizer):
        raise DimoError(
            f"recipe {name!r} trains {'a new teacher' if loaded.size else repr(loaded.teacher)}; "
            "a new teacher takes --data and --tokenizer and a recipe with a size (tiny, small, "
            "base), a bundled one none of them"
        )
    own = loaded.teacher or data[0].stem
    folder = out or Path("runs") / f"{own}-teacher"
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.work_bar())
        group = stack.enter_context(ranks())
        runtime = Runtime(place, group, progress, terminal.warn)
        watchers: tuple[Watcher, ...] = ()
        if data:
            source = _Source(data, tokenizer, labels, centre_crop, mirror, protocol, weights)
            group.synchronized(lambda: _encode(source, loaded, folder, runtime))
            from bench.monitor import Watching, watching

            watchers = stack.enter_context(
                watching(
                    Watching(),
                    loaded,
                    folder,
                    device=place,
                    weights=weights,
                    is_first=group.is_first,
                )
            )
        on_step = stack.enter_context(bar(f"train {own}", loaded, place))
        train_teacher(
            loaded,
            folder,
            runtime=runtime,
            weights=weights,
            resume=resume,
            on_step=on_step,
            watchers=watchers,
        )
    if data:
        terminal.say(f"teacher: {folder}; distil it with: dimo distill --teacher {folder}")
    else:
        terminal.say(
            f"weights: {folder}; score them with: dimo bench --teacher {own} --weights {folder}"
        )


@dataclasses.dataclass(frozen=True)
class _Source:
    """The images of a new teacher, as the options of `dimo train` name them."""

    paths: list[Path]
    tokenizer: str
    labels: str
    side: int | None  # to crop to; None: they all have one size
    mirror: bool
    protocol: str
    weights: Path | None


def _encode(source: _Source, recipe: "TrainRecipe", folder: Path, runtime: "Runtime") -> None:
    """Makes the folder a teacher that is still to be trained, with its token cache."""
    import torch

    from bench.images import classes_of, open_images
    from bench.rows.settings import protocol_for
    from dimo.data.encode import encode_images
    from dimo.zoo.loading import load_tokenizer
    from dimo.zoo.teachers import (
        TOKENIZERS,
        TOKENS_FILE,
        TeacherConfig,
        find_tokenizer,
        save_teacher,
        trained_teacher,
    )

    if not runtime.ranks.is_first:
        return
    images = open_images(source.paths, recursive=True, labels=source.labels)
    labels, class_names = classes_of(images.names, images.labels)
    first = images.load(range(1), side=source.side)
    side = int(first.shape[-1])
    tokenizer = load_tokenizer(source.tokenizer, side, source.weights).to(runtime.device)
    height, made = first.shape[-2], tokenizer.encode(first).shape[1]
    if (height, made) != (side, tokenizer.num_tokens):
        raise DimoError(
            f"tokenizer {source.tokenizer!r} encodes {height} x {side} images into {made} tokens; "
            f"it needs square images of {tokenizer.num_tokens:,}; crop them with --centre-crop, or "
            "choose another --tokenizer"
        )
    named, protocol = source.tokenizer in TOKENIZERS, source.protocol
    config = TeacherConfig(
        size=recipe.size,
        tokenizer=source.tokenizer if named else find_tokenizer(source.tokenizer)[0],
        image_size=side,
        num_tokens=tokenizer.num_tokens,
        codebook_size=tokenizer.codebook_size,
        class_names=class_names,
        label_smoothing=recipe.label_smoothing,
        protocol=str(Path(protocol).resolve()) if protocol.endswith(".toml") else protocol,
    )
    if protocol:
        protocol_for(trained_teacher(folder, config), protocol)  # complains before it is kept
    encode_images(
        lambda first: images.batches(range(first, len(images)), _BATCH, side=source.side),
        torch.from_numpy(labels),
        folder / TOKENS_FILE,
        names=images.names,
        target=save_teacher(folder, config),
        tokenizer=tokenizer,
        crop="none" if source.side is None else "adm",
        mirrored=source.mirror,
        progress=lambda done: runtime.progress("encode", done, len(images), "images"),
    )


def _train_extractor(name: str, recipe: str, settings: list[str], out: Path | None) -> None:
    from dimo.config import load_recipe, to_toml
    from dimo.engine.runs import check_named
    from dimo.methods.pretraining import ExtractorRecipe
    from dimo.weights.files import save_tensors

    recipes = {
        "digits-cnn": "digits-features",
        "scenes-detector": "scenes-detector",
        "scenes-clip": "scenes-clip",
    }
    if name not in recipes:
        raise unknown_name("extractor", name, recipes)
    loaded = load_recipe(ExtractorRecipe, recipe or recipes[name], settings)
    check_named(recipe or recipes[name], "extractor", name, loaded.extractor)
    path = (out or Path("runs") / name) / f"{name}.safetensors"
    if path.exists():
        raise DimoError(f"output {path} exists; choose another --out")
    with terminal.training_bar(f"train {name}", loaded.steps, loaded.batch_size) as on_step:
        model, data = _extractor(name, loaded, lambda step, loss: on_step(step, {"loss": loss}))
    save_tensors(path, model.state_dict(), {"recipe": to_toml(loaded), "data": data})
    terminal.say(f"weights: {path}")


def _extractor(
    name: str, recipe: "ExtractorRecipe", on_step: Callable[[int, float], None]
) -> "tuple[Module, str]":
    """The trained network, and what it has learned from."""
    from bench.features.scenes_clip import train_scene_clip
    from bench.features.small import train_digits_cnn
    from bench.suites.geneval.scenes_detector import train_scene_network
    from dimo.models import digits

    optimization: dict[str, Any] = {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate_at,
        "weight_decay": recipe.weight_decay,
        "seed": recipe.seed,
        "on_step": on_step,
    }
    if name == "digits-cnn":
        augmentation = ("label_smoothing", "pixel_noise", "shift_probability")
        regularization = {key: getattr(recipe, key) for key in augmentation}
        model: Module = train_digits_cnn(digits.load(), **optimization, **regularization)
        return model, "scikit-learn digits, 1,797 images"
    train_scenes: Callable[..., Module] = (
        train_scene_clip if name == "scenes-clip" else train_scene_network
    )
    return train_scenes(**optimization), "scenes, training prompts, each picture once"


def bar(
    title: str, recipe: "DistillationRecipe | TrainRecipe", device: "torch.device"
) -> AbstractContextManager[Callable[..., None]]:
    """The progress bar; its title names the precision where it differs from the recipe's."""
    from dimo.engine.runs import for_device

    used = for_device(recipe, device).precision
    other = "" if used == recipe.precision else f" in {used}"
    return terminal.training_bar(title + other, recipe.steps, recipe.batch_size)
