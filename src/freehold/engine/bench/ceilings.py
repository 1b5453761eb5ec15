"""What this machine can do: bytes read a second from memory, and FLOPs a second of a large matrix product.

Measured by code that is not the engine's, with as many threads, and the best of several runs: a ceiling is what the
machine reached once, not what it does on average.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from freehold.engine.loading import available_memory
from freehold.errors import InsufficientMemory
from freehold.model.traffic import Ceilings

_LEAST_BUFFER = 1 << 30
_RUNS = 10
_MATRIX = 2048  # rows and columns: 17 GFLOP a product, and its operands stay in the caches
_CPUS = Path("/sys/devices/system/cpu")


def last_level_cache() -> int:
    """Bytes of all last-level caches together; 0 if the system does not say."""
    sizes: dict[tuple[int, str], int] = {}
    for index in _CPUS.glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text()
            size = (index / "size").read_text().strip()
            sizes[level, shared] = int(size.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def buffer_bytes() -> int:
    """A size that no cache holds: more than four times the last-level caches, and at least 1 GiB."""
    return max(_LEAST_BUFFER, 5 * last_level_cache())


def measure_ceilings(threads: int, dtype: torch.dtype, num_bytes: int | None = None) -> Ceilings:
    """Measure with `threads` threads; dtype is that of the matrix product. num_bytes: default buffer_bytes().

    Raises InsufficientMemory if the buffer does not fit.
    """
    size = num_bytes if num_bytes is not None else buffer_bytes()
    if (available := available_memory()) < size + size // 4:
        raise InsufficientMemory(
            f"measuring the memory's bandwidth takes a buffer of {size:,} bytes, and {available:,} are available"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        buffer = torch.ones(size // 4, dtype=torch.float32)
        read = 4 * buffer.numel() / _best(buffer.sum)
        del buffer
        left, right = (torch.randn(_MATRIX, _MATRIX).to(dtype) for _ in range(2))
        return Ceilings(read, 2.0 * _MATRIX**3 / _best(lambda: left @ right))
    finally:
        torch.set_num_threads(before)


def _best(work: Callable[[], object]) -> float:
    """The least seconds of several runs, after one that is not counted."""
    seconds = []
    for _ in range(1 + _RUNS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
