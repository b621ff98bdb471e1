"""`dimo results`, `dimo verify`: records one by one, and a row run again from its record."""

__all__ = ["results_diff", "results_list", "results_show", "verify"]

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimo import terminal
from dimo.cli.app import app, results_app
from dimo.cli.options import AllowCode, Device, Reference, Results, Weights
from dimo.errors import DimoError

if TYPE_CHECKING:
    from bench.record import ResultRecord
    from bench.verify import Verification

Record = Annotated[str, typer.Argument(help="A record's file, or the start of its run id.")]
ProtocolFile = Annotated[
    Path | None,
    typer.Option("--protocol", help="File of the record's protocol; default: shipped, by hash."),
]


@results_app.command(
    "list", epilog="Examples: `dimo results list` · `dimo results list --protocol digits --json`"
)
def results_list(
    protocol: Annotated[str, typer.Option(help="Only records of this protocol's name.")] = "",
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """List every record, oldest first, with its first metric."""
    from bench.report.runs import records_table
    from bench.store import load_all

    records, problems = load_all(results)
    for problem in problems:
        terminal.say(problem, style="yellow")
    found = [record for record in records if protocol in ("", record.protocol.name)]
    if as_json:
        print(json.dumps([_summary(record) for record in found], indent=2))
        return
    if not found:
        names = ", ".join(sorted({record.protocol.name for record in records})) or "none"
        wanted = f" of protocol {protocol!r}" if protocol else ""
        terminal.say(f"no record{wanted} in {results}; protocols there: {names}", style="yellow")
        return
    print(records_table(found), end="")


def _summary(record: "ResultRecord") -> dict[str, Any]:
    from dimo.strict import encode

    name, metric = next(iter(record.metrics.items()), (None, None))
    return {
        "run_id": record.run_id,
        "created": record.created,
        "protocol": encode(record.protocol),
        "method": record.method.name,
        "section": record.method.section,
        "num_steps": record.method.num_steps,
        "metric": name,
        "value": metric.value if metric else None,
        "low": metric.low if metric else None,
        "high": metric.high if metric else None,
        "revision": encode(record.revision),
    }


@results_app.command("show", epilog="Example: `dimo results show 3ed6`")
def results_show(
    record: Record,
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="The record's file as it is.")] = False,
) -> None:
    """Show everything that one record says."""
    from bench.record import protocol_of, record_to_json
    from bench.report.runs import record_page
    from bench.store import find_record

    found, _ = find_record(record, results)
    if as_json:
        print(record_to_json(found), end="")
        return
    try:
        level = protocol_of(found).uncertainty.level
    except DimoError:  # it can be read without its protocol
        level = None
    print(record_page(found, level=level), end="")


@results_app.command("diff", epilog="Example: `dimo results diff 3ed6 f225`")
def results_diff(
    first: Record,
    second: Record,
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Show what two records differ in: metrics, settings, code, packages, device, hashes."""
    from bench.differences import differences
    from bench.report.runs import difference_page
    from bench.store import find_record

    (a, _), (b, _) = (find_record(name, results) for name in (first, second))
    if as_json:
        content = {
            "records": [a.run_id, b.run_id],
            "metrics": {
                name: [r.metrics[name].value if name in r.metrics else None for r in (a, b)]
                for name in {**a.metrics, **b.metrics}
            },
            "different": differences(a, b),
        }
        print(json.dumps(content, indent=2))
        return
    print(difference_page(a, b), end="")
    if a.protocol.sha256 == b.protocol.sha256:
        terminal.say(f"beyond chance? paired intervals: dimo compare {first} {second}")
    else:
        terminal.say("their protocols differ: these numbers are not comparable", style="yellow")


@app.command(
    epilog="Examples: `dimo verify 3ed6` · `dimo verify results/A.json --student runs/mine` · "
    "`dimo verify f225 --images samples/`. Exit code 0: every metric is within its interval; "
    "1: one is not; 2: the row could not be run again."
)
def verify(
    record: Record,
    results: Results = Path("results"),
    protocol: ProtocolFile = None,
    student: Annotated[
        str | None, typer.Option(metavar="RUN", help="The student, if it lies elsewhere now.")
    ] = None,
    images: Annotated[
        list[Path],
        typer.Option(help="The images, for a row of a set of images; several are its shards."),
    ] = [],  # noqa: B006
    labels: Annotated[str, typer.Option(help="Where their labels come from, see dimo eval.")] = "",
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Read image folders with subfolders.")
    ] = False,
    weights: Weights = None,
    reference: Reference = None,
    extractor_weights: Annotated[
        Path | None,
        typer.Option(help="Weights file of the extractor or the detector; default: shipped."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="The protocol's official file of prompts; default: the embedded ones."),
    ] = None,
    allow_code: AllowCode = False,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as JSON.")] = False,
) -> None:
    """Run a row of the table again from its record, and hold the numbers against its intervals.

    Protocol, weights, reference, extractor, detector and prompts must have the hashes of the
    record. Nothing is written. (`dimo weights verify` checks files of weights.)
    """
    from bench.record import protocol_of
    from bench.report.runs import verification_page
    from bench.store import find_record

    found, _ = find_record(record, results)
    fixed = protocol_of(found, protocol)
    from bench.verify import compare_runs, repeat
    from dimo.launch import choose_device

    with terminal.work_bar() as progress:
        again = repeat(
            found,
            fixed,
            device=choose_device(device),
            student=student,
            images=images,
            labels=labels,
            recursive=recursive,
            weights=weights,
            reference=reference,
            extractor_weights=extractor_weights,
            prompts=prompts,
            allow_code=allow_code,
            progress=progress,
            say=lambda text: terminal.say(text, style="yellow"),
        )
    verdict = compare_runs(found, again)
    if as_json:
        print(json.dumps(_verdict(found, verdict), indent=2))
    else:
        print(verification_page(found, verdict, level=fixed.uncertainty.level), end="")
    if not verdict.holds:
        raise typer.Exit(1)


def _verdict(record: "ResultRecord", found: "Verification") -> dict[str, Any]:
    from dimo.strict import encode

    return {
        "run_id": record.run_id,
        "within": found.holds,
        "equal": found.equal,
        "same_images": found.same_images,
        "metrics": {check.metric: encode(check) for check in found.checks},
        "different": encode(found.circumstances),
    }
