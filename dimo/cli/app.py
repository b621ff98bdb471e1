"""The Typer application that every command registers with."""

import ctypes
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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

    All ranks that `torchrun` started fail or are interrupted together.
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


class Command(TyperCommand):
    """A command that computes: it keeps the memory that it frees."""

    def invoke(self, ctx: Any) -> Any:
        keep_freed_memory()
        return super().invoke(ctx)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
_LARGEST_KEPT, _KEPT = 32 << 20, 1 << 30  # bytes; glibc takes no larger first one


def keep_freed_memory() -> None:
    """Lets the C library keep up to 1 GiB of freed memory, in blocks of up to 32 MiB.

    By default glibc returns a freed tensor's memory to the system and requests the next one's page
    by page, which costs a tenth of a training step on a CPU. Does nothing with another C library.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
