"""`dimo bench`: networks in, images and numbers out."""

import json
from pathlib import Path
from typing import Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app
from dimo.cli.report import measured_table
from dimo.util import terminal


@app.command(
    epilog="Examples: `dimo bench --teacher digits --student digits-dimo --steps 1,2,4,8,16` · "
    "`dimo bench --student runs/mine --baseline di4c=runs/a --baseline di4c-d=runs/b@2,4` · "
    "`dimo bench --student runs/mine --tune temperature=0.6,0.8,1` · "
    "`dimo bench --teacher maskgit --protocol imagenet256-adm --reference "
    "VIRTUAL_imagenet256_labeled.npz --schedule arccos,arccos-v1` · "
    "`dimo bench --teacher scenes --protocol scenes-geneval --tune guidance_scale=1,3`"
)
def bench(
    teacher: opt.Teacher = "digits",
    students: opt.Students = [],  # noqa: B006
    baselines: opt.Baselines = [],  # noqa: B006
    steps: Annotated[
        str, typer.Option(help="Teacher's step counts; empty: no teacher row.")
    ] = opt.STEPS,
    student_steps: opt.StudentSteps = "1",
    samplers: opt.Samplers = "",
    schedules: opt.Schedules = "",
    protocol: Annotated[str, typer.Option(help="Protocol name or file.")] = "digits",
    results: opt.Results = Path("results"),
    tune: Annotated[
        list[str],
        typer.Option(
            metavar="SETTING=V,V",
            help="Choose settings of every row on the selection seed: by the highest GenEval score "
            "where a detector decides, else by the lowest Fréchet distance.",
        ),
    ] = [],  # noqa: B006
    guidance_scale: opt.GuidanceScale = None,
    temperature: opt.Temperature = None,
    choice_temperature: opt.ChoiceTemperature = None,
    theta: opt.Theta = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    set_sampler: opt.SamplerKnobs = [],  # noqa: B006
    precision: opt.Precision = "float32",
    reference_rows: Annotated[bool, typer.Option(help="Rows for real data and tokenizer.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Changes speed, never a result.")] = 500,
    device: opt.Device = "auto",
    weights: opt.Weights = None,
    reference: opt.Reference = None,
    extractor_weights: opt.ExtractorWeights = None,
    prompts: opt.ProtocolPrompts = None,
    cache: opt.Cache = "",
    allow_code: opt.AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Records on stdout, as JSON.")] = False,
) -> None:
    """Score a teacher at each step count, and distilled models, under one protocol."""
    from bench.features.extraction import cache_folder
    from bench.protocol import load_protocol
    from bench.rows.rows import plan_jobs
    from bench.rows.settings import check_protocol
    from bench.runner import run_rows
    from bench.suites.base import Assets
    from bench.tuning import parse_grid
    from dimo.engine.distributed import Runtime, choose_device
    from dimo.zoo.teachers import get_teacher

    place, grid, fixed = choose_device(device), parse_grid(tune), load_protocol(protocol)
    choice = opt.parse_choice(
        samplers,
        schedules,
        precision,
        set_sampler,
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
        opt.parse_steps(steps),
        weights=weights,
        choice=choice,
        student_steps=opt.parse_steps(student_steps),
    )
    assets = Assets(
        weights=weights,
        extractor=extractor_weights,
        reference=reference,
        prompts=prompts,
        cache=cache_folder(cache),
        allow_code=allow_code,
    )
    with terminal.work_bar() as progress:
        scored = run_rows(
            planned,
            fixed,
            Runtime(place, progress=progress, warn=opt.warn),
            assets,
            results=results,
            grid=grid,
            reference_rows=reference_rows,
            batch_size=batch_size,
            command=opt.command_line(),
        )
    records = [row.record for row in scored]
    if as_json:
        from bench.records.record import record_to_json

        print(json.dumps([json.loads(record_to_json(r)) for r in records], indent=2))
    else:
        print(measured_table(records, fixed))
    terminal.say(f"{len(records)} records in {results}; tables: dimo report --results {results}")
