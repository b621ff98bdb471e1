"""The Typer application that every command registers with."""

import ctypes
import re
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dimo import __version__
from dimo.util.files import at_home

_HOME = re.compile(r"([\w-]*=|)~(?=/|$)")  # at the start, or in NAME=~/x
_NAMES = 29  # widest name of an option that shares a line with its help


class _Help:
    """Help as plain text, with a section for each `rich_help_panel`.

    Typer's own needs rich, which takes most of the time of `dimo --help`, and cuts long names.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments, options and commands."""
        command: Any = self
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in command.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:  # hidden
                continue
            title = getattr(param, "rich_help_panel", None) or "Options"
            if param.param_type_name == "argument":
                title, record = "Arguments", (record[0].partition(" <")[0], record[1])
            sections.setdefault(title, []).append(record)
        commands = getattr(command, "commands", {}).values()
        sections["Commands"] = [
            (found.name, " ".join(found.help.split("\n\n")[0].split())) for found in commands
        ]
        rows = [row for section in sections.values() for row in section]
        width = min(max(len(name) for name, _ in rows), _NAMES)
        for title, section in sections.items():
            if section:
                _write_section(formatter, title, section, width)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the epilog as it is: a line that is too wide can still be copied."""
        command: Any = self
        if command.epilog:
            formatter.write(f"\n{command.epilog}\n")


def _write_section(formatter: Any, title: str, rows: list[tuple[str, str]], width: int) -> None:
    """Writes names of at most `width` beside their help; breaks no line inside `digits-dimo`."""
    formatter.write(f"\n{typer.style(title, bold=True)}:\n")
    for name, text in rows:
        if len(name) > width:
            formatter.write(f"  {name}\n")
            name = ""
        lines = textwrap.wrap(
            text, formatter.width - width - 4, break_long_words=False, break_on_hyphens=False
        )
        for line in lines or [""]:
            formatter.write(f"  {name:{width}}  {line}".rstrip() + "\n")
            name = ""


def examples(*lines: str) -> str:
    """The epilog of a command: complete command lines, one per line."""
    return "\n  ".join(["Examples:" if len(lines) > 1 else "Example:", *lines])


def _with_home(value: Any) -> Any:
    """The value of an option with `~/` for the home folder: no shell expands it in `--out=~/x`."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_home, value))
    if isinstance(value, (str, Path)) and (found := _HOME.match(str(value))):
        return type(value)(f"{found[1]}{at_home(str(value)[found.end(1) :])}")
    return value


class Command(_Help, TyperCommand):
    """A command; it keeps the memory that it frees, and knows the home folder in its options."""

    def invoke(self, ctx: Any) -> Any:
        ctx.params = {name: _with_home(value) for name, value in ctx.params.items()}
        keep_freed_memory()
        return super().invoke(ctx)


class _Group(_Help, TyperGroup):
    pass


def _typer(text: str, **settings: Any) -> typer.Typer:
    return typer.Typer(
        cls=_Group, help=text, no_args_is_help=True, rich_markup_mode=None, **settings
    )


app = _typer(
    "Benchmark for masked-diffusion image generators, with the Di[M]O one-step distiller.",
    name="dimo",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
protocols_app = _typer("Benchmarks and what each of them fixes.", name="protocols")
results_app = _typer("Result records: list, show, differences.", name="results")
weights_app = _typer("Official weight files of the networks.", name="weights")
for _group in (protocols_app, results_app, weights_app):
    app.add_typer(_group)


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
