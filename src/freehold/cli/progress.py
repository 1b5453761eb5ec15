"""Progress bars, for commands that take a while. On stderr, and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Report = Callable[[int, int], None]


@contextmanager
def byte_progress(description: str) -> Iterator[Report]:
    """Within it, call the yielded function with (bytes done, bytes in all)."""
    with _bar(description, DownloadColumn(), TransferSpeedColumn()) as report:
        yield report


@contextmanager
def count_progress(description: str, unit: str) -> Iterator[Report]:
    """Within it, call the yielded function with (done, in all), counted in `unit`."""
    with _bar(description, MofNCompleteColumn(), TextColumn(unit)) as report:
        yield report


@contextmanager
def _bar(description: str, *columns: ProgressColumn) -> Iterator[Report]:
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
