"""Whether a process got the CPU when it wanted it: what it was kept from doing, it could not do in time.

A test that kills a process and asks what it had done by a deadline says nothing about it where the machine did not let
it run. The kernel knows: `/proc/PID/task/TID/schedstat` has how long a thread ran, and how long it waited for a core
though it could have run. Elsewhere than on Linux nothing is known, and nothing passes for starved.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

WINDOW_SECONDS = 0.2
STARVED_SECONDS = 0.05  # of a window; less is what any machine does to a process now and then
EVERY_SECONDS = 0.01


class _Thread:
    """What is known of a thread: how long it had waited, by time of the look; since when it waits now."""

    def __init__(self) -> None:
        self.looks: deque[tuple[float, float]] = deque()
        self.ran = -1
        self.since = 0.0

    def waited(self, now: float, ran: int, waited: float, runnable: bool) -> float:
        """Seconds, of the last window."""
        # One that waits right now has that in its account only when it runs again.
        if not runnable or ran != self.ran:
            self.ran, self.since = ran, now
        self.looks.append((now, waited))
        while len(self.looks) > 1 and self.looks[1][0] <= now - WINDOW_SECONDS:
            self.looks.popleft()
        return waited - self.looks[0][1] + (now - self.since)


class Attention:
    """Watches all threads of a process. most: the longest that one of them, or the watcher, waited in a window.

    watcher: whether it counts when `look` comes late: not where the watcher has other work to do.
    """

    def __init__(self, pid: int, *, watcher: bool = True) -> None:
        self.most = 0.0
        self._watcher = watcher
        self._tasks = Path(f"/proc/{pid}/task")
        self._threads: dict[str, _Thread] = {}
        self._last = time.monotonic()

    @property
    def starved(self) -> bool:
        return self.most > STARVED_SECONDS

    def look(self) -> None:
        """Every `EVERY_SECONDS`: a watcher who comes late was kept from running too."""
        now = time.monotonic()
        if self._watcher:
            self.most = max(self.most, now - self._last - EVERY_SECONDS)
        self._last = now
        for task in self._tasks.glob("[0-9]*"):
            try:
                ran, waited, _ = map(int, (task / "schedstat").read_text().split())
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, ValueError):
                continue  # it has ended, or the kernel does not say
            thread = self._threads.setdefault(task.name, _Thread())
            self.most = max(self.most, thread.waited(now, ran, waited / 1e9, state == "R"))

    def sleep(self, seconds: float) -> None:
        """Watch for so long."""
        self._last = time.monotonic()
        end = self._last + seconds
        while (left := end - time.monotonic()) > 0:
            self.look()
            time.sleep(min(left, EVERY_SECONDS))
        self.look()
