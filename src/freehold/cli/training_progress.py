"""What a run shows while it trains: a bar on a terminal, a line now and then elsewhere. Both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.progress import MofNCompleteColumn, TextColumn

from freehold.serve.progress import bar

if TYPE_CHECKING:
    from freehold.train.loop import StepReport

_LINE_SECONDS = 30.0  # between lines where there is no terminal
_RECENT = 0.95  # of the exponential means of loss and speed


@contextmanager
def training_progress(name: str) -> Iterator[Callable[[StepReport], None]]:
    """Call the yielded function with the report of each step."""
    tokens = seconds = loss = weight = 0.0
    shown_at = 0.0
    terminal = sys.stderr.isatty()
    with bar(terminal, MofNCompleteColumn(), TextColumn("{task.fields[state]}")) as shown:
        task = shown.add_task(name, total=None, state="")

        def report(made: StepReport) -> None:
            nonlocal tokens, seconds, loss, weight, shown_at
            tokens, seconds = _RECENT * tokens + made.tokens, _RECENT * seconds + made.seconds
            loss, weight = _RECENT * loss + made.loss, _RECENT * weight + 1
            state = f"loss {loss / weight:.3f}  {tokens / max(seconds, 1e-9):,.0f} tokens/s"
            shown.update(task, completed=made.step, total=made.steps, state=state)
            if not terminal and (time.monotonic() - shown_at > _LINE_SECONDS or made.step == made.steps):
                shown_at = time.monotonic()
                left = timedelta(seconds=round((made.steps - made.step) * seconds / weight))
                print(f"{name}: step {made.step:,}/{made.steps:,}  {state}  {left} left", file=sys.stderr, flush=True)

        yield report
