"""`dimo bench`, `dimo demo`: networks in, images and numbers out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimo.cli.app import app
from dimo.cli.options import (
    STEPS,
    AllowCode,
    Baselines,
    Cache,
    ChoiceTemperature,
    Device,
    GuidanceScale,
    Precision,
    Reference,
    Results,
    Samplers,
    Schedules,
    Students,
    StudentSteps,
    Teacher,
    Temperature,
    Theta,
    TopK,
    TopP,
    Weights,
    cache_folder,
    parse_choice,
    parse_steps,
    refuse_unused,
)
from dimo.cli.report import measured_table, report_text
from dimo.cli.train import run_distill
from dimo.errors import DimoError
from dimo.util import terminal

if TYPE_CHECKING:
    import torch

    from bench.protocol import Protocol
    from bench.records.record import ResultRecord
    from bench.rows.rows import Job, Planned


@app.command(
    epilog="Examples: `dimo bench --teacher digits --student digits-dimo --steps 1,2,4,8,16` · "
    "`dimo bench --student runs/mine --baseline di4c=runs/a --baseline di4c-d=runs/b@2,4` · "
    "`dimo bench --student runs/mine --tune temperature=0.6,0.8,1` · "
    "`dimo bench --teacher maskgit --protocol imagenet256-adm --reference "
    "VIRTUAL_imagenet256_labeled.npz --schedule arccos,arccos-v1` · "
    "`dimo bench --teacher scenes --protocol scenes-geneval --tune guidance_scale=1,3`"
)
def bench(
    teacher: Teacher = "digits",
    students: Students = [],  # noqa: B006
    baselines: Baselines = [],  # noqa: B006
    steps: Annotated[
        str, typer.Option(help="Teacher's step counts; empty: no teacher row.")
    ] = STEPS,
    student_steps: StudentSteps = "1",
    samplers: Samplers = "",
    schedules: Schedules = "",
    protocol: Annotated[str, typer.Option(help="Protocol name or file.")] = "digits",
    results: Results = Path("results"),
    tune: Annotated[
        list[str],
        typer.Option(
            metavar="SETTING=V,V",
            help="Choose settings of every row on the selection seed: by the highest GenEval score "
            "where a detector decides, else by the lowest Fréchet distance.",
        ),
    ] = [],  # noqa: B006
    guidance_scale: GuidanceScale = None,
    temperature: Temperature = None,
    choice_temperature: ChoiceTemperature = None,
    theta: Theta = None,
    top_k: TopK = None,
    top_p: TopP = None,
    precision: Precision = "float32",
    reference_rows: Annotated[bool, typer.Option(help="Rows for real data and tokenizer.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Changes speed, never a result.")] = 500,
    device: Device = "auto",
    weights: Weights = None,
    reference: Reference = None,
    extractor_weights: Annotated[
        Path | None, typer.Option(help="Weights file of the extractor; default: shipped.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="The protocol's official file of prompts; default: the embedded ones."),
    ] = None,
    cache: Cache = "",
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Records on stdout, as JSON.")] = False,
) -> None:
    """Score a teacher at each step count, and distilled models, under one protocol."""
    from bench.features.references import reference_images
    from bench.protocol import load_protocol
    from bench.rows.rows import load_planned, plan_jobs, reference_jobs
    from bench.rows.settings import check_protocol
    from bench.tuning import check_grid, parse_grid
    from dimo.engine.distributed import choose_device
    from dimo.zoo.teachers import get_teacher

    place, grid, fixed = choose_device(device), parse_grid(tune), load_protocol(protocol)
    choice = parse_choice(
        samplers,
        schedules,
        precision,
        guidance_scale=guidance_scale,
        temperature=temperature,
        choice_temperature=choice_temperature,
        theta=theta,
        top_k=top_k,
        top_p=top_p,
    )
    check_protocol(get_teacher(teacher), fixed)
    planned = plan_jobs(
        teacher,
        [*students, *baselines],
        parse_steps(steps),
        weights=weights,
        choice=choice,
        student_steps=parse_steps(student_steps),
    )
    if not planned:
        raise DimoError("there is nothing to score; name step counts with --steps or a --student")
    if fixed.prompts is not None:
        refuse_unused(fixed.name, "brings what it compares with", reference=reference)
        records = _bench_prompts(
            planned,
            fixed,
            results,
            prompts=prompts,
            grid=grid,
            reference_rows=reference_rows,
            batch_size=batch_size,
            device=place,
            weights=weights,
            detector_weights=extractor_weights,
        )
        _tell(records, fixed, results, as_json=as_json)
        return
    refuse_unused(fixed.name, "has no prompts", prompts=prompts)
    if reference is None:
        reference_images(fixed)  # complains before any network is loaded
    jobs = load_planned(planned, device=place, weights=weights)
    check_grid(grid, jobs, fixed)
    if reference_rows and reference is None:
        jobs = reference_jobs(jobs[0].loaded, fixed) + jobs
    records = _bench(
        jobs,
        fixed,
        results,
        grid=grid,
        batch_size=batch_size,
        device=place,
        reference=reference,
        weights=extractor_weights,
        cache=cache_folder(cache),
        allow_code=allow_code,
    )
    _tell(records, fixed, results, as_json=as_json)


def _tell(
    records: "list[ResultRecord]", protocol: "Protocol", results: Path, *, as_json: bool
) -> None:
    """The records on stdout, and where they are."""
    if as_json:
        from bench.records.record import record_to_json

        print(json.dumps([json.loads(record_to_json(r)) for r in records], indent=2))
    else:
        print(measured_table(records, protocol))
    terminal.say(f"{len(records)} records in {results}; tables: dimo report --results {results}")


def _bench_prompts(
    planned: "list[Planned]",
    protocol: "Protocol",
    results: Path,
    *,
    prompts: Path | None,
    grid: dict[str, list[float]],
    reference_rows: bool,
    batch_size: int,
    device: "torch.device",
    weights: Path | None,
    detector_weights: Path | None,
) -> "list[ResultRecord]":
    """As `_bench`, under a protocol with prompts and a detector; the verdicts are kept too."""
    from bench.records.store import append
    from bench.rows.grid import write_picture
    from bench.rows.rows import load_planned
    from bench.suites.geneval.layout import results_text
    from bench.suites.geneval.prompts import prompts_of
    from bench.suites.geneval.suite import DetectorBench, rendered_jobs
    from bench.tuning import check_grid, tune
    from dimo.util.files import write_atomic

    assert protocol.prompts is not None
    asked = prompts_of(protocol.prompts, prompts)
    texts = [metadata["prompt"] for metadata in asked]
    jobs = load_planned(planned, device=device, weights=weights, prompts=texts)
    check_grid(grid, jobs, protocol)
    if reference_rows:
        jobs = rendered_jobs(jobs[0].loaded, protocol) + jobs
    records = []
    with terminal.work_bar() as progress:
        bench = DetectorBench(
            protocol,
            asked,
            device=device,
            batch_size=batch_size,
            weights=detector_weights,
            progress=progress,
        )
        for job in jobs:
            tuned = tune(bench, job, grid) if grid else job
            found = bench.measure(tuned)
            record = found.measured.record
            append(record, results, found.measured.contributions)
            verdicts = results / "verdicts" / f"{record.run_id}.jsonl"
            write_atomic(verdicts, results_text(found.results))
            if tuned.settings is not None:
                seed = protocol.seeds.report
                write_picture(tuned, results, record.run_id, seed=seed, device=device)
            records.append(record)
    return records


def _bench(
    jobs: "list[Job]",
    protocol: "Protocol",
    results: Path,
    *,
    grid: dict[str, list[float]],
    **settings: Any,
) -> "list[ResultRecord]":
    """Scores jobs on one workbench with `settings`, and appends a record for each."""
    from bench.records.store import append
    from bench.rows.grid import write_picture
    from bench.suites.features import Workbench
    from bench.tuning import tune

    records = []
    with terminal.work_bar() as progress:
        workbench = Workbench(protocol, progress=progress, say=_warn, **settings)
        for job in jobs:
            tuned = tune(workbench, job, grid) if grid else job
            measured = workbench.measure(tuned)
            append(measured.record, results, measured.contributions)
            if tuned.settings is not None:
                seed, run_id = protocol.seeds.report, measured.record.run_id
                write_picture(tuned, results, run_id, seed=seed, device=workbench.device)
            records.append(measured.record)
    return records


def _warn(text: str) -> None:
    terminal.say(text, style="yellow")


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
    from bench.protocol import load_protocol
    from bench.rows.grid import draw_samples
    from bench.rows.rows import load_jobs, reference_jobs
    from dimo.engine.distributed import choose_device
    from dimo.engine.runs import find_recipe
    from dimo.util.files import write_atomic

    place, protocol, results = choose_device(device), load_protocol("digits"), out / "results"
    terminal.say("1/3 distil the shipped teacher into a one-step student")
    student = out / "student"
    run_distill(*find_recipe("digits", recipe=recipe), student, device=device)
    terminal.say("2/3 benchmark: real data, teacher at 1, 2, 4, 8, 16 steps, student at 1 step")
    jobs = load_jobs("digits", [str(student)], parse_steps(STEPS), device=place)
    rows = reference_jobs(jobs[0].loaded, protocol) + jobs
    records = _bench(rows, protocol, results, grid={}, device=place)
    terminal.say("3/3 report and picture")
    picture, table = out / "samples.png", out / "report.md"
    draw_samples(jobs, [], seed=0, out=picture, device=place)
    write_atomic(table, report_text("digits", results))
    print(measured_table(records, protocol))
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
