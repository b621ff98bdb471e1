"""`dimo bench` and `dimo law`: networks in, images and numbers out."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples
from dimo.cli.report import measured_table
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.runner import Work
    from dimo.engine.distributed import Ranks

Protocol = Annotated[
    str, typer.Option(metavar="NAME", help="Protocol name or file; default: the teacher's own.")
]


@app.command(
    epilog=examples(
        "dimo bench --teacher digits --student digits-dimo --steps 1,2,4,8,16",
        "dimo bench --student runs/mine --num-images 1000",
        "dimo bench --student runs/mine --baseline di4c=runs/a --baseline d=runs/b@2,4",
        "dimo bench --student runs/mine --tune temperature=0.6,0.8,1",
        "dimo bench --teacher scenes --tune guidance_scale=1,3",
        "dimo bench --teacher maskgit --dry-run",
        "dimo bench --teacher maskgit --reference VIRTUAL_imagenet256_labeled.npz",
        "dimo bench --teacher runs/photos --reference-images photos/",
        "torchrun --nproc_per_node=8 -m dimo bench --teacher maskgit",
    )
)
def bench(
    context: typer.Context,
    teacher: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Name of a teacher; default: that of the first --student, else digits.",
        ),
    ] = "",
    students: opt.Students = [],  # noqa: B006
    baselines: opt.Baselines = [],  # noqa: B006
    steps: Annotated[
        str,
        typer.Option(metavar="N,N", help="Teacher's step counts; empty: no teacher row."),
    ] = opt.STEPS,
    student_steps: opt.StudentSteps = "1",
    protocol: Protocol = "",
    num_images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="A quick look at N images per row, off-protocol; default: as many as the protocol "
            "asks for.",
        ),
    ] = None,
    results: opt.Results = Path("results"),
    samplers: opt.Samplers = "",
    schedules: opt.Schedules = "",
    guidance_scale: opt.GuidanceScale = None,
    temperature: opt.Temperature = None,
    choice_temperature: opt.ChoiceTemperature = None,
    theta: opt.Theta = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    set_sampler: opt.SamplerKnobs = [],  # noqa: B006
    precision: opt.Precision = "float32",
    tune: Annotated[
        list[str],
        typer.Option(
            metavar="SETTING=V,V",
            rich_help_panel=opt.SAMPLER,
            help="Choose a setting of every row on the selection seed, by GenEval score where a "
            "detector decides, else by Fréchet distance; may be repeated.",
        ),
    ] = [],  # noqa: B006
    checkpoint: opt.Checkpoint = None,
    weights: opt.Weights = None,
    reference: opt.Reference = None,
    reference_images: opt.ReferenceImages = [],  # noqa: B006
    extractor_weights: opt.ExtractorWeights = None,
    prompts: opt.ProtocolPrompts = None,
    as_json: opt.AsJson = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print each row with its forwards, time and disk, from 32 images, and stop.",
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            rich_help_panel=opt.ADVANCED,
            help="Measure rows that are on record from the same code, weights and settings, too.",
        ),
    ] = False,
    reference_rows: Annotated[
        bool,
        typer.Option(
            "--reference-rows/--no-reference-rows",
            rich_help_panel=opt.ADVANCED,
            help="Rows for real data and tokenizer.",
        ),
    ] = True,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N",
            rich_help_panel=opt.ADVANCED,
            help="Images at a time, or auto: as many as memory holds; changes speed only.",
        ),
    ] = "500",
    device: opt.Device = "auto",
    cache: opt.Cache = "",
    allow_code: opt.AllowCode = False,
) -> None:
    """Score a teacher at each step count, and distilled models, under one protocol.

    Interrupted, the same command continues. Under torchrun ranks share the images of each row.
    """
    from bench.features.extraction import cache_folder
    from bench.rows.rows import at_checkpoint, plan_jobs
    from bench.rows.settings import protocol_for
    from bench.runner import plan_work
    from bench.suites.base import Assets
    from bench.tuning import parse_grid
    from dimo.engine.distributed import Runtime, choose_device, ranks

    place, grid = choose_device(device), parse_grid(tune)
    planned = plan_jobs(
        teacher,
        [*(at_checkpoint(text, checkpoint) for text in students), *baselines],
        opt.parse_steps(steps),
        weights=weights,
        choice=opt.parse_choice(context.params),
        student_steps=opt.parse_steps(student_steps),
    )
    fixed = protocol_for(planned[0].teacher, protocol)
    assets = Assets(
        weights=weights,
        extractor=extractor_weights,
        reference=reference,
        reference_images=tuple(reference_images),
        prompts=prompts,
        cache=cache_folder(cache),
        allow_code=allow_code,
    )
    with ranks() as group, terminal.work_bar() as progress:
        work = plan_work(
            planned,
            fixed,
            Runtime(place, group, progress if group.is_first else terminal.quiet, terminal.warn),
            assets,
            results=results,
            grid=grid,
            num_images=num_images,
            reference_rows=reference_rows,
            again=again,
            batch_size=opt.parse_batch_size(batch_size),
            command=opt.command_line(),
        )
        if dry_run:
            _print_estimates(work, group, as_json=as_json)
            return
        records = work.run()
    if not records:  # the first rank has them
        return
    if as_json:
        from bench.records.record import record_to_json

        print(json.dumps([json.loads(record_to_json(r)) for r in records], indent=2))
    else:
        print(measured_table(records, fixed))
    if records[0].off_protocol:
        terminal.warn(
            f"off-protocol, in a table of their own: {'; '.join(records[0].off_protocol)}"
        )
    terminal.say(f"{len(records)} records in {results}; tables: dimo report --results {results}")


def _print_estimates(work: "Work", group: "Ranks", *, as_json: bool) -> None:
    """Rows, costs and totals of a bench; times are those of one rank, measured on each."""
    table = work.estimates()
    if not group.is_first:
        return
    if as_json:
        print(table.to_json(orient="records", indent=2))
        return
    table["minutes"] = (table.pop("seconds") / 60 / group.count).round(1)
    table["MiB"] = (table.pop("bytes") / 2**20).round(1)
    print(table.to_string(index=False, na_rep="-"))
    terminal.say(
        f"{len(table)} rows, {table['on_record'].sum()} on record; about "
        f"{table['minutes'].sum():,.0f} minutes on {group.count} device(s), without metrics; at "
        f"most {table['MiB'].max():,.0f} MiB of cache at a time"
    )


@app.command(
    epilog=examples(
        "dimo law --teacher digits",
        "dimo law --teacher scenes --guidance 1.5,3 --rule constant,adaptive",
    )
)
def law(
    teacher: opt.Teacher = "digits",
    guidance: Annotated[
        str, typer.Option(metavar="X,X", help="Values of teacher_guidance_scale; 1 is off.")
    ] = "1,1.5,2",
    temperature: Annotated[
        str, typer.Option(metavar="X,X", help="Values of teacher_temperature.")
    ] = "0.6,0.7,0.8,1",
    final_temperature: Annotated[
        str,
        typer.Option(
            metavar="X,X",
            help="Values of teacher_final_temperature, to which the others move as tokens are "
            "revealed; default: none, they hold.",
        ),
    ] = "",
    rule: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Values of teacher_guidance: constant, adaptive."),
    ] = "constant",
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Random-order steps; fewer than a grid has tokens, the default, are not exact.",
        ),
    ] = None,
    protocol: Protocol = "",
    num_images: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Images per law; default: as many as the protocol selects on."
        ),
    ] = None,
    weights: opt.Weights = None,
    reference: opt.Reference = None,
    extractor_weights: opt.ExtractorWeights = None,
    prompts: opt.ProtocolPrompts = None,
    as_json: opt.AsJson = False,
    batch_size: opt.BatchSize = 500,
    device: opt.Device = "auto",
) -> None:
    """Score what a distillation would aim at, and print the recipe keys of the best.

    A Di[M]O student learns the law of its teacher sampled one token a step in random order, at the
    recipe's guidance and temperature. Laws are scored under the teacher's protocol on its selection
    seed, so that the choice of one does not touch the images that are reported.
    """
    from bench.rows.settings import protocol_for
    from bench.suites.base import Assets
    from bench.tuning import laws_of, recipe_keys, score_laws
    from dimo.engine.distributed import Runtime, choose_device
    from dimo.masking import check_steps
    from dimo.zoo.teachers import get_teacher

    place, row = choose_device(device), get_teacher(teacher)
    fixed, count = protocol_for(row, protocol), row.num_tokens if steps is None else steps
    check_steps(count, row.num_tokens)
    laws = laws_of(guidance, temperature, rule, count, final_temperature)
    assets = Assets(
        weights=weights, extractor=extractor_weights, reference=reference, prompts=prompts
    )
    with terminal.work_bar() as progress:
        records, best = score_laws(
            row,
            laws,
            fixed,
            Runtime(place, progress=progress, warn=terminal.warn),
            assets,
            num_images=num_images,
            batch_size=batch_size,
        )
    keys = recipe_keys(laws[best])
    if as_json:
        scored = [
            {**recipe_keys(law), "metrics": {k: vars(v) for k, v in record.metrics.items()}}
            for law, record in zip(laws, records, strict=True)
        ]
        print(json.dumps({"best": keys, "laws": scored}, indent=2))
        return
    if rule == "constant":
        del keys["teacher_guidance"]
    method = records[best].method
    method = dataclasses.replace(method, name=f"{method.name} (best)")
    records[best] = dataclasses.replace(records[best], method=method)
    print(measured_table(records, fixed))
    print("\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
    changes = " ".join(f"--set {key}={value}" for key, value in keys.items())
    terminal.say(f"keys of a recipe, or: dimo distill --teacher {teacher} {changes}")
