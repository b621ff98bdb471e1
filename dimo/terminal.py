"""What people see while they wait: progress bars, notes and errors, all on stderr."""

__all__ = ["error", "image_bar", "say", "training_bar"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def say(text: str, style: str = "cyan") -> None:
    """One line for people, on stderr; stdout is for data."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style=style))


@contextmanager
def _bar(unit: str) -> "Iterator[Progress]":
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
        TextColumn("{task.completed}/{task.total} " + unit),
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


@contextmanager
def training_bar(title: str, steps: int, batch_size: int) -> Iterator[Callable[..., None]]:
    """Shows steps, losses, images/s and ETA; yields the `on_step` of a training."""
    values = ""
    with _bar("steps") as progress:

        def on_step(step: int, scalars: dict[str, float]) -> None:
            nonlocal values
            if not progress.tasks:
                progress.start()
                progress.add_task(title, total=steps, completed=step, state="")
            if scalars:
                values = " ".join(f"{key} {value:.3f}" for key, value in scalars.items())
            speed = (progress.tasks[0].speed or 0.0) * batch_size
            task = progress.tasks[0].id
            progress.update(task, completed=step, state=f"{values} {speed:,.0f} images/s")

        yield on_step


@contextmanager
def image_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows images done and images/s of each row; yields the `progress` of a workbench."""
    with _bar("images") as progress:
        rows: dict[str, TaskID] = {}

        def on_batch(what: str, done: int, total: int) -> None:
            if what not in rows:
                progress.start()
                rows[what] = progress.add_task(what, total=total, state="")
            speed = progress.tasks[rows[what]].speed or 0.0
            progress.update(rows[what], completed=done, total=total, state=f"{speed:,.0f} images/s")

        yield on_batch


def error(text: str) -> None:
    """One line that begins with a red `error:`."""
    from rich.console import Console
    from rich.text import Text

    line = Text("error: ", style="bold red").append(text, style="default")
    Console(stderr=True, soft_wrap=True).print(line)
