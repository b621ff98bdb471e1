"""The Typer application that every command registers with."""

__all__ = ["app", "is_first_rank", "protocols_app", "results_app", "weights_app"]

import os
from typing import Annotated

import typer

from dimo import __version__

app = typer.Typer(
    name="dimo",
    help="Benchmark for masked-diffusion image generators, with the Di[M]O one-step distiller.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
protocols_app = typer.Typer(no_args_is_help=True, help="Benchmarks and what each of them fixes.")
app.add_typer(protocols_app, name="protocols")
results_app = typer.Typer(no_args_is_help=True, help="Result records: list, show, differences.")
app.add_typer(results_app, name="results")
weights_app = typer.Typer(no_args_is_help=True, help="Official weight files of the networks.")
app.add_typer(weights_app, name="weights")


def is_first_rank() -> bool:
    """Whether this process speaks for its job, before its ranks are connected or after they ended.

    All ranks that `torchrun` started fail and are interrupted alike.
    """
    return os.environ.get("RANK", "0") == "0"


def _version(value: bool) -> None:
    if value:
        print(f"dimo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
