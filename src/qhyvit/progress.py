"""Progress bars with time left, on standard error and only where a person is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def task(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show one bar; yields `advance(steps)`.

    Args:
        description: what is being done, a few words.
        total: number of steps in all.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(bar, steps)
