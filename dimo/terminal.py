"""What people see while they wait: progress bars, notes and errors, all on stderr."""

__all__ = ["error", "image_bar", "say", "training_bar"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def say(text: str, style: str = "cyan") -> None:
    """One line for people, on stderr; stdout is for data."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style=style))


@contextmanager
def _bar(*columns: Any) -> "Iterator[Progress]":
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
        TextColumn("{task.completed}/{task.total}"),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*layout, console=Console(stderr=True)) as progress:
        yield progress


@contextmanager
def training_bar(
    title: str, steps: int, batch_size: int
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    from rich.progress import TextColumn

    with _bar(TextColumn("{task.fields[state]}")) as progress:
        task = progress.add_task(title, total=steps, state="")

        def on_log(step: int, scalars: dict[str, float]) -> None:
            speed = progress.tasks[task].speed or 0.0
            values = " ".join(f"{key} {value:.3f}" for key, value in scalars.items())
            progress.update(
                task, completed=step, state=f"{values} {speed * batch_size:,.0f} images/s"
            )

        yield on_log


@contextmanager
def image_bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.progress import TextColumn

    with _bar(TextColumn("{task.fields[rate]}")) as progress:
        tasks: dict[str, Any] = {}

        def on_batch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total, rate="")
            speed = progress.tasks[tasks[what]].speed or 0.0
            progress.update(tasks[what], completed=done, total=total, rate=f"{speed:,.0f} images/s")

        yield on_batch


def error(text: str) -> None:
    """One line that begins with a red `error:`."""
    from rich.console import Console
    from rich.text import Text

    line = Text("error: ", style="bold red").append(text, style="default")
    Console(stderr=True, soft_wrap=True).print(line)
