"""The saved state of one llama.cpp sequence, enlarged: a deep context without its prefill.

Layout, little-endian: u32 magic, i32 sequence (llama.cpp, `llama_context::state_seq_get_data`), and then twice, for the
latents and for the index keys (`llama_kv_cache::state_write`):

    u32 streams (1)   u32 cells   cells x (i32 position, u32 1, i32 sequence)
    u32 values transposed?   u32 layers   layers x (i32 type, u64 bytes of a row, cells x row)

There are no values: attention reads them out of the latents. Whatever does not look like this is an error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_F16 = 1  # GGML_TYPE_F16
_CACHES = 2
_HEADER = 8

Bytes = NDArray[np.uint8]


def grow(state: Bytes, cells: int, seed: int) -> Bytes:
    """A state of `cells` cells at positions 0.. with random rows: each number of a row is normal, with the mean and
    spread it has in `state`, which should come from a real prefill of some hundred tokens."""
    random = np.random.default_rng(seed)
    reader, caches = _Reader(state), 0
    parts = [reader.take(_HEADER)]
    while reader.left:
        parts += _grow_cache(reader, cells, random)
        caches += 1
    if caches != _CACHES:
        raise ValueError(f"the state has {caches} caches, not {_CACHES}: its layout is not the expected one")
    return np.concatenate(parts)


class _Reader:
    def __init__(self, state: Bytes) -> None:
        self._state, self._at = state, 0

    @property
    def left(self) -> int:
        return len(self._state) - self._at

    def take(self, size: int) -> Bytes:
        if size > self.left:
            raise ValueError(f"the state ends {size - self.left} bytes early: its layout is not the expected one")
        self._at += size
        return self._state[self._at - size : self._at]

    def number(self, dtype: type[np.generic]) -> int:
        return int(self.take(np.dtype(dtype).itemsize).view(dtype)[0])


def _bytes(values: NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _grow_cache(reader: _Reader, cells: int, random: np.random.Generator) -> list[Bytes]:
    streams, count = reader.number(np.uint32), reader.number(np.uint32)
    meta = reader.take(12 * count).view(np.int32).reshape(count, 3)
    if streams != 1 or not (meta[:, 0] == np.arange(count)).all() or not (meta[:, 1] == 1).all():
        raise ValueError("the cells are not one sequence's, in order")
    grown = np.empty((cells, 3), np.int32)
    grown[:, 0], grown[:, 1], grown[:, 2] = np.arange(cells), 1, meta[0, 2]
    transposed, layers = reader.number(np.uint32), reader.number(np.uint32)
    parts = [_bytes(np.array([1, cells], np.uint32)), _bytes(grown), _bytes(np.array([transposed, layers], np.uint32))]
    for _ in range(layers):
        kind, row = reader.number(np.int32), reader.number(np.uint64)
        if kind != _F16:
            raise ValueError(f"a cache of type {kind}, not f16")
        values = reader.take(count * row).view(np.float16).reshape(count, row // 2).astype(np.float32)
        rows = random.standard_normal((cells, row // 2), np.float32) * values.std(0) + values.mean(0)
        parts += [_bytes(np.array([kind], np.int32)), _bytes(np.array([row], np.uint64))]
        parts.append(_bytes(rows.astype(np.float16)))
    return parts
