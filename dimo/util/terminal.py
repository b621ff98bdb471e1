"""Progress bars, notes and errors, all on stderr, as stdout is for data; and signals to stop."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, TaskID

_LOG_EVERY = 60.0  # seconds between lines in a log, which has no bars
_BAR, _TIMES = 12, 16  # columns of a bar, and of the time left with the gaps

Progress = Callable[[str, int, int, str], None]  # what, done, total, unit


def quiet(what: str, done: int, total: int, unit: str) -> None:
    """A `Progress` that shows nothing."""


def ignore(text: str) -> None:
    """A sink for one-line warnings that shows nothing."""


def is_terminal() -> bool:
    """Whether stdout is one, and not a file or a pipe."""
    return sys.stdout.isatty()


def say(text: str, style: str = "cyan") -> None:
    """One line for people, on stderr; stdout is for data."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style=style))


def warn(text: str) -> None:
    """One yellow line for people, on stderr."""
    say(text, style="yellow")


def is_launched() -> bool:
    """Whether `torchrun` or `accelerate launch` started this process as one of its ranks.

    Other launchers, or a shell, may have left some of these variables: then there are no ranks.
    """
    needed = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK")
    return all(name in os.environ for name in (*needed, "RANK"))


def is_first_rank() -> bool:
    """Whether this process speaks for its job, before its ranks are connected or after they ended.

    All ranks that `torchrun` started are interrupted together.
    """
    return not is_launched() or os.environ["RANK"] == "0"


class Stopped(SystemExit):
    """A signal ended the command; its exit code is 128 plus the signal's number, as in a shell."""

    def __init__(self, number: int, note: str = "run the same command again") -> None:
        super().__init__(128 + number)
        self.reason = f"stopped by {signal.Signals(number).name}: {note}"


class _Signals:
    """The signal that this process was told to stop by, and what is done about it."""

    number, since = 0, 0.0  # 0: none was received
    loops = 0  # open `signals_wait`
    is_raised = False

    def receive(self, number: int, _: object) -> None:
        """Stops at once, or leaves it to a loop; another signal a second later ends the process.

        A launcher passes on what the terminal has sent to all, which counts as one signal.
        """
        now = time.monotonic()
        if self.number:
            if now - self.since > 1:
                os._exit(128 + number)
            return
        self.number, self.since = number, now
        if not self.loops:
            self.is_raised = True
            raise Stopped(number)
        if is_first_rank():
            with suppress(OSError):  # not through Python's stream, which may be in use
                os.write(2, b"\nsaving, then stopping; another signal ends this at once\n")


_signals = _Signals()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within it SIGINT, SIGTERM, SIGUSR1 and SIGHUP raise `Stopped`, see `signals_wait`.

    That may be in the middle of an import or a finalizer, which make another exception of it: it
    is `Stopped` here again. Ignored signals (`nohup`, a shell's background job) stay ignored.
    """
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ignored = (signal.SIG_IGN, None)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in ignored}
    if threading.current_thread() is not threading.main_thread():
        before = {}  # only the main thread may have handlers
    for number in before:
        signal.signal(number, _signals.receive)
    try:
        yield
    except BaseException as error:
        if _signals.is_raised and not isinstance(error, Stopped):
            raise Stopped(_signals.number) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        vars(_signals).clear()


@contextmanager
def signals_wait() -> Iterator[None]:
    """Around a loop that looks at `asked_to_stop` after each step, when nothing would be lost."""
    _signals.loops += 1
    try:
        yield
    finally:
        _signals.loops -= 1


def asked_to_stop() -> int:
    """The number of the signal that was received; 0: none."""
    return _signals.number


def stop_if_asked(note: str) -> None:
    """Raises `Stopped` if a signal was received; `note` says how to continue."""
    if _signals.number:
        raise Stopped(_signals.number, note)


class _Bars:
    """A line for each task; none before the first update, so that an early error stands alone.

    If stderr is not a terminal, one line per minute is printed instead, for logs of batch systems.
    The default columns are a count and a note, which is cut where the terminal ends.
    """

    def __init__(self, *columns: "ProgressColumn") -> None:
        from rich import progress as rich
        from rich.console import Console

        text = rich.TextColumn
        count = text("{task.completed}/{task.total} {task.fields[unit]}")
        columns = columns or (count, text("{task.fields[state]}"))
        layout = (text("{task.description}"), rich.BarColumn(bar_width=_BAR), *columns)
        layout += (text("left"), rich.TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = rich.Progress(*layout, console=console, speed_estimate_period=60)
        self._lines: dict[str, TaskID] = {}
        self._last = time.monotonic()

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def update(self, what: str, done: int, total: int | None, unit: str, note: str = "") -> None:
        """Shows that `done` of `total` are done."""
        if what not in self._lines:
            self._progress.start()
            self._lines[what] = self._progress.add_task(
                what, total=total, completed=done, state="", unit=unit
            )
        longest, width = max(map(len, self._lines)), self._progress.console.width
        room = width - longest - _BAR - len(f"{total}/{total} {unit}") - _TIMES
        short = note if len(note) <= room else note[: max(0, room - 1)] + "…"
        self._progress.update(self._lines[what], completed=done, total=total, state=short)
        self._log(what, note)

    def speed(self, what: str) -> float:
        """Steps per second."""
        known = what in self._lines
        return (self._progress.tasks[self._lines[what]].speed or 0.0) if known else 0.0

    def _log(self, what: str, note: str) -> None:
        console, now = self._progress.console, time.monotonic()
        if console.is_terminal or now - self._last < _LOG_EVERY:
            return
        self._last = now
        task = self._progress.tasks[self._lines[what]]
        left = "" if task.time_remaining is None else f", {task.time_remaining / 60:,.0f} min left"
        total = "?" if task.total is None else f"{task.total:,.0f}"
        done = f"{task.completed:,.0f}/{total} {task.fields['unit']}"
        console.print(f"{what}: {done} {note}{left}", soft_wrap=True)


@contextmanager
def training_bar(title: str, steps: int, batch_size: int) -> Iterator[Callable[..., None]]:
    """Shows steps, losses, images/s and the time left; yields the `on_step` of a run."""
    values = ""
    with _Bars() as bars:

        def on_step(step: int, scalars: dict[str, float]) -> None:
            nonlocal values
            if scalars:
                values = " ".join(f"{key} {value:.3f}" for key, value in scalars.items())
            note = f"{bars.speed(title) * batch_size:,.0f} images/s {values}"
            bars.update(title, step, steps, "steps", note)

        yield on_step


@contextmanager
def work_bar() -> Iterator[Progress]:
    """Shows a line for each task, with rate and time left; yields a `Progress`."""
    with _Bars() as bars:

        def on_progress(what: str, done: int, total: int, unit: str) -> None:
            speed = bars.speed(what) if unit == "images" else 0
            bars.update(what, done, total, unit, f"{speed:,.0f} images/s" if speed else "")

        yield on_progress


@contextmanager
def download_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows bytes, rate and time left of each file; yields the `progress` of a fetch."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _Bars(DownloadColumn(), TransferSpeedColumn()) as bars:
        yield lambda name, done, total: bars.update(name, done, total, "bytes")


def error(text: str) -> None:
    """One line that begins with a red `error:`."""
    from rich.console import Console
    from rich.text import Text

    line = Text("error: ", style="bold red").append(text, style="default")
    Console(stderr=True, soft_wrap=True).print(line)
