"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

__all__ = ["app", "main"]

import io
import sys
from contextlib import suppress

from dimo.cli import (  # noqa: F401
    bench,
    demo,
    distill,
    evaluate,
    report,
    sample,
    train,
    weights,
)
from dimo.cli.app import Command, app, protocols_app, results_app, weights_app
from dimo.errors import DimoError
from dimo.util import terminal

_ORDER = (  # of `dimo --help`: as a newcomer meets them
    *("demo", "sample", "bench", "report", "law", "distill", "eval", "compare", "verify"),
    *("train", "encode", "reference", "export", "import"),
)
for _group in (app, protocols_app, results_app, weights_app):
    for _command in _group.registered_commands:
        assert _command.callback is not None
        _command.name, _command.cls = _command.name or _command.callback.__name__, Command
app.registered_commands.sort(key=lambda command: _ORDER.index(command.name or ""))


def main() -> None:
    """Entry point: one red line and exit code 2 for bad input, no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # Latin-1 lacks letters and arrows of the tables
    try:
        with terminal.stopped_by_signals():
            app()
    except DimoError as error:
        # what all ranks raise alike is said once, what one of them finds by that one
        if terminal.is_first_rank() or not error.is_shared:
            terminal.error(str(error))
        sys.exit(2)
    except terminal.Stopped as stop:
        if terminal.is_first_rank():
            with suppress(OSError):  # the terminal may be gone
                terminal.warn(stop.reason)
        sys.exit(stop.code)
