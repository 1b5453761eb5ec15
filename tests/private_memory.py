"""How much private memory a piece of work takes at most. For scripts in a process of their own."""

from __future__ import annotations

import threading
import time
from typing import Self

import torch


def anonymous() -> int:
    """Bytes of private memory of this process that are in RAM."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Peak:
    """While it is entered, `bytes` becomes the largest growth of private memory that a sample saw."""

    def __enter__(self) -> Self:
        torch.set_num_threads(1)
        (torch.ones(4, 4) / 3).round_()  # what torch takes for itself
        torch.zeros(4, dtype=torch.bfloat16) @ torch.zeros(4, 4, dtype=torch.bfloat16)
        self.bytes, self._start, self._running = 0, anonymous(), True
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while self._running:
            self.bytes = max(self.bytes, anonymous() - self._start)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
