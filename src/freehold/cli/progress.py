"""Progress bars, for commands that take a while. On stderr, and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import DownloadColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TransferSpeedColumn

from freehold.serve.progress import bar

Report = Callable[[int, int], None]


@contextmanager
def byte_progress(description: str) -> Iterator[Report]:
    """Within it, call the yielded function with (bytes done, bytes in all)."""
    with _counting(description, DownloadColumn(), TransferSpeedColumn()) as report:
        yield report


@contextmanager
def count_progress(description: str, unit: str) -> Iterator[Report]:
    """Within it, call the yielded function with (done, in all), counted in `unit`."""
    with _counting(description, MofNCompleteColumn(), TextColumn(unit)) as report:
        yield report


@contextmanager
def _counting(description: str, *columns: ProgressColumn) -> Iterator[Report]:
    with bar(True, *columns) as shown:
        task = shown.add_task(description, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
