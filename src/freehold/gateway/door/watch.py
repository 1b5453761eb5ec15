"""Interrupts what a call waits for: at a deadline that moves with each chunk, when its client goes, or at the end of a
drain. One timer a call, which is armed again only when it fires: moving the deadline is an assignment."""

from __future__ import annotations

import asyncio
from typing import Literal, TypeAlias

Reason: TypeAlias = Literal["timeout", "client_gone", "stopping"]


class Watch:
    """Over the current task. `why` says who interrupted it, once `asyncio.CancelledError` came up:

        except asyncio.CancelledError:
            if not watch.caught():
                raise

    step: the shortest time, in seconds, that `until` will ever be given ahead of now.
    """

    __slots__ = ("_handle", "_loop", "_step", "_task", "_until", "why")

    def __init__(self, step: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._step = step
        self._until = self._loop.time() + step
        self._handle = self._loop.call_at(self._until, self._tick)
        self.why: Reason | None = None

    def now(self) -> float:
        return self._loop.time()

    def until(self, deadline: float) -> None:
        """From now on, this is when it times out (the event loop's clock)."""
        self._until = deadline

    def interrupt(self, why: Reason) -> None:
        """Raise CancelledError in the task, the first time only."""
        if self.why is None:
            self.why = why
            self._handle.cancel()
            self._task.cancel()

    def caught(self) -> bool:
        """Whether the cancellation that came up is this watch's; if so it has been dealt with."""
        return self.why is not None and self._task.uncancel() == 0

    def close(self) -> None:
        self._handle.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        if now >= self._until:
            self.interrupt("timeout")
        else:
            self._handle = self._loop.call_at(min(self._until, now + self._step), self._tick)
