"""What this machine can do: bytes read a second from memory, and FLOPs a second of a large matrix product.

Measured by code that is not the engine's, with as many threads. Short pieces of work, each at its best of several runs:
on a machine that also does something else, a long one would never be left alone.
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
_PIECES = 16  # of the buffer, timed one by one: between two readings of a piece all the others go through the caches
_PASSES = 8
_MATRIX = 1024  # rows and columns: 2 GFLOP a product, and its operands stay in the caches
_PRODUCTS = 40
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
    """Measure with up to `threads` threads; dtype is that of the product. num_bytes: default buffer_bytes().

    Raises InsufficientMemory if the buffer does not fit.
    """
    size = num_bytes if num_bytes is not None else buffer_bytes()
    if (available := available_memory()) < size + size // 4:
        raise InsufficientMemory(
            f"measuring the memory's bandwidth takes a buffer of {size:,} bytes, and {available:,} are available"
        )
    before = torch.get_num_threads()
    # With one thread as well: where others compete for the cores, several threads wait for each other.
    try:
        found = [_measure(count, dtype, size) for count in sorted({1, threads})]
    finally:
        torch.set_num_threads(before)
    return Ceilings(max(each.bytes_per_second for each in found), max(each.flops_per_second for each in found))


def _measure(threads: int, dtype: torch.dtype, size: int) -> Ceilings:
    torch.set_num_threads(threads)
    buffer = torch.ones(size // 4, dtype=torch.float32)
    pieces = torch.split(buffer, -(-buffer.numel() // _PIECES))
    passes = [[_seconds(piece.sum) for piece in pieces] for _ in range(1 + _PASSES)][1:]
    read = 4 * buffer.numel() / sum(map(min, zip(*passes, strict=True)))
    left, right = (torch.randn(_MATRIX, _MATRIX).to(dtype) for _ in range(2))
    products = [_seconds(lambda: left @ right) for _ in range(1 + _PRODUCTS)][1:]
    return Ceilings(read, 2.0 * _MATRIX**3 / min(products))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
