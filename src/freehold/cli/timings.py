"""Where the time of a start goes, part by part: `freehold serve --timings`."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class StartClock:
    """Marks the ends of parts. The first begins with the process."""

    last: float = field(default_factory=lambda: process_start())
    parts: list[tuple[str, float]] = field(default_factory=list)

    def mark(self, part: str) -> None:
        """What passed since the last mark was this part."""
        now = _now()
        self.parts.append((part, max(0.0, now - self.last)))
        self.last = now

    def lines(self) -> list[str]:
        """Seconds by part, and the most memory that was resident, the pages of mapped files included."""
        width = max(len(part) for part, _ in self.parts)
        total = sum(seconds for _, seconds in self.parts)
        lines = [f"  {part:{width}}  {seconds:7.2f} s" for part, seconds in self.parts]
        return [f"start: {total:.2f} s to the first token, at most {most_resident() / 1e6:,.0f} MB resident", *lines]


def most_resident() -> int:
    """Bytes of memory that were resident at most. (`getrusage` would also count what the parent had when it forked.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = dict(line.partition(":")[::2] for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def process_start() -> float:
    """When this process began, in seconds since the machine did; now, where the system does not say."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return _now()
    after_name = stat.read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
