"""`dimo report`, `dimo results`, `dimo protocols`, `dimo verify`; only `verify` imports torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples, protocols_app, results_app
from dimo.errors import DimoError, unknown_name
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.protocol import Protocol
    from bench.records.record import ResultRecord


@app.command(
    epilog=examples(
        "dimo report",
        "dimo report --protocol digits --format latex -o table.tex",
        "dimo report --format html -o report.html --plots plots",
        "dimo report --ablation",
    )
)
def report(
    protocol: Annotated[
        str, typer.Option(help="Protocol name or file; default: every protocol with results.")
    ] = "",
    results: opt.Results = Path("results"),
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="text, markdown, latex, csv, json or html; default: text in a terminal, in a file "
            "or a pipe markdown.",
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write here instead of printing.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Also write plots here, as SVG and PNG.")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder of runs; the page and the plots show their training curves."),
    ] = None,
    settings: Annotated[
        bool,
        typer.Option(
            "--settings",
            help="Also show each row's settings, how they were chosen, its training and code.",
        ),
    ] = False,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Show the ablations, averaged over training seeds.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a results file was left out.")
    ] = False,
    update: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Update the tables in this Markdown file, each between `<!-- dimo report "
            "--protocol NAME -->` and `<!-- dimo report end -->`, instead of printing.",
        ),
    ] = None,
) -> None:
    """Print the paper's tables: measured rows, and published numbers apart from them."""
    from bench.report import FORMATS, read_report, report_html, update_page
    from dimo.util.files import write_atomic

    chosen = format_ or ("text" if out is None and terminal.is_terminal() else "markdown")
    if chosen not in FORMATS:
        raise unknown_name("format", chosen, FORMATS)
    if update is not None:
        if protocol or out or plots or runs or ablation or settings or format_:
            raise DimoError("--update allows only --results and --strict; the file says the rest")
        changed, problems = update_page(update, results)
        _warn(problems)
        terminal.say(f"{update}: {'tables updated' if changed else 'up to date'}")
    else:
        content = read_report(results, protocol, ablation=ablation, settings=settings)
        problems = list(content.problems)
        _warn(problems)
        if chosen == "html":
            with terminal.work_bar() as progress:
                text = report_html(content, runs=runs, progress=progress)
        else:
            text = FORMATS[chosen](content)
        if out is None:
            print(text, end="", flush=True)
        else:
            write_atomic(out, text)
            terminal.say(f"report: {out}")
        folded = chosen in ("text", "markdown", "latex") and not (settings or ablation)
        if folded and any(part.records for part in content.protocols):
            terminal.say("settings, training and code of each row: dimo report --settings")
        if plots is not None:
            from bench.report.plots import write_plots

            with terminal.work_bar() as progress:
                written = write_plots(content, plots, runs=runs, progress=progress)
            terminal.say(f"plots: {len(written)} files in {plots}")
    if strict and problems:
        count = len(problems)
        terminal.say(f"{count} {'file' if count == 1 else 'files'} left out (--strict)")
        raise typer.Exit(1)


def measured_table(records: "list[ResultRecord]", protocol: "Protocol") -> str:
    """The report of these records alone, as text for a terminal."""
    from bench.report import collect_report, report_plain

    return report_plain(collect_report(records, protocols=[protocol]))


def _warn(problems: list[str]) -> None:
    for problem in problems:
        terminal.warn(problem)


@protocols_app.command("list", epilog=examples("dimo protocols list"))
def protocols_list() -> None:
    """List every protocol with its hash."""
    from bench.protocol import list_protocols, protocol_sha256

    for protocol in list_protocols():
        digest = protocol_sha256(protocol)[:12]
        print(f"{protocol.name}  v{protocol.version}  {digest}  {protocol.title}")


@protocols_app.command("show", epilog=examples("dimo protocols show digits"))
def protocols_show(name: Annotated[str, typer.Argument(help="Protocol name or file.")]) -> None:
    """Print a protocol file unchanged."""
    from bench.protocol import protocol_text

    print(protocol_text(name), end="")


@protocols_app.command("validate", epilog=examples("dimo protocols validate my-protocol.toml"))
def protocols_validate(path: Annotated[Path, typer.Argument(help="TOML file.")]) -> None:
    """Check a protocol file and say what is wrong with it, if anything."""
    from bench.protocol import protocol_sha256, validate_file

    print(f"{path}: valid, sha256 {protocol_sha256(validate_file(path))}")


Record = Annotated[str, typer.Argument(help="File of a record, or the beginning of its run id.")]
ProtocolFile = Annotated[
    Path | None,
    typer.Option(
        "--protocol", help="The record's protocol file; default: the shipped one with its hash."
    ),
]


@results_app.command(
    "list", epilog=examples("dimo results list", "dimo results list --protocol digits --json")
)
def results_list(
    protocol: Annotated[str, typer.Option(help="Only records of this protocol's name.")] = "",
    results: opt.Results = Path("results"),
    as_json: opt.AsJson = False,
) -> None:
    """List every record, oldest first, with its first metric."""
    from bench.records.store import load_all
    from bench.report.runs import record_summary, records_table

    records, problems = load_all(results)
    _warn(problems)
    chosen = [record for record in records if protocol in ("", record.protocol.name)]
    if as_json:
        print(json.dumps([record_summary(record) for record in chosen], indent=2))
    elif chosen:
        print(records_table(chosen), end="")
    else:
        names = ", ".join(sorted({record.protocol.name for record in records})) or "none"
        of_protocol = f" of protocol {protocol!r}" if protocol else ""
        terminal.warn(f"no record{of_protocol} in {results}; protocols with records: {names}")


@results_app.command("show", epilog=examples("dimo results show 3ed6"))
def results_show(
    record: Record,
    results: opt.Results = Path("results"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record file unchanged.")
    ] = False,
) -> None:
    """Show everything in one record."""
    from bench.records.record import protocol_of, record_to_json
    from bench.records.store import find_record
    from bench.report.runs import record_page

    shown, _ = find_record(record, results)
    if as_json:
        print(record_to_json(shown), end="")
        return
    try:
        level = protocol_of(shown).uncertainty.level
    except DimoError:  # a record is readable without its protocol
        level = None
    print(record_page(shown, level=level), end="")


@results_app.command("diff", epilog=examples("dimo results diff 3ed6 f225"))
def results_diff(
    first: Record,
    second: Record,
    results: opt.Results = Path("results"),
    as_json: opt.AsJson = False,
) -> None:
    """Show how two records differ: metrics, settings, code, packages, device, hashes."""
    from bench.records.store import find_record
    from bench.report.runs import difference_page, difference_summary

    (a, _), (b, _) = (find_record(name, results) for name in (first, second))
    if as_json:
        print(json.dumps(difference_summary(a, b), indent=2))
        return
    print(difference_page(a, b), end="")
    if a.protocol.sha256 == b.protocol.sha256:
        terminal.say(f"for paired intervals of the differences: dimo compare {first} {second}")
    else:
        terminal.warn("the protocols differ: these numbers are not comparable")


@app.command(
    epilog=examples(
        "dimo verify 3ed6",
        "dimo verify results/A.json --student runs/mine",
        "dimo verify f225 --images samples/",
    )
    + "\n\nExit code: 0, every metric is within its interval; 1, one is not; 2, an error."
)
def verify(
    record: Record,
    results: opt.Results = Path("results"),
    protocol: ProtocolFile = None,
    student: Annotated[
        str | None, typer.Option(metavar="RUN", help="The student, if it has moved since.")
    ] = None,
    images: Annotated[
        list[Path],
        typer.Option(help="The images, for a row of image files; several are its shards."),
    ] = [],  # noqa: B006
    labels: Annotated[str, typer.Option(help="Where the labels come from, see dimo eval.")] = "",
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Read image folders recursively.")
    ] = False,
    weights: opt.Weights = None,
    reference: opt.Reference = None,
    extractor_weights: opt.ExtractorWeights = None,
    clip_weights: opt.ClipWeights = None,
    prompts: opt.ProtocolPrompts = None,
    allow_code: opt.AllowCode = False,
    device: opt.Device = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Reproduce a row of the table from its record and check the numbers against its intervals.

    Protocol, weights, reference, extractor, detector and prompts must have the hashes of the
    record. Nothing is written. (`dimo weights verify` checks weights files.)
    """
    from bench.records.record import protocol_of
    from bench.records.store import find_record
    from bench.report.runs import verification_page, verification_summary

    recorded, _ = find_record(record, results)
    fixed = protocol_of(recorded, protocol)
    from bench.records.reproduce import compare_runs, repeat
    from bench.suites.base import Assets
    from dimo.engine.distributed import Runtime, choose_device

    with terminal.work_bar() as progress:
        repeated = repeat(
            recorded,
            fixed,
            Runtime(choose_device(device), progress=progress, warn=terminal.warn),
            Assets(
                recursive=recursive,
                weights=weights,
                extractor=extractor_weights,
                clip=clip_weights,
                reference=reference,
                prompts=prompts,
                allow_code=allow_code,
            ),
            student=student,
            images=images,
            labels=labels,
            recursive=recursive,
        )
    verified = compare_runs(recorded, repeated)
    if as_json:
        print(json.dumps(verification_summary(recorded, verified), indent=2))
    else:
        print(verification_page(recorded, verified, level=fixed.uncertainty.level), end="")
    if not verified.holds:
        raise typer.Exit(1)
