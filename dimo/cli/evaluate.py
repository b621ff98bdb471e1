"""`dimo eval`, `dimo compare`, `dimo reference`: any set of images under a protocol."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dimo.cli.app import app
from dimo.cli.options import (
    AllowCode,
    Cache,
    Device,
    ExtractorWeights,
    Reference,
    Results,
    cache_folder,
    refuse_unused,
)
from dimo.errors import DimoError, unknown_name
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.protocol import Protocol
    from bench.records.compare import Difference
    from bench.records.record import ResultRecord
    from bench.suites.captions import CLIPScorer
    from bench.suites.features import Measured

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


NetworkWeights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        "--extractor-weights",
        help="Weights of the extractor, of the detector, or of HPS; default: shipped or fetched.",
    ),
]
PromptsPath = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="What images were made from, for HPS and CLIP score: HPSv2's folder of anime.json "
        "and so on, or a JSON file with a list of captions.",
    ),
]
ClipWeights = Annotated[
    Path | None,
    typer.Option(help="Weights of CLIP, for a protocol with CLIP score beside an extractor."),
]


@app.command(
    "eval",
    epilog="Examples: `dimo eval samples/ --protocol imagenet256-adm --reference "
    "VIRTUAL_imagenet256_labeled.npz --weights weights-inception-2015-12-05-6726825d.pth`"
    " · `torchrun --nproc_per_node=8 -m dimo eval samples.npz --protocol imagenet256-adm ...`",
)
def evaluate(
    paths: Paths,
    protocol: ProtocolName,
    reference: Reference = None,
    weights: NetworkWeights = None,
    prompts: PromptsPath = None,
    clip_weights: ClipWeights = None,
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
    results: Results = Path("results"),
    cache: Cache = "",
    allow_code: AllowCode = False,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The record on stdout, as JSON.")] = False,
) -> None:
    """Score a set of images under a protocol: every metric, with interval and provenance."""
    sections = ("Teacher", "Sampler", "Distill.", "Image sets")
    if section not in sections:
        raise unknown_name("section", section, sections)
    from bench.protocol import load_protocol
    from bench.suites.features import Workbench
    from dimo.engine.distributed import choose_device, ranks

    fixed = load_protocol(protocol)
    _check_prompts_option(fixed, prompts, clip_weights)
    prefers = fixed.scorer is not None and fixed.scorer.name == "hps"
    if prefers or fixed.detector is not None:
        refuse_unused(
            fixed.name,
            "reads its own layout and compares with no reference of yours",
            reference=reference,
            labels=labels,
            recursive=recursive,
        )
    if prefers:
        assert prompts is not None
        preferred = _prefer(
            paths,
            fixed,
            prompts,
            name=name or paths[0].name,
            section=section,
            steps=steps,
            weights=weights,
            device=device,
        )
        _show(preferred, fixed, protocol, results, as_json=as_json)
        return
    if fixed.detector is not None:
        _judge(
            paths,
            fixed,
            protocol,
            name=name or paths[0].name,
            section=section,
            steps=steps,
            weights=weights,
            nonconforming=nonconforming,
            results=results,
            device=device,
            as_json=as_json,
        )
        return
    with ranks() as group, terminal.work_bar() as progress:
        clip = _clip_scorer(fixed, prompts, clip_weights, device) if group.is_first else None
        workbench = Workbench(
            fixed,
            device=choose_device(device),
            weights=weights,
            reference=reference,
            cache=cache_folder(cache),
            allow_code=allow_code,
            nonconforming=nonconforming,
            ranks=group,
            progress=progress,
            say=lambda text: terminal.say(text, style="yellow"),
        )
        measured = workbench.measure_paths(
            paths,
            name=name or paths[0].name,
            section=section,  # type: ignore[arg-type]
            num_steps=steps,
            recursive=recursive,
            labels=labels,
        )
        if measured is None:
            return
        if clip is not None:
            from bench.suites.captions import with_clip_score

            scorer, captions = clip
            measured = with_clip_score(
                measured,
                paths,
                fixed,
                scorer=scorer,
                captions=captions,
                recursive=recursive,
                labels=labels,
                progress=progress,
            )
    _show(measured, fixed, protocol, results, as_json=as_json)


def _check_prompts_option(
    protocol: "Protocol", prompts: Path | None, clip_weights: Path | None
) -> None:
    if protocol.scorer is None or protocol.detector is not None:
        refuse_unused(
            protocol.name,
            "scores no pairs of image and prompt, or finds the prompts beside the images",
            prompts=prompts,
            clip_weights=clip_weights,
        )
        return
    if prompts is None:
        assert protocol.prompts is not None
        raise DimoError(
            f"protocol {protocol.name!r} needs the prompts of the images "
            f"({protocol.prompts.name}); give them with --prompts"
        )


def _clip_scorer(
    protocol: "Protocol", prompts: Path | None, weights: Path | None, device: str
) -> "tuple[CLIPScorer, tuple[str, ...]] | None":
    """CLIP and the captions of a protocol with CLIP score beside an extractor."""
    if protocol.scorer is None:
        return None
    from bench.suites.captions import load_clip_scorer, read_captions
    from dimo.engine.distributed import choose_device

    assert prompts is not None
    assert protocol.prompts is not None
    captions = read_captions(prompts, protocol.prompts)
    return load_clip_scorer(protocol.scorer, weights, choose_device(device)), captions


def _prefer(
    paths: list[Path],
    protocol: "Protocol",
    prompts: Path,
    *,
    name: str,
    section: str,
    steps: int | None,
    weights: Path | None,
    device: str,
) -> "Measured":
    """`dimo eval` where a scorer alone says how well images fit their prompts."""
    from bench.suites.hps import measure_hps
    from dimo.engine.distributed import choose_device
    from dimo.weights.catalog import locate

    if len(paths) > 1:
        raise DimoError(
            f"{len(paths)} paths; allowed: one under {protocol.name!r}, the folder of all styles"
        )
    assert protocol.scorer is not None
    weights = weights or locate(f"hps-{protocol.scorer.version}")
    with terminal.work_bar() as progress:
        return measure_hps(
            paths[0],
            protocol,
            prompts=prompts,
            weights=weights,
            name=name,
            section=section,  # type: ignore[arg-type]
            num_steps=steps,
            device=choose_device(device),
            progress=progress,
        )


def _judge(
    paths: list[Path],
    protocol: "Protocol",
    named: str,
    *,
    name: str,
    section: str,
    steps: int | None,
    weights: Path | None,
    nonconforming: bool,
    results: Path,
    device: str,
    as_json: bool,
) -> None:
    """`dimo eval` where a detector decides whether images show what their prompts ask for."""
    from bench.suites.geneval.measure import keep_verdicts, measure_geneval
    from dimo.engine.distributed import choose_device

    if len(paths) > 1:
        raise DimoError(
            f"{len(paths)} paths; allowed: one under {protocol.name!r}, the folder of all prompts"
        )
    with terminal.work_bar() as progress:
        found = measure_geneval(
            paths[0],
            protocol,
            name=name,
            section=section,  # type: ignore[arg-type]
            num_steps=steps,
            weights=weights,
            device=choose_device(device),
            nonconforming=nonconforming,
            progress=progress,
        )
    file = keep_verdicts(found, results)
    _show(found.measured, protocol, named, results, as_json=as_json)
    terminal.say(f"verdict on each image: {file}")


def _show(
    measured: "Measured", protocol: "Protocol", named: str, results: Path, *, as_json: bool
) -> None:
    """Keeps a record, prints it, and says what is worth knowing; `named`: as the user named it."""
    from bench.records.record import record_to_json
    from bench.records.store import append
    from bench.report import metric_table

    record = measured.record
    path = append(record, results, measured.contributions)
    level = protocol.uncertainty.level
    print(record_to_json(record) if as_json else metric_table(record, level=level), end="")
    for note in _notes(record):
        terminal.say(note, style="yellow")
    terminal.say(f"record: {path}; tables: dimo report --protocol {named} --results {results}")


def _notes(record: "ResultRecord") -> list[str]:
    evidence = record.evidence
    assert evidence is not None
    notes = list(evidence.notes)
    if evidence.nonconforming:
        reasons = "; ".join(evidence.nonconforming)
        notes.append(f"not under the protocol, and in no table: {reasons}")
    return notes


@app.command(
    epilog="Example: `dimo compare results/A.json results/B.json` · `dimo compare 3ed6 f225`"
)
def compare(
    first: Annotated[str, typer.Argument(help="A record's file, or the start of its run id.")],
    second: Annotated[str, typer.Argument(help="The record to compare it with.")],
    protocol: Annotated[
        str, typer.Option(help="Protocol name or file; default: the records' own, by name.")
    ] = "",
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Differences as JSON.")] = False,
) -> None:
    """Paired differences of two rows on the same seeds: which is better, beyond chance."""
    from bench.protocol import load_protocol, protocol_sha256
    from bench.records.compare import compare as differences_of
    from bench.records.store import find_record, load_contributions
    from bench.report import difference_table
    from dimo.util.schema import encode

    (a, folder_a), (b, folder_b) = (find_record(name, results) for name in (first, second))
    fixed = load_protocol(protocol or a.protocol.name)
    if protocol_sha256(fixed) != a.protocol.sha256:
        raise DimoError(
            f"{a.method.name!r} was measured under {a.protocol.name} {a.protocol.sha256[:12]}, not "
            f"{fixed.name} {protocol_sha256(fixed)[:12]}; name its protocol's file with --protocol"
        )
    contributions = (load_contributions(a, folder_a), load_contributions(b, folder_b))
    differences: list[Difference] = differences_of(a, b, contributions, fixed.uncertainty)
    if as_json:
        print(json.dumps(encode(differences), indent=2))
    else:
        print(difference_table(a, b, differences, level=fixed.uncertainty.level), end="")


@app.command(
    epilog="Example: `dimo reference train256/ --protocol imagenet256-clean "
    "--weights inception-2015-12-05.pt -o imagenet256-train.npz`"
)
def reference(
    paths: Paths,
    protocol: ProtocolName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the .npz.")],
    weights: ExtractorWeights = None,
    recursive: Recursive = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    allow_code: AllowCode = False,
    device: Device = "auto",
) -> None:
    """Make reference statistics (mu, sigma, n) and features from real images."""
    if out.exists() and not force:
        raise DimoError(f"output {out} exists; replace it with --force or choose another --out")
    from bench.features.references import make_reference
    from bench.protocol import load_protocol
    from dimo.engine.distributed import choose_device, ranks
    from dimo.util.files import sha256_file

    with ranks() as group, terminal.work_bar() as progress:
        stats = make_reference(
            paths,
            load_protocol(protocol),
            out,
            weights=weights,
            allow_code=allow_code,
            device=choose_device(device),
            recursive=recursive,
            ranks=group,
            progress=progress,
        )
    if stats is not None:
        print(f"{out}: {stats.count:,} images, sha256 {sha256_file(out)}")
