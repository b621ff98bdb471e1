"""`dimo eval`, `dimo compare`, `dimo reference`: any set of images under a protocol."""

import json
from pathlib import Path
from typing import Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app
from dimo.errors import DimoError, unknown_name
from dimo.util import terminal

Paths = Annotated[
    list[Path],
    typer.Argument(help="Folder, .zip, .tar or .npz of images; several are shards of one set."),
]
ProtocolName = Annotated[str, typer.Option(help="Protocol name or file.")]
Recursive = Annotated[bool, typer.Option("--recursive", help="Read folders with subfolders.")]
Labels = Annotated[
    str,
    typer.Option(
        help="Where labels come from: filename (000123_207.png), folder (one a class, sorted by "
        "name), cyclic:1000 (image i has label i mod 1000), or a .csv or .json file; default: "
        "labels.csv or labels.json in the set."
    ),
]


@app.command(
    "eval",
    epilog="Examples: `dimo eval samples/ --protocol imagenet256-adm --reference "
    "VIRTUAL_imagenet256_labeled.npz --extractor-weights weights-inception-2015-12-05-6726825d.pth`"
    " · `torchrun --nproc_per_node=8 -m dimo eval samples.npz --protocol imagenet256-adm ...`",
)
def evaluate(
    paths: Paths,
    protocol: ProtocolName,
    reference: opt.Reference = None,
    weights: opt.NoWeights = None,
    extractor_weights: opt.ExtractorWeights = None,
    prompts: opt.ProtocolPrompts = None,
    clip_weights: opt.ClipWeights = None,
    labels: Labels = "",
    recursive: Recursive = False,
    name: Annotated[str, typer.Option(help="Name of the row; default: the path's.")] = "",
    section: Annotated[
        str, typer.Option(help="Block of the table: Teacher, Sampler, Distill., Image sets.")
    ] = "Image sets",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of the images.")] = None,
    nonconforming: Annotated[
        bool,
        typer.Option(
            "--nonconforming",
            help="Score what is not as the protocol asks; such a record is in no table.",
        ),
    ] = False,
    results: opt.Results = Path("results"),
    cache: opt.Cache = "",
    allow_code: opt.AllowCode = False,
    device: opt.Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The record on stdout, as JSON.")] = False,
) -> None:
    """Score a set of images under a protocol: every metric, with interval and provenance."""
    sections = ("Teacher", "Sampler", "Distill.", "Image sets")
    if section not in sections:
        raise unknown_name("section", section, sections)
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
            Runtime(choose_device(device), group, progress, opt.warn),
            Assets(
                extractor=extractor_weights,
                clip=clip_weights,
                reference=reference,
                prompts=prompts,
                cache=cache_folder(cache),
                allow_code=allow_code,
            ),
            origin=ImageOrigin(
                name or paths[0].name,
                section,  # type: ignore[arg-type]
                steps,
                labels,
                recursive,
            ),
            results=results,
            nonconforming=nonconforming,
            command=opt.command_line(),
        )
    if scored is None:
        return
    record, path = scored
    level = fixed.uncertainty.level
    print(record_to_json(record) if as_json else metric_table(record, level=level), end="")
    evidence = record.evidence
    assert evidence is not None
    for note in evidence.notes:
        opt.warn(note)
    if evidence.nonconforming:
        opt.warn(f"not under the protocol, and in no table: {'; '.join(evidence.nonconforming)}")
    terminal.say(f"record: {path}; tables: dimo report --protocol {protocol} --results {results}")
    verdicts = results / "verdicts" / f"{record.run_id}.jsonl"
    if verdicts.is_file():
        terminal.say(f"verdict on each image: {verdicts}")


@app.command(
    epilog="Example: `dimo compare results/A.json results/B.json` · `dimo compare 3ed6 f225`"
)
def compare(
    first: Annotated[str, typer.Argument(help="A record's file, or the start of its run id.")],
    second: Annotated[str, typer.Argument(help="The record to compare it with.")],
    protocol: Annotated[
        str, typer.Option(help="Protocol name or file; default: the records' own, by name.")
    ] = "",
    results: opt.Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Differences as JSON.")] = False,
) -> None:
    """Paired differences of two rows on the same seeds: which is better, beyond chance."""
    from bench.records.record import protocol_of
    from bench.records.store import find_record
    from bench.report import difference_table
    from bench.runner import compare as differences_of
    from dimo.util.schema import encode

    a, b = (find_record(name, results)[0] for name in (first, second))
    fixed = protocol_of(a, protocol or None)
    differences = differences_of(first, second, protocol=protocol or None, results=results)
    if as_json:
        print(json.dumps(encode(differences), indent=2))
    else:
        print(difference_table(a, b, differences, level=fixed.uncertainty.level), end="")


@app.command(
    epilog="Example: `dimo reference train256/ --protocol imagenet256-clean "
    "--extractor-weights inception-2015-12-05.pt -o imagenet256-train.npz`"
)
def reference(
    paths: Paths,
    protocol: ProtocolName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the .npz.")],
    weights: opt.NoWeights = None,
    extractor_weights: opt.ExtractorWeights = None,
    recursive: Recursive = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    allow_code: opt.AllowCode = False,
    device: opt.Device = "auto",
) -> None:
    """Make reference statistics (mu, sigma, n) and features from real images."""
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
            runtime=Runtime(choose_device(device), group, progress),
        )
    if stats is not None:
        print(f"{out}: {stats.count:,} images, sha256 {sha256_file(out)}")
