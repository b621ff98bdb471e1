"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

__all__ = ["app", "main"]

import sys

from dimo.cli import bench, demo, evaluate, report, sample, train, weights  # noqa: F401
from dimo.cli.app import Command, app, is_first_rank
from dimo.errors import DimoError
from dimo.util import terminal

for _command in app.registered_commands:  # not those of the groups: protocols, results, weights
    _command.cls = Command


def main() -> None:
    """Entry point: one red line and exit code 2 for bad input, no traceback."""
    try:
        app()
    except DimoError as error:
        if is_first_rank():
            terminal.error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        note = "interrupted; rerun with --resume to continue a run, rerun a fetch to continue it"
        terminal.say(note, style="yellow")
        sys.exit(130)
