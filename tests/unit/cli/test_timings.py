"""The parts of a start."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from freehold.cli import timings
from freehold.cli.timings import StartClock, most_resident


def test_parts_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StartClock(last=100.0)
    for now, part in ((100.5, "imports"), (102.0, "weights: mapped, packed")):
        monkeypatch.setattr(timings, "_now", lambda now=now: now)
        clock.mark(part)
    first, *parts = clock.lines()
    assert re.fullmatch(r"start: 2\.00 s to the first token, at most [\d,]+ MB resident", first)
    assert parts == ["  imports                     0.50 s", "  weights: mapped, packed     1.50 s"]


def test_it_begins_with_the_process() -> None:
    code = (
        "import time; time.sleep(0.3); from freehold.cli.timings import StartClock\n"
        "clock = StartClock(); clock.mark('x'); print(clock.parts)"
    )
    started = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds = float(re.findall(r"[\d.]+", printed)[-1])
    assert 0.29 < seconds <= time.monotonic() - started + 0.02


def test_memory_is_the_processs_own() -> None:
    held = bytearray(300_000_000)
    assert most_resident() > len(held)
    code = "from freehold.cli.timings import most_resident; print(most_resident())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 1e6 < int(printed) < len(held)
