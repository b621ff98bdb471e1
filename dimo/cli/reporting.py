"""`dimo report`, `dimo protocols`: what reads results and protocols, without heavy imports."""

__all__ = ["measured_table", "report", "report_text"]

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dimo import terminal
from dimo.cli.app import app, protocols_app
from dimo.cli.options import Results
from dimo.errors import DimoError, unknown_name

if TYPE_CHECKING:
    from bench.protocol import Protocol
    from bench.record import ResultRecord
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
    from bench.paths import data_dir
    from bench.protocol import list_protocols, load_protocol
    from bench.report import collect_report, load_published, with_records
    from bench.store import load_all

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
        from bench.report.page import render_page

        with terminal.work_bar() as progress:
            return render_page(found, runs=runs, progress=progress)
    from bench.report import report_csv, report_json, report_latex, report_markdown

    written = {"latex": report_latex, "csv": report_csv, "json": report_json}
    return written.get(name, report_markdown)(found)


def _put(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    from dimo.files import write_atomic

    write_atomic(out, text)
    terminal.say(f"report: {out}")


def _updated(page: Path, results: Path) -> list[str]:
    """Renews the tables of a page; returns the files of results that were left out."""
    from bench.report import section_markdown
    from bench.report.update import renewed
    from dimo.files import write_atomic

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
