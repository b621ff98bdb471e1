"""`dimo train`, `dimo distill`."""

__all__ = ["distill", "run_distill", "train"]

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dimo import terminal
from dimo.cli.app import app
from dimo.cli.options import Device, Resume, Settings, Teacher, Weights
from dimo.errors import DimoError


@app.command(epilog="Example: `dimo train --teacher digits --out runs/my-teacher`")
def train(
    teacher: Annotated[str, typer.Option(help="Teacher to train from its embedded data.")] = "",
    extractor: Annotated[str, typer.Option(help="Feature extractor to train instead.")] = "",
    recipe: Annotated[str, typer.Option(help="Recipe name or .toml; default: its own.")] = "",
    settings: Settings = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/NAME.")] = None,
    resume: Resume = False,
    device: Device = "auto",
) -> None:
    """Train an embedded teacher, or the feature extractor of an embedded protocol."""
    if bool(teacher) == bool(extractor):
        raise DimoError("train needs either --teacher or --extractor; e.g. --teacher digits")
    if extractor:
        _train_extractor(extractor, recipe, settings, out)
        return
    from dimo.config import TrainRecipe, load_recipe
    from dimo.launch import choose_device
    from dimo.runs import train_teacher
    from dimo.teachers import get_teacher

    get_teacher(teacher)
    name = recipe or f"{teacher}-teacher"
    loaded = load_recipe(TrainRecipe, name, [f'teacher="{teacher}"', *settings])
    folder = out or Path("runs") / f"{teacher}-teacher"
    with terminal.training_bar(f"train {teacher}", loaded.steps, loaded.batch_size) as on_step:
        train_teacher(loaded, folder, device=choose_device(device), resume=resume, on_step=on_step)
    terminal.say(
        f"weights: {folder}; score them with: dimo bench --teacher {teacher} --weights {folder}"
    )


def _train_extractor(name: str, recipe: str, settings: list[str], out: Path | None) -> None:
    from bench.features.digits import train_digits_cnn
    from dimo.config import ExtractorRecipe, load_recipe, to_toml
    from dimo.datasets import digits
    from dimo.errors import unknown_name
    from dimo.weights import save_tensors

    if name != "digits-cnn":
        raise unknown_name("extractor", name, ["digits-cnn"])
    loaded = load_recipe(ExtractorRecipe, recipe or "digits-features", settings)
    path = (out or Path("runs") / name) / f"{name}.safetensors"
    if path.exists():
        raise DimoError(f"output {path} exists; choose another --out")
    images, labels = digits.load()
    with terminal.training_bar(f"train {name}", loaded.steps, loaded.batch_size) as on_step:
        model = train_digits_cnn(
            images,
            labels,
            steps=loaded.steps,
            batch_size=loaded.batch_size,
            learning_rate=loaded.learning_rate_at,
            weight_decay=loaded.weight_decay,
            label_smoothing=loaded.label_smoothing,
            pixel_noise=loaded.pixel_noise,
            shift_probability=loaded.shift_probability,
            seed=loaded.seed,
            on_step=lambda step, loss: on_step(step, {"loss": loss}),
        )
    provenance = {"recipe": to_toml(loaded), "data": "scikit-learn digits, 1,797 images"}
    save_tensors(path, model.state_dict(), provenance)
    terminal.say(f"weights: {path}")


@app.command(
    epilog="Examples: `dimo distill --teacher digits --out runs/mine` · "
    "`dimo distill --recipe digits-full --set seed=1 --set beta=0.3 --out runs/seed1`"
)
def distill(
    teacher: Teacher = "digits",
    recipe: Annotated[str, typer.Option(help="Recipe name or .toml; default: the teacher's.")] = "",
    settings: Settings = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/RECIPE.")] = None,
    resume: Resume = False,
    device: Device = "auto",
    weights: Weights = None,
) -> None:
    """Distil a teacher into a one-step student with Di[M]O."""
    folder = run_distill(teacher, recipe, settings, out, resume, device, weights)
    terminal.say(
        f"student: {folder}; score it with: dimo bench --teacher {teacher} --student {folder}"
    )


def run_distill(
    teacher: str,
    recipe: str,
    settings: Sequence[str],
    out: Path | None,
    resume: bool,
    device: str,
    weights: Path | None,
) -> Path:
    from dimo.config import DistillRecipe, load_recipe
    from dimo.launch import choose_device
    from dimo.runs import distill as run
    from dimo.teachers import get_teacher

    name = recipe or get_teacher(teacher).recipe
    if name is None:
        raise DimoError(
            f"there is no distillation recipe for teacher {teacher!r} yet; "
            "name one with --recipe NAME or --recipe FILE.toml"
        )
    loaded = load_recipe(DistillRecipe, name, [f'teacher="{teacher}"', *settings])
    folder = out or Path("runs") / Path(name).stem
    with terminal.training_bar(f"distil {teacher}", loaded.steps, loaded.batch_size) as on_step:
        run(
            loaded,
            folder,
            recipe_name=Path(name).stem,
            device=choose_device(device),
            weights=weights,
            resume=resume,
            on_step=on_step,
        )
    return folder
