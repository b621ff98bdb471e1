"""`dimo eval`, `compare`, `reference`, `protocols new`: any set of images under a protocol."""

import json
from pathlib import Path
from typing import Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples, protocols_app
from dimo.errors import DimoError, unknown_name
from dimo.util import terminal
from dimo.util.files import check_folder

Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH",
        help="Folder, .zip, .tar or .npz of images; several are shards of one set.",
    ),
]
ProtocolName = Annotated[str, typer.Option(metavar="NAME", help="Protocol name or file.")]
Recursive = Annotated[
    bool,
    typer.Option("--recursive", help="Read folders, also of the reference, with subfolders."),
]
CentreCrop = Annotated[
    int | None,
    typer.Option(
        "--centre-crop",
        metavar="SIDE",
        min=1,
        help="Take photos of any size and kind: halve by box averages, resize the shorter side "
        "bicubically to SIDE, crop the center (ADM's rule, recorded in the file).",
    ),
]
Labels = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help="Where labels come from: filename (000123_207.png), folder (one a class, sorted by "
        "name), cyclic:1000 (image i has label i mod 1000), a .csv or .json file, or none; "
        "default: labels.csv or labels.json in the set, or those stored with the images.",
    ),
]


@app.command(
    "eval",
    epilog=examples(
        "dimo eval samples/ --protocol digits --name mine --steps 4",
        "dimo eval samples/ --protocol imagenet256-adm --reference adm.npz",
        "dimo eval samples/ --protocol digits --per-class classes.csv",
        "dimo eval DIR --protocol scenes-geneval",
        "torchrun --nproc_per_node=8 -m dimo eval set.npz --protocol imagenet256-adm",
    ),
)
def evaluate(
    paths: Paths,
    protocol: ProtocolName,
    name: Annotated[
        str, typer.Option(metavar="TEXT", help="Name of the row; default: the path's.")
    ] = "",
    section: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Block of the table: Teacher, Sampler, Distill., Image sets."
        ),
    ] = "Image sets",
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sampling steps of the images.")
    ] = None,
    results: opt.Results = Path("results"),
    labels: Labels = "",
    recursive: Recursive = False,
    nonconforming: Annotated[
        bool,
        typer.Option(
            "--nonconforming",
            help="Score what is not as the protocol asks, off-protocol.",
        ),
    ] = False,
    per_class: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write FID, coverage and accuracy of each class to this .csv file, and the "
            "worst classes as a picture beside it.",
        ),
    ] = None,
    reference: opt.Reference = None,
    weights: opt.NoWeights = None,
    extractor_weights: opt.ExtractorWeights = None,
    clip_weights: opt.ClipWeights = None,
    prompts: opt.ProtocolPrompts = None,
    as_json: opt.AsJson = False,
    device: opt.Device = "auto",
    cache: opt.Cache = "",
    allow_code: opt.AllowCode = False,
) -> None:
    """Score a set of images under a protocol: every metric, with interval and provenance."""
    sections = ("Teacher", "Sampler", "Distill.", "Image sets")
    if section not in sections:
        raise unknown_name("section", section, sections)
    if per_class is not None and per_class.suffix != ".csv":
        raise DimoError(f"--per-class {per_class} is not a .csv file; e.g. --per-class classes.csv")
    from bench.features.extraction import cache_folder
    from bench.protocol import load_protocol
    from bench.records.record import record_to_json
    from bench.report import metric_table
    from bench.runner import score_images
    from bench.suites.base import Assets, ImageOrigin
    from dimo.engine.distributed import Runtime, choose_device, ranks

    fixed = load_protocol(protocol)
    with ranks() as group, terminal.work_bar() as progress:
        scored = score_images(
            paths,
            fixed,
            Runtime(choose_device(device), group, progress, terminal.warn),
            Assets(
                extractor=extractor_weights,
                clip=clip_weights,
                reference=reference,
                prompts=prompts,
                cache=cache_folder(cache),
                recursive=recursive,
                allow_code=allow_code,
            ),
            origin=ImageOrigin(
                name,
                section,  # type: ignore[arg-type]
                steps,
                labels,
                recursive,
            ),
            results=results,
            nonconforming=nonconforming,
            command=opt.command_line(),
            per_class=per_class,
        )
    if scored is None:
        return
    record, path = scored
    level = fixed.uncertainty.level
    print(record_to_json(record) if as_json else metric_table(record, level=level), end="")
    evidence = record.evidence
    assert evidence is not None
    for note in evidence.notes:
        terminal.warn(note)
    if record.off_protocol:
        terminal.warn(f"off-protocol, in a table of its own: {'; '.join(record.off_protocol)}")
    if per_class is not None:
        from bench.report.plots import write_class_bars

        picture = write_class_bars(per_class)
        terminal.say(f"classes: {per_class}; the worst of them: {picture}")
    terminal.say(f"record: {path}; tables: dimo report --protocol {protocol} --results {results}")
    verdicts = results / "verdicts" / f"{record.run_id}.jsonl"
    if verdicts.is_file():
        terminal.say(f"verdict on each image: {verdicts}")


@app.command(
    epilog=examples("dimo compare 3ed6 f225", "dimo compare results/A.json results/B.json")
)
def compare(
    first: Annotated[
        str, typer.Argument(metavar="RECORD", help="A record's file, or the start of its run id.")
    ],
    second: Annotated[str, typer.Argument(metavar="RECORD", help="The record to compare it with.")],
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Protocol name or file; default: the records' own, by name."
        ),
    ] = "",
    results: opt.Results = Path("results"),
    as_json: opt.AsJson = False,
) -> None:
    """Paired differences of two rows on the same seeds: which is better, beyond chance.

    With records of several training seeds of each student in the results folder, their means are
    compared, and the interval covers retraining, too.
    """
    from bench.records.compare import compare as differences_of
    from bench.records.record import protocol_of
    from bench.records.store import find_record
    from bench.report import difference_table
    from dimo.util.schema import encode

    a, b = (find_record(name, results)[0] for name in (first, second))
    fixed = protocol_of(a, protocol or None)
    differences = differences_of(first, second, protocol=protocol or None, results=results)
    if as_json:
        print(json.dumps(encode(differences), indent=2))
    else:
        print(difference_table(a, b, differences, level=fixed.uncertainty.level), end="")


@app.command(
    epilog=examples(
        "dimo reference train256/ --protocol imagenet256-clean -o imagenet256-train.npz",
        "dimo reference photos/ --protocol imagenet256-clean --centre-crop 256 -o x.npz",
    )
)
def reference(
    paths: Paths,
    protocol: ProtocolName,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write the .npz.")
    ],
    recursive: Recursive = False,
    centre_crop: CentreCrop = None,
    weights: opt.NoWeights = None,
    extractor_weights: opt.ExtractorWeights = None,
    force: opt.Force = False,
    device: opt.Device = "auto",
    allow_code: opt.AllowCode = False,
) -> None:
    """Make reference statistics (mu, sigma, n) and features from real images."""
    if out.suffix != ".npz":
        raise DimoError(f"--out {out} is not an .npz file; e.g. -o {out.with_suffix('.npz')}")
    check_folder(out.parent, "--out folder")
    if out.is_dir():
        raise DimoError(f"--out {out} is a folder; give a file in it")
    if out.exists() and not force:
        raise DimoError(f"output {out} exists; replace it with --force or choose another --out")
    from bench.features.references import make_reference
    from bench.protocol import load_protocol
    from dimo.engine.distributed import Runtime, choose_device, ranks
    from dimo.util.files import sha256_file

    with ranks() as group, terminal.work_bar() as progress:
        stats = make_reference(
            paths,
            load_protocol(protocol),
            out,
            weights=extractor_weights,
            allow_code=allow_code,
            recursive=recursive,
            side=centre_crop,
            runtime=Runtime(choose_device(device), group, progress, terminal.warn),
        )
    if stats is not None:
        print(f"{out}: {stats.count:,} images, sha256 {sha256_file(out)}")


@protocols_app.command(
    "new",
    epilog=examples(
        "dimo protocols new photos/ --extractor inception -o photos.toml",
        "dimo protocols new set.zip --centre-crop 256 -o flowers.toml",
    ),
)
def protocols_new(
    paths: Paths,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The .toml to write; and an .npz beside."),
    ],
    extractor: Annotated[
        str, typer.Option(metavar="NAME", help="Feature extractor, as protocols name it.")
    ] = "inception",
    num_images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Images to generate per row; default: 50,000, or 5,000 of a smaller set.",
        ),
    ] = None,
    centre_crop: CentreCrop = None,
    extractor_weights: opt.ExtractorWeights = None,
    device: opt.Device = "auto",
) -> None:
    """Make a protocol of your own images: its rules in a .toml, reference statistics in an .npz."""
    if out.suffix != ".toml":
        raise DimoError(f"--out {out} is not a .toml file; e.g. -o {out.with_suffix('.toml')}")
    check_folder(out.parent, "--out folder")
    for path in (out, out.with_suffix(".npz")):
        if path.exists():
            raise DimoError(f"output {path} exists; choose another --out, or remove it")
    from bench.features.references import new_protocol
    from bench.protocol import protocol_sha256
    from dimo.engine.distributed import Runtime, choose_device, ranks

    with ranks() as group, terminal.work_bar() as progress:
        made = new_protocol(
            paths,
            out,
            extractor=extractor,
            num_images=num_images,
            side=centre_crop,
            runtime=Runtime(choose_device(device), group, progress, terminal.warn),
            weights=extractor_weights,
            allow_code=False,
        )
    if made is not None:
        print(f"{out}: protocol {made.name}, sha256 {protocol_sha256(made)}")
