"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

__all__ = ["app", "main"]

import sys

from dimo.cli import bench, evaluate, report, sample, train, weights  # noqa: F401
from dimo.cli.app import app, is_first_rank, keep_freed_memory
from dimo.errors import DimoError
from dimo.util import terminal


def main() -> None:
    """Entry point: one red line and exit code 2 for bad input, no traceback."""
    keep_freed_memory()
    try:
        app()
    except DimoError as error:
        if is_first_rank():
            terminal.error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        note = "interrupted; a training continues with --resume, a fetch when it is run again"
        terminal.say(note, style="yellow")
        sys.exit(130)
