"""`dimo distill`."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples
from dimo.cli.train import bar
from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.monitor import Watching
    from dimo.engine.estimate import Estimate
    from dimo.engine.loop import Watcher
    from dimo.methods.base import DistillationRecipe


@app.command(
    epilog=examples(
        "dimo distill --teacher digits --out runs/mine",
        "dimo distill --recipe digits-full --set seed=1 --set beta=0.3 --out runs/seed1",
        "dimo distill --method di4c-d --out runs/di4c-d",
        "dimo distill --teacher maskgit --recipe mine.toml --dry-run",
    )
)
def distill(
    teacher: Annotated[
        str,
        typer.Option(metavar="NAME", help="Name of a teacher; default: the recipe's, or digits."),
    ] = "",
    method: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"{', '.join(METHODS)}; default: the recipe's, or dimo."),
    ] = "",
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Recipe name or .toml; default: that of teacher and method."
        ),
    ] = "",
    settings: opt.Settings = [],  # noqa: B006
    init_from: Annotated[
        str,
        typer.Option(
            metavar="RUN", help="Start from a student: run folder, file or name; default: teacher."
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder; default: runs/RECIPE.")
    ] = None,
    resume: opt.Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only print recipe, parameters, memory and FLOPs; needs no weights, and with "
            "--device cuda no GPU.",
        ),
    ] = False,
    sample_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=opt.TRACKING,
            help="Steps between pictures in RUN/samples; 0: none. Default: about ten a run.",
        ),
    ] = None,
    score_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=opt.TRACKING,
            help="Steps between scores of the EMA in RUN/curve.jsonl; 0: none. Default: about ten "
            "a run for a bundled teacher.",
        ),
    ] = None,
    score_protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=opt.TRACKING,
            help="Protocol of the scores, name or file; default: the teacher's own.",
        ),
    ] = "",
    wandb: Annotated[
        str,
        typer.Option(
            metavar="PROJECT", rich_help_panel=opt.TRACKING, help="Log to Weights & Biases too."
        ),
    ] = "",
    ablation: Annotated[
        str,
        typer.Option(
            metavar="KEY,KEY",
            rich_help_panel=opt.TRACKING,
            help="Recipe keys that an ablation varies; noted with the student, for dimo report "
            "--ablation.",
        ),
    ] = "",
    weights: opt.Weights = None,
    data: opt.Data = None,
    reference: opt.Reference = None,
    extractor_weights: opt.ExtractorWeights = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", rich_help_panel=opt.OUTPUT, help="With --dry-run: the same as JSON."
        ),
    ] = False,
    device: opt.Device = "auto",
) -> None:
    """Distil a teacher into a student that samples in one or a few steps.

    RUN gets student.safetensors (the EMA, with its provenance) and config.json, which together are
    the student that the other commands take; recipe.toml, every key resolved; metrics.jsonl, a line
    each 50 steps, and the same in tensorboard/; samples/, curve.jsonl and checkpoints/.
    """
    if init_from:
        settings = [*settings, f"init_from={json.dumps(init_from)}"]
    if dry_run:
        _dry_run(teacher, method, recipe, settings, device, as_json=as_json)
        return
    if as_json:
        raise DimoError("--json is a format of --dry-run; add --dry-run, or leave --json out")
    from bench.monitor import Watching
    from dimo.engine.runs import find_recipe

    name, loaded = find_recipe(teacher, method, recipe, settings)
    folder = out or Path("runs") / name
    run_distill(
        name,
        loaded,
        folder,
        device=device,
        weights=weights,
        data=data,
        resume=resume,
        watched=Watching(
            sample_every, score_every, score_protocol, reference, extractor_weights, wandb
        ),
        ablation=opt.parse_names(ablation),
    )
    terminal.say(f"student: {folder}; score it with: dimo bench --student {folder}")


def run_distill(
    name: str,
    recipe: "DistillationRecipe",
    folder: Path,
    *,
    device: str,
    weights: Path | None = None,
    data: Path | None = None,
    resume: bool = False,
    watched: "Watching | None" = None,
    ablation: Sequence[str] = (),
) -> None:
    """`dimo.engine.runs.distill` with a progress bar; `watched` adds pictures and scores."""
    from dimo.engine.distributed import Runtime, choose_device, ranks
    from dimo.engine.runs import distill as run
    from dimo.zoo.students import varied

    noted, place = varied(recipe, ablation), choose_device(device)
    with ExitStack() as stack:
        watchers: tuple[Watcher, ...] = ()
        if watched is not None:
            from bench.monitor import watching

            first = terminal.is_first_rank()
            watchers = stack.enter_context(
                watching(watched, recipe, folder, device=place, weights=weights, is_first=first)
            )
        progress = stack.enter_context(terminal.work_bar())
        on_step = stack.enter_context(bar(f"distil {recipe.teacher}", recipe, place))
        group = stack.enter_context(ranks())
        run(
            recipe,
            folder,
            recipe_name=name,
            runtime=Runtime(place, group, progress, terminal.warn),
            weights=weights,
            data=data,
            resume=resume,
            on_step=on_step,
            watchers=watchers,
            ablation=noted,
        )


def _dry_run(
    teacher: str, method: str, recipe: str, settings: Sequence[str], device: str, *, as_json: bool
) -> None:
    """Prints recipe and cost on stdout; `--device cuda` needs no GPU."""
    import torch

    from dimo.config import to_toml
    from dimo.engine.distributed import choose_device
    from dimo.engine.estimate import estimate_distillation
    from dimo.engine.runs import find_recipe, for_device
    from dimo.zoo.teachers import get_teacher

    place = torch.device("cuda") if device == "cuda" else choose_device(device)
    name, loaded = find_recipe(teacher, method, recipe, settings)
    loaded = for_device(loaded, place)
    estimate = estimate_distillation(loaded, get_teacher(loaded.teacher), device_type=place.type)
    if as_json:
        print(json.dumps(_as_json(name, loaded, estimate), indent=2))
    else:
        open_keys = [f"# {key}: left open\n" for key, v in vars(loaded).items() if v is None]
        print(f"# recipe {name}\n{to_toml(loaded)}{''.join(open_keys)}\n{_as_text(estimate)}")


def _as_json(name: str, recipe: "DistillationRecipe", estimate: "Estimate") -> dict[str, Any]:
    memory = estimate.memory
    return {
        "recipe_name": name,
        "recipe": dataclasses.asdict(recipe),
        "parameters": {
            network: {"total": n.total, "trainable": n.trainable, "frozen": n.frozen}
            for network, n in (*estimate.parameters.items(), ("all", estimate.all_parameters))
        },
        "device_type": estimate.device_type,
        "memory_bytes": {
            **dataclasses.asdict(memory),
            "peak": memory.peak,
            "peak_checkpointed": memory.peak_checkpointed,
        },
        "flops": dataclasses.asdict(estimate.flops),
        "images": estimate.images,
    }


def _as_text(estimate: "Estimate") -> str:
    memory, flops = estimate.memory, estimate.flops
    lines = [f"{'parameters':32}{'total':>15}{'trainable':>15}{'frozen':>15}"]
    for network, n in (*estimate.parameters.items(), ("all", estimate.all_parameters)):
        lines.append(f"  {network:30}{n.total:15,}{n.trainable:15,}{n.frozen:15,}")
    place = "a GPU" if estimate.device_type == "cuda" else "a CPU"
    lines += ["", f"{f'memory on {place}':32}{'MB':>15}{'checkpointed':>15}"]
    parts = {**dataclasses.asdict(memory), "peak": memory.peak}
    changed = {"activations": parts.pop("checkpointed"), "peak": memory.peak_checkpointed}
    for part, size in parts.items():
        lines.append(f"  {part:30}{size / 1e6:15,.1f}{changed.get(part, size) / 1e6:15,.1f}")
    lines += ["  peak = weights + gradients + optimizer + max(activations + working, update)", ""]
    forward = f"one forward of an image: {flops.forward / 1e9:,.4g} GFLOP"
    lines += [f"{'FLOPs':32}{'forwards':>15}{'GFLOP/image':>15}  ({forward})"]
    for part, count in (*flops.parts.items(), ("all", sum(flops.parts.values()))):
        lines.append(f"  {part:30}{count:15}{count * flops.forward / 1e9:15,.4g}")
    lines.append(f"  {'a step':30}{'':15}{flops.per_step / 1e12:15,.4g} TFLOP")
    lines.append(f"  {'the run':30}{'':15}{flops.run / 1e15:15,.4g} PFLOP")
    lines += ["", f"{'images':32}{estimate.images:15,}"]
    return "\n".join(lines)
