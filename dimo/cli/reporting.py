"""`dimo report`, `dimo protocols`: what reads results and protocols, without heavy imports."""

__all__ = ["measured_table", "report", "report_text"]

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dimo import terminal
from dimo.cli.app import app, protocols_app
from dimo.cli.options import Results

if TYPE_CHECKING:
    from bench.protocol import Protocol
    from bench.record import ResultRecord


@app.command(
    epilog="Examples: `dimo report` · `dimo report --results runs/demo/results --out table.md`"
)
def report(
    protocol: Annotated[str, typer.Option(help="Protocol name or file.")] = "digits",
    results: Results = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
) -> None:
    """Print the paper's tables in Markdown: measured rows, and quoted rows apart from them."""
    text = report_text(protocol, results)
    if out is None:
        print(text)
    else:
        from dimo.files import write_atomic

        write_atomic(out, text)
        terminal.say(f"report: {out}")


def report_text(protocol_name: str, results: Path) -> str:
    from bench.paths import data_dir
    from bench.protocol import load_protocol
    from bench.report import load_published, report_markdown
    from bench.store import load_all

    records, problems = load_all(results)
    for problem in problems:
        terminal.say(problem, style="yellow")
    published = load_published(data_dir("published") / "published.csv")
    return report_markdown(records, problems, published, protocol=load_protocol(protocol_name))


def measured_table(records: "list[ResultRecord]", protocol: "Protocol") -> str:
    from bench.report import report_markdown

    return report_markdown(records, [], [], protocol=protocol)


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
