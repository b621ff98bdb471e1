"""What people see while they wait: progress bars, notes and errors, all on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_LOG_EVERY = 60.0  # seconds between the lines that a log gets in place of a bar

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


@contextmanager
def _bar() -> "Iterator[RichProgress]":
    """A progress display that appears with its first task, so that an early error stands alone."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    layout = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*layout, console=Console(stderr=True), speed_estimate_period=60)
    try:
        yield progress
    finally:
        if progress.live.is_started:
            progress.stop()


class _Log:
    """Where stderr is no terminal, a line now and then, which a batch system's log keeps."""

    def __init__(self, progress: "RichProgress") -> None:
        self._progress, self._last = progress, time.monotonic()

    def tell(self, number: "TaskID") -> None:
        """Of one task, if it is time for a line."""
        console, now = self._progress.console, time.monotonic()
        if console.is_terminal or now - self._last < _LOG_EVERY:
            return
        self._last = now
        task = self._progress.tasks[number]
        left = "" if task.time_remaining is None else f", {task.time_remaining / 60:,.0f} min left"
        done = f"{task.completed:,.0f}/{task.total:,.0f} {task.fields['unit']}"
        console.print(f"{task.description}: {done} {task.fields['state']}{left}", soft_wrap=True)


@contextmanager
def training_bar(title: str, steps: int, batch_size: int) -> Iterator[Callable[..., None]]:
    """Shows steps, losses, images/s and ETA; yields the `on_step` of a training."""
    values = ""
    with _bar() as progress:
        log = _Log(progress)

        def on_step(step: int, scalars: dict[str, float]) -> None:
            nonlocal values
            if not progress.tasks:
                progress.start()
                progress.add_task(title, total=steps, completed=step, state="", unit="steps")
            if scalars:
                values = " ".join(f"{key} {value:.3f}" for key, value in scalars.items())
            speed = (progress.tasks[0].speed or 0.0) * batch_size
            task = progress.tasks[0].id
            progress.update(task, completed=step, state=f"{values} {speed:,.0f} images/s")
            log.tell(task)

        yield on_step


@contextmanager
def work_bar() -> Iterator[Callable[[str, int, int, str], None]]:
    """A line for each thing under way, with rate and ETA; yields the `progress` of a workbench."""
    with _bar() as progress:
        lines: dict[str, TaskID] = {}
        log = _Log(progress)

        def on_progress(what: str, done: int, total: int, unit: str) -> None:
            if what not in lines:
                progress.start()
                lines[what] = progress.add_task(what, total=total, state="", unit=unit)
            speed = progress.tasks[lines[what]].speed
            state = f"{speed:,.0f} {unit}/s" if speed and unit == "images" else ""
            progress.update(lines[what], completed=done, total=total, state=state)
            log.tell(lines[what])

        yield on_progress


@contextmanager
def download_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A line for each file under way, with bytes, rate and ETA; yields `progress` of a fetch."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    layout = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*layout, console=Console(stderr=True))
    lines: dict[str, TaskID] = {}

    def on_progress(name: str, done: int, total: int | None) -> None:
        if name not in lines:  # the display appears with the first byte
            progress.start()
            lines[name] = progress.add_task(name, total=total, completed=done)
        progress.update(lines[name], completed=done, total=total)

    try:
        yield on_progress
    finally:
        if progress.live.is_started:
            progress.stop()


def error(text: str) -> None:
    """One line that begins with a red `error:`."""
    from rich.console import Console
    from rich.text import Text

    line = Text("error: ", style="bold red").append(text, style="default")
    Console(stderr=True, soft_wrap=True).print(line)
