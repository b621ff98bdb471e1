"""`dimo report`, `dimo protocols`: what reads results and protocols, without heavy imports.

`dimo results`, `dimo verify`: records one by one, and a row run again from its record.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimo.cli.app import app, protocols_app, results_app
from dimo.cli.options import (
    AllowCode,
    ClipWeights,
    Device,
    ExtractorWeights,
    ProtocolPrompts,
    Reference,
    Results,
    Weights,
    warn,
)
from dimo.errors import DimoError, unknown_name
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.protocol import Protocol
    from bench.records.record import ResultRecord
    from bench.report import Report


@app.command(
    epilog="Examples: `dimo report` · `dimo report --protocol digits --format latex -o table.tex` "
    "· `dimo report --format html -o report.html --plots plots` · `dimo report --ablation`"
)
def report(
    protocol: Annotated[
        str, typer.Option(help="Protocol name or file; default: every one with results.")
    ] = "",
    results: Results = Path("results"),
    format_: Annotated[
        str, typer.Option("--format", "-f", help="markdown, latex, csv, json or html.")
    ] = "markdown",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write here instead of printing.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Also write plots here, as SVG and PNG.")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder of runs, whose training curves the page and plots show too."),
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="The ablations, averaged over training seeds.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a file of results was left out.")
    ] = False,
    update: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Renew the tables in this Markdown file, each between `<!-- dimo report "
            "--protocol NAME -->` and `<!-- dimo report end -->`, and print nothing.",
        ),
    ] = None,
) -> None:
    """Print the paper's tables: measured rows, and quoted rows apart from them."""
    from bench.report import FORMATS

    if format_ not in FORMATS:
        raise unknown_name("format", format_, FORMATS)
    if update is not None:
        if protocol or out or plots or runs or ablation or format_ != "markdown":
            raise DimoError("--update takes only --results and --strict; the file says the rest")
        problems = _updated(update, results)
    else:
        found = _collected(protocol, results, ablation=ablation)
        problems = list(found.problems)
        _put(_rendered(found, format_, runs), out)
        if plots is not None:
            from bench.report.plots import write_plots

            with terminal.work_bar() as progress:
                written = write_plots(found, plots, runs=runs, progress=progress)
            terminal.say(f"plots: {len(written)} files in {plots}")
    if strict and problems:
        count = len(problems)
        terminal.say(f"{count} {'file' if count == 1 else 'files'} left out (--strict)")
        raise typer.Exit(1)


def report_text(protocol_name: str, results: Path) -> str:
    """The Markdown report of one protocol on a folder of results."""
    return _rendered(_collected(protocol_name, results), "markdown")


def measured_table(records: "list[ResultRecord]", protocol: "Protocol") -> str:
    """Markdown of these records alone."""
    from bench.report import collect_report, report_markdown

    found = collect_report(records, [], [], protocols=[protocol], folder=Path())
    return report_markdown(found)


def _collected(protocol_name: str, results: Path, *, ablation: bool = False) -> "Report":
    from bench.protocol import list_protocols, load_protocol
    from bench.protocol.catalog import data_dir
    from bench.records.store import load_all
    from bench.report import collect_report, load_published, with_records

    chosen = [load_protocol(protocol_name)] if protocol_name else []
    records, problems = load_all(results)
    for problem in problems:
        terminal.say(problem, style="yellow")
    return collect_report(
        records,
        problems,
        load_published(data_dir("published") / "published.csv"),
        protocols=chosen or with_records(list_protocols(), records) or [load_protocol("digits")],
        folder=results,
        ablation=ablation,
    )


def _rendered(found: "Report", name: str, runs: Path | None = None) -> str:
    if name == "html":
        from bench.report.html import render_page

        with terminal.work_bar() as progress:
            return render_page(found, runs=runs, progress=progress)
    from bench.report import report_csv, report_json, report_latex, report_markdown

    written = {"latex": report_latex, "csv": report_csv, "json": report_json}
    return written.get(name, report_markdown)(found)


def _put(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    from dimo.util.files import write_atomic

    write_atomic(out, text)
    terminal.say(f"report: {out}")


def _updated(page: Path, results: Path) -> list[str]:
    """Renews the tables of a page; returns the files of results that were left out."""
    from bench.report import section_markdown
    from bench.report.markdown import renewed
    from dimo.util.files import write_atomic

    problems: dict[str, None] = {}

    def section(protocol: str, ablation: bool) -> str:
        found = _collected(protocol, results, ablation=ablation)
        problems.update(dict.fromkeys(found.problems))
        return section_markdown(found)

    try:
        before = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DimoError(f"cannot read {page}: {error}; give a Markdown file") from error
    after = renewed(before, section)
    if after != before:
        write_atomic(page, after)
    terminal.say(f"{page}: {'tables made again' if after != before else 'up to date'}")
    return list(problems)


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


if TYPE_CHECKING:
    from bench.records.record import ResultRecord
    from bench.records.reproduce import Verification

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
    from bench.records.store import load_all
    from bench.report.runs import records_table

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
    from dimo.util.schema import encode

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
    from bench.records.record import protocol_of, record_to_json
    from bench.records.store import find_record
    from bench.report.runs import record_page

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
    from bench.records.differences import differences
    from bench.records.store import find_record
    from bench.report.runs import difference_page

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
    extractor_weights: ExtractorWeights = None,
    clip_weights: ClipWeights = None,
    prompts: ProtocolPrompts = None,
    allow_code: AllowCode = False,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as JSON.")] = False,
) -> None:
    """Run a row of the table again from its record, and hold the numbers against its intervals.

    Protocol, weights, reference, extractor, detector and prompts must have the hashes of the
    record. Nothing is written. (`dimo weights verify` checks files of weights.)
    """
    from bench.records.record import protocol_of
    from bench.records.store import find_record
    from bench.report.runs import verification_page

    found, _ = find_record(record, results)
    fixed = protocol_of(found, protocol)
    from bench.records.reproduce import compare_runs, repeat
    from bench.suites.base import Assets
    from dimo.engine.distributed import Runtime, choose_device

    with terminal.work_bar() as progress:
        again = repeat(
            found,
            fixed,
            Runtime(choose_device(device), progress=progress, warn=warn),
            Assets(
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
    verdict = compare_runs(found, again)
    if as_json:
        print(json.dumps(_verdict(found, verdict), indent=2))
    else:
        print(verification_page(found, verdict, level=fixed.uncertainty.level), end="")
    if not verdict.holds:
        raise typer.Exit(1)


def _verdict(record: "ResultRecord", found: "Verification") -> dict[str, Any]:
    from dimo.util.schema import encode

    return {
        "run_id": record.run_id,
        "within": found.holds,
        "equal": found.equal,
        "same_images": found.same_images,
        "metrics": {check.metric: encode(check) for check in found.checks},
        "different": encode(found.circumstances),
    }
