"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

__all__ = ["app", "main"]

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dimo import __version__, terminal
from dimo.errors import DimoError

if TYPE_CHECKING:
    import torch

    from bench.jobs import Job
    from bench.protocol import Protocol
    from bench.record import ResultRecord

app = typer.Typer(
    name="dimo",
    help="Benchmark for masked-diffusion image generators, with the Di[M]O one-step distiller.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
protocols_app = typer.Typer(no_args_is_help=True, help="Benchmarks and what each of them fixes.")
app.add_typer(protocols_app, name="protocols")

_STEPS = "1,2,4,8,16"
Teacher = Annotated[str, typer.Option(help="Name of a teacher.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Weights = Annotated[
    Path | None, typer.Option(help="Folder of the teacher's weights; default: those shipped.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe.")
]
Results = Annotated[Path, typer.Option(help="Folder of the result records.")]
Students = Annotated[
    list[str],
    typer.Option("--student", metavar="RUN", help="Run folder or shipped name; may be repeated."),
]


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
    folder = _distill(teacher, recipe, settings, out, resume, device, weights)
    terminal.say(
        f"student: {folder}; score it with: dimo bench --teacher {teacher} --student {folder}"
    )


def _distill(
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


@app.command(
    epilog="Examples: `dimo bench --teacher digits --student digits-dimo --steps 1,2,4,8,16` · "
    "`dimo bench --student runs/mine --tune temperature=0.6,0.8,1`"
)
def bench(
    teacher: Teacher = "digits",
    students: Students = [],  # noqa: B006
    steps: Annotated[
        str, typer.Option(help="Teacher's step counts; empty: no teacher row.")
    ] = _STEPS,
    protocol: Annotated[str, typer.Option(help="Protocol name or file.")] = "digits",
    results: Results = Path("results"),
    tune: Annotated[
        list[str],
        typer.Option(
            metavar="SETTING=V,V", help="Choose settings of every row on the selection seed."
        ),
    ] = [],  # noqa: B006
    guidance_scale: Annotated[float | None, typer.Option(help="Teacher's s; 1 is off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides logits, every row.")] = None,
    reference_rows: Annotated[bool, typer.Option(help="Rows for real data and tokenizer.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Changes speed, never a result.")] = 500,
    device: Device = "auto",
    weights: Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="Records on stdout, as JSON.")] = False,
) -> None:
    """Score a teacher at each step count, and students at one step, under one protocol."""
    from bench.jobs import load_jobs, reference_jobs
    from bench.protocol import load_protocol
    from bench.tuning import parse_grid
    from dimo.launch import choose_device

    place, grid, fixed = choose_device(device), parse_grid(tune), load_protocol(protocol)
    given = {"guidance_scale": guidance_scale, "temperature": temperature}
    overrides = {key: value for key, value in given.items() if value is not None}
    counts = _parse_steps(steps)
    jobs = load_jobs(teacher, students, counts, device=place, weights=weights, overrides=overrides)
    if not jobs:
        raise DimoError("there is nothing to score; name step counts with --steps or a --student")
    if reference_rows:
        jobs = reference_jobs(jobs[0].loaded, fixed) + jobs
    records = _bench(jobs, fixed, results, grid=grid, batch_size=batch_size, device=place)
    if as_json:
        from bench.record import record_to_json

        print(json.dumps([json.loads(record_to_json(r)) for r in records], indent=2))
    else:
        print(_measured_table(records, fixed))
    terminal.say(f"{len(records)} records in {results}; tables: dimo report --results {results}")


def _bench(
    jobs: "list[Job]",
    protocol: "Protocol",
    results: Path,
    *,
    grid: dict[str, list[float]],
    batch_size: int,
    device: "torch.device",
) -> "list[ResultRecord]":
    from bench.run import Workbench
    from bench.store import append
    from bench.tuning import tune

    records = []
    with terminal.image_bar() as progress:
        workbench = Workbench(protocol, device=device, batch_size=batch_size, progress=progress)
        for job in jobs:
            record = workbench.measure(tune(workbench, job, grid) if grid else job)
            append(record, results)
            records.append(record)
    return records


@app.command(
    epilog="Examples: `dimo report` · `dimo report --results runs/demo/results --out table.md`"
)
def report(
    protocol: Annotated[str, typer.Option(help="Protocol name or file.")] = "digits",
    results: Results = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
) -> None:
    """Print the paper's tables in Markdown: measured rows, and quoted rows apart from them."""
    text = _report(protocol, results)
    if out is None:
        print(text)
    else:
        from dimo.files import write_atomic

        write_atomic(out, text)
        terminal.say(f"report: {out}")


def _report(protocol_name: str, results: Path) -> str:
    from bench.paths import data_dir
    from bench.protocol import load_protocol
    from bench.report import load_published, report_markdown
    from bench.store import load_all

    records, problems = load_all(results)
    for problem in problems:
        terminal.say(problem, style="yellow")
    published = load_published(data_dir("published") / "published.csv")
    return report_markdown(records, problems, published, protocol=load_protocol(protocol_name))


def _measured_table(records: "list[ResultRecord]", protocol: "Protocol") -> str:
    from bench.report import report_markdown

    return report_markdown(records, [], [], protocol=protocol)


@app.command(
    epilog="Examples: `dimo sample --teacher digits --steps 1,4,16 --out grid.png` · "
    "`dimo sample --student digits-dimo --labels 3,3,3,7 --seed 5 --out grid.png`"
)
def sample(
    teacher: Teacher = "digits",
    students: Students = [],  # noqa: B006
    steps: Annotated[
        str, typer.Option(help="Teacher's step counts; empty: no teacher row.")
    ] = _STEPS,
    labels: Annotated[str, typer.Option(help="One column each; default: every class, twice.")] = "",
    seed: Annotated[int, typer.Option(help="Column i is image i of this seed.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    device: Device = "auto",
    weights: Weights = None,
) -> None:
    """Draw a grid: a row for each step count and student, the same labels and noise by column."""
    if out.exists() and not force:
        raise DimoError(f"output {out} exists; replace it with --force or choose another --out")
    from bench.grid import draw_samples
    from bench.jobs import load_jobs
    from dimo.launch import choose_device
    from dimo.teachers import get_teacher

    counts, place = _parse_steps(steps), choose_device(device)
    wanted = _parse_labels(labels, get_teacher(teacher).num_classes) if labels else []
    jobs = load_jobs(teacher, students, counts, device=place, weights=weights)
    draw_samples(jobs, wanted, seed=seed, out=out, device=place)
    terminal.say(f"picture: {out}")


@app.command(epilog="Example: `dimo demo --out runs/demo`")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for run, records, report and picture.")] = Path(
        "runs/demo"
    ),
    recipe: Annotated[str, typer.Option(help="Distillation recipe.")] = "digits",
    device: Device = "auto",
) -> None:
    """The main job in minutes, offline: distil, benchmark, report, draw - on real handwriting."""
    if out.exists() and any(out.iterdir()):
        raise DimoError(f"output {out} exists and is not empty; choose another --out, or remove it")
    from bench.grid import draw_samples
    from bench.jobs import load_jobs, reference_jobs
    from bench.protocol import load_protocol
    from dimo.files import write_atomic
    from dimo.launch import choose_device

    place, protocol, results = choose_device(device), load_protocol("digits"), out / "results"
    terminal.say("1/3 distil the shipped teacher into a one-step student")
    student = _distill("digits", recipe, [], out / "student", False, device, None)
    terminal.say("2/3 benchmark: real data, teacher at 1, 2, 4, 8, 16 steps, student at 1 step")
    jobs = load_jobs("digits", [str(student)], _parse_steps(_STEPS), device=place)
    rows = reference_jobs(jobs[0].loaded, protocol) + jobs
    records = _bench(rows, protocol, results, grid={}, batch_size=500, device=place)
    terminal.say("3/3 report and picture")
    picture, table = out / "samples.png", out / "report.md"
    draw_samples(jobs, [], seed=0, out=picture, device=place)
    write_atomic(table, _report("digits", results))
    print(_measured_table(records, protocol))
    print(_demo_summary(records))
    print(f"pictures: {picture}\nreport: {table}\nrecords: {results}")


def _demo_summary(records: "list[ResultRecord]") -> str:
    rows = {(r.method.section, r.method.num_steps): r for r in records}
    student, slow = rows["Distill.", 1], rows["Teacher", 16]
    first, last = student.speed.images_per_second, slow.speed.images_per_second
    assert first is not None
    assert last is not None
    good, bad = student.metrics["fid"].value, rows["Teacher", 1].metrics["fid"].value
    return (
        f"one-step student : 16-step teacher = {first / last:.1f} : 1 in images/s "
        f"({first:,.0f} against {last:,.0f})\n"
        f"one-step student : one-step teacher = {good / bad:.3f} : 1 in FID "
        f"({good:.3f} against {bad:.3f})"
    )


@protocols_app.command("list", epilog="Example: `dimo protocols list`")
def protocols_list() -> None:
    """List every protocol with its hash."""
    from bench.protocol import list_protocols, protocol_sha256

    for protocol in list_protocols():
        digest = protocol_sha256(protocol)[:12]
        print(f"{protocol.name}  v{protocol.version}  {digest}  {protocol.title}")


@protocols_app.command("show", epilog="Example: `dimo protocols show digits`")
def protocols_show(name: Annotated[str, typer.Argument(help="Protocol name or file.")]) -> None:
    """Print a protocol as it is."""
    from bench.protocol import protocol_text

    print(protocol_text(name), end="")


@protocols_app.command("validate", epilog="Example: `dimo protocols validate my-protocol.toml`")
def protocols_validate(path: Annotated[Path, typer.Argument(help="TOML file.")]) -> None:
    """Check a protocol file; says what is wrong with it, if anything."""
    from bench.protocol import protocol_sha256, validate_file

    print(f"{path}: valid, sha256 {protocol_sha256(validate_file(path))}")


def _version(value: bool) -> None:
    if value:
        print(f"dimo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _parse_steps(text: str) -> list[int]:
    return _parse_integers("--steps", text, low=1, high=None) if text else []


def _parse_labels(text: str, num_classes: int) -> list[int]:
    return _parse_integers("--labels", text, low=0, high=num_classes - 1)


def _parse_integers(option: str, text: str, *, low: int, high: int | None) -> list[int]:
    allowed = f"whole numbers from {low}" + (f" to {high}" if high is not None else "")
    values = []
    for part in text.split(","):
        value = int(part) if part.strip().isdecimal() else None
        if value is None or value < low or (high is not None and value > high):
            raise DimoError(
                f"{option} {part.strip()!r} is not allowed; give {allowed}, e.g. {option} 1,2,4"
            )
        values.append(value)
    return values


def main() -> None:
    """Entry point: one red line and exit code 2 for bad input, no traceback."""
    try:
        app()
    except DimoError as error:
        terminal.error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        terminal.say("interrupted; continue a training with --resume", style="yellow")
        sys.exit(130)
