"""Server processes to measure: start, wait until ready, cores, CPU time, memory, sockets, and an end for sure."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parent.parent


class Process:
    """A command with all the processes it starts. A context manager: leaving it ends them.

    cores: those it may run on. log: where stdout and stderr go; None: stdout can be read with `line`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cores: set[int] | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        stdin: bool = False,
    ) -> None:
        self.command, self.cores, self.env, self.log, self.stdin = list(command), cores, env, log, stdin
        self._buffer = b""
        self.ready_seconds = float("nan")  # from the start of the command

    def __enter__(self) -> Self:
        pin: Callable[[], None] | None = None
        if (cores := self.cores) is not None:
            pin = lambda: os.sched_setaffinity(0, cores)  # noqa: E731
        output = self.log.open("ab") if self.log is not None else subprocess.PIPE
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=dict(self.env) if self.env is not None else None,
            stdin=subprocess.PIPE if self.stdin else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if self.log is not None else subprocess.DEVNULL,
            preexec_fn=pin,
            start_new_session=True,
        )
        if self.log is not None:
            output.close()  # type: ignore[union-attr]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, seconds: float = 15.0) -> int:
        """Its exit code. What does not end in time is killed, with all it started."""
        family = self.pids()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self._kill(family)
        return self.process.wait()

    def kill(self) -> None:
        """As a crash would: at once, all of them."""
        self._kill(self.pids())
        self.process.wait()

    def _kill(self, family: Sequence[int]) -> None:
        for pid in family:
            try:
                if os.getpgid(pid) == self.process.pid or pid == self.process.pid:
                    os.kill(pid, 9)
            except ProcessLookupError:
                pass
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def line(self, seconds: float) -> str:
        """The next line of stdout. Raises RuntimeError if none comes."""
        assert self.process.stdout is not None
        descriptor, end = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            data = os.read(descriptor, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"{self.command[:4]} said nothing (exit code {self.process.poll()})")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def pids(self) -> list[int]:
        """It and all its descendants that live."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def cpu(self) -> float:
        """CPU seconds so far of it and its living descendants, all threads, in user and kernel mode."""
        total = 0.0
        for pid in self.pids():
            try:
                total += time.clock_gettime((~pid << 3) | 2)  # the kernel's id of that process's CPU clock
            except OSError:
                continue
        return total

    def rss(self) -> float:
        """Resident megabytes (1e6 bytes), of all of them; pages that they share count in each."""
        return sum(self._status(pid, "VmRSS") for pid in self.pids()) / 1000

    def _status(self, pid: int, name: str) -> float:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except FileNotFoundError:
            return 0.0
        return next((int(line.split()[1]) * 1.024 for line in lines if line.startswith(name + ":")), 0.0)

    def sockets(self) -> int:
        """Open sockets of all of them."""
        count = 0
        for pid in self.pids():
            for path in Path(f"/proc/{pid}/fd").glob("*"):
                try:
                    count += os.readlink(path).startswith("socket:")
                except OSError:
                    continue
        return count


def wait_until(condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.02) -> float:
    """Seconds it took. Raises RuntimeError with `what` if it does not come true."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise RuntimeError(f"in {seconds:g} s: {what}")
        time.sleep(pause)
    return time.monotonic() - start
