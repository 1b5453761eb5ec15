"""Progress bars of `LLM`, on stderr and only on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

from freehold.serve.answers import ChatResult, Completion


@contextmanager
def loading_progress(*, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """Call the yielded function with (bytes done, bytes in all)."""
    with bar(enabled, DownloadColumn(), TransferSpeedColumn()) as shown:
        task = shown.add_task("loading", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def request_progress(
    description: str, count: int, *, enabled: bool
) -> Iterator[Callable[[Completion | ChatResult], None]]:
    """Call the yielded function with each result. One request has no bar."""
    tokens, started = 0, time.perf_counter()
    with bar(enabled and count > 1, MofNCompleteColumn(), TextColumn("{task.fields[rate]}")) as shown:
        task = shown.add_task(description, total=count, rate="")

        def advance(result: Completion | ChatResult) -> None:
            nonlocal tokens
            tokens += result.usage.completion_tokens
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            shown.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")

        yield advance


def bar(enabled: bool, *columns: ProgressColumn | Any) -> Progress:
    """A bar on stderr with these columns; none where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (enabled and console.is_terminal),
    )
