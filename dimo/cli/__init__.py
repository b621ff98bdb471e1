"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

__all__ = ["app", "main"]

import io
import sys

from dimo.cli import bench, demo, evaluate, report, sample, train, weights  # noqa: F401
from dimo.cli.app import Command, app, is_first_rank, protocols_app, results_app, weights_app
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
        app()
    except DimoError as error:
        if is_first_rank():
            terminal.error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        note = "interrupted; the same command continues a run, an export or a fetch"
        terminal.warn(note)
        sys.exit(130)
