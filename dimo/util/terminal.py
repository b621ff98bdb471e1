"""Progress bars, notes and errors, all on stderr; stdout is for data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def say(text: str, style: str = "cyan") -> None:
    """One line for people, on stderr; stdout is for data."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style=style))


def warn(text: str) -> None:
    """One yellow line for people, on stderr."""
    say(text, style="yellow")


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
