"""A bounded number of routed experts in memory: which stay, which are read next, and from where the kernels take them.

Memory is one block of slots, each as large as an expert's record in the file. The kernels find experts by a table of
addresses and count the rows they send to each; only when one is missing do they call `fetch` here, from inside a step.

What goes when a slot is needed: the expert that the fewest rows were sent to, with counts that fade over some hundred
tokens. Counts do not forget under a prompt, which sends rows to nearly every expert of every layer in turn and would
push all that was learned out of a least-recently-used list; they learn from it. Among equals goes the expert whose
layer comes round last. Torch-free.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freehold.errors import InsufficientMemory
from freehold.model.expert_file import ExpertFile, Layout

logger = logging.getLogger(__name__)

_READERS = 4  # threads that read; a disk wants several requests at once
_HALF_LIFE = 2048  # rows of a layer after which a count weighs half: some hundred tokens
_REPORT_SECONDS = 10.0  # between two lines of the log
_MANY = 0.75  # of a layer's experts: a step that needs so many is a prompt, and the next layer will need as many


class _Place(ctypes.Structure):
    """`Place` of native/matrix.h."""

    _fields_ = (("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p))


_IDS = ctypes.POINTER(ctypes.c_int64)
_FETCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, _IDS, ctypes.c_int64)
_AHEAD = ctypes.CFUNCTYPE(None, ctypes.c_int64, _IDS, ctypes.c_int64)


class _Paged(ctypes.Structure):
    """`Paged` of native/matrix.h."""

    _fields_ = (
        ("places", ctypes.c_void_p), ("uses", ctypes.c_void_p), ("stack", ctypes.c_int64), ("fetch", _FETCH),
        ("ahead", _AHEAD),
    )  # fmt: skip


@dataclass(slots=True)
class PagingStats:
    """Totals since the start. reads: experts read; ahead: those of them read before they were asked for; wasted: those
    of these that went again unused. wait_seconds: how long steps stood still for reads."""

    reads: int = 0
    read_bytes: int = 0
    ahead: int = 0
    wasted: int = 0
    wait_seconds: float = 0.0


@dataclass(slots=True)
class _Shelf:
    """The slots of one size. Memory cannot move between sizes: giving it back and taking it anew, page by page, would
    halve the rate of reading."""

    slots: int
    free: list[int] = field(default_factory=list)
    first: int = 0


def _shelves(sizes: Sequence[int], experts: int, budget: int) -> dict[int, _Shelf]:
    """How many slots of each size `budget` bytes give: those of one layer, and of the rest in proportion to the bytes
    that layers of this size have. sizes: of each layer's records."""
    least = dict.fromkeys(sizes, experts)
    spare = budget - sum(size * count for size, count in least.items())
    if spare < 0:
        raise InsufficientMemory(
            f"--expert-memory of {budget:,} bytes is too little: a step may need all {experts} experts of a layer, "
            f"which are {budget - spare:,} bytes; give it at least those"
        )
    more = {size: (sizes.count(size) - 1) * experts for size in sizes}
    wanted = sum(size * count for size, count in more.items())
    share = min(1.0, spare / wanted) if wanted else 0.0
    return {size: _Shelf(least[size] + int(more[size] * share)) for size in least}


def check_budget(layout: Layout, budget: int) -> None:
    """Raises InsufficientMemory, with what is needed, for a budget that does not hold the experts of one layer."""
    _shelves([layout.record_bytes(layer) for layer in range(len(layout.layers))], layout.experts, budget)


class ExpertPager:
    """budget: bytes for experts, those of at least one layer. stages: how many of the file's layers a step runs
    through in turn, from the first (an MTP layer comes after these and is not read ahead for).

    One thread calls it. Raises InsufficientMemory for a budget that does not hold the experts of one layer.
    """

    def __init__(
        self,
        file: ExpertFile,
        budget: int,
        *,
        stages: int | None = None,
        readers: int = _READERS,
        half_life: int = _HALF_LIFE,
    ) -> None:
        layout = file.layout
        self.file, self._layers, self._experts = file, len(layout.layers), layout.experts
        self._stages = self._layers if stages is None else stages
        self._sizes = [layout.record_bytes(layer) for layer in range(self._layers)]
        self._shelves = _shelves(self._sizes, self._experts, budget)
        self.stats = PagingStats()
        self.failure: Exception | None = None
        """Why `fetch` last failed: what the native call that it failed in is to raise."""
        self._half_life = half_life
        self._memory = mmap.mmap(-1, sum(size * shelf.slots for size, shelf in self._shelves.items()))
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._views: list[memoryview] = []
        self._starts: list[int] = []  # of each slot in the memory
        at = 0
        for size, shelf in self._shelves.items():
            first = len(self._views)
            self._starts += range(at, at + shelf.slots * size, size)
            self._views += [memoryview(self._memory)[start : start + size] for start in self._starts[first:]]
            shelf.free = list(range(first + shelf.slots - 1, first - 1, -1))
            shelf.first = first
            at += shelf.slots * size
        records, count = layout.records, len(self._views)
        self._slot_of = np.full(records, -1, np.int64)  # record → slot, also while it is being read
        self._owner = np.full(count, -1, np.int64)  # slot → record
        self._reading: dict[int, Future[None]] = {}  # record → its read
        self._ahead: dict[int, float] = {}  # records read before they were asked for: their counts then
        self._uses = np.zeros(records, np.float32)
        self._old = np.zeros(records, np.float32)  # what the counts were when those of their layer last faded
        self._layer_of = np.arange(records) // self._experts
        self._places = (_Place * (records * 2))()
        self._callbacks = _FETCH(self._fetch), _AHEAD(self._look_ahead)  # kept: C holds their addresses
        self._paged = (_Paged * (self._layers * 2))(*self._describe())
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="expert-reader")
        self._reported, self._reported_bytes = time.monotonic(), 0

    def _describe(self) -> list[_Paged]:
        places, uses = ctypes.addressof(self._places), self._uses.ctypes.data
        size = ctypes.sizeof(_Place)
        return [
            _Paged(
                places + size * self._experts * (2 * layer + matrix),
                uses + 4 * self._experts * layer,
                layer,
                *self._callbacks,
            )
            for layer in range(self._layers)
            for matrix in (0, 1)
        ]

    def handle(self, layer: int, matrix: int) -> int:
        """Address of the `Paged` of a layer's gate_up (0) or down (1) stack; valid as long as this object."""
        return ctypes.addressof(self._paged[2 * layer + matrix])

    @property
    def untouched_bytes(self) -> int:
        """Memory that is reserved and not yet used: the system still counts it as available."""
        return sum(len(shelf.free) * size for size, shelf in self._shelves.items())

    def view(self, layer: int, expert: int) -> memoryview:
        """The record of an expert that `need` brought in; valid until the next `need`."""
        slot = int(self._slot_of[layer * self._experts + expert])
        assert slot >= 0
        return self._views[slot]

    def need(self, layer: int, experts: Sequence[int] | NDArray[np.int64]) -> None:
        """Have these experts of a layer in memory until the next call. Raises CheckpointError."""
        started = time.perf_counter()
        self._fade()
        self._collect()
        wanted = np.unique(np.asarray(experts, np.int64)) + layer * self._experts
        missing = [record for record in wanted.tolist() if self._slot_of[record] < 0]
        self._read(layer, missing, keep=wanted)
        if len(wanted) >= _MANY * self._experts and layer + 1 < self._stages:
            # What was used more than those of this layer on average is worth more than a moment's waiting.
            much_used = np.flatnonzero(self._uses > self._uses[wanted].mean())
            following = np.arange(self._experts) + (layer + 1) * self._experts
            self._read_ahead(layer + 1, following, keep=np.concatenate((wanted, following, much_used)))
        for record in wanted.tolist():
            self._ahead.pop(record, None)
            if record in self._reading:
                self._finish(record, self._reading[record])
        self.stats.wait_seconds += time.perf_counter() - started
        self._report()

    def close(self) -> None:
        """Stop reading. The kernels must not be called any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.file.close()

    def guess(self, layer: int, experts: Sequence[int] | NDArray[np.int64]) -> None:
        """Begin to read what is missing of these experts of a layer, which the layer before, now computed, names."""
        self._collect()
        wanted = np.unique(np.asarray(experts, np.int64)) + layer * self._experts
        if len(wanted) >= _MANY * self._experts:
            return  # a prompt: `need` has begun to read
        before = np.arange((layer - 1) * self._experts, layer * self._experts)
        self._read_ahead(layer, wanted, keep=np.concatenate((before, wanted)))

    # -- called from the kernels ---------------------------------------------------------------------------------------

    def _fetch(self, stack: int, ids: Any, count: int) -> int:
        try:
            self.need(stack, np.ctypeslib.as_array(ids, (count,)))
        except BaseException as error:  # an exception cannot pass through C
            self.failure = error if isinstance(error, Exception) else RuntimeError(str(error))
            return 1
        self.failure = None
        return 0

    def _look_ahead(self, stack: int, ids: Any, count: int) -> None:
        try:
            self.guess(stack, np.ctypeslib.as_array(ids, (count,)))
        except Exception as error:  # nobody needs these experts yet; who does will be told
            logger.warning("experts were not read ahead: %s", error)

    # -- slots ---------------------------------------------------------------------------------------------------------

    def _read(self, layer: int, records: list[int], keep: NDArray[np.int64]) -> None:
        """Begin to read records of a layer, in the place of the least used that are not in `keep`."""
        self._make_room(layer, len(records), keep)
        shelf = self._shelves[self._sizes[layer]]
        for record in records:
            slot = shelf.free.pop()
            self._owner[slot], self._slot_of[record] = record, slot
            expert = record % self._experts
            self._reading[record] = self._pool.submit(self.file.read, layer, expert, self._views[slot])
        self.stats.reads += len(records)
        self.stats.read_bytes += len(records) * self._sizes[layer]

    def _read_ahead(self, layer: int, records: NDArray[np.int64], keep: NDArray[np.int64]) -> None:
        """Begin to read what is missing of these records of a layer, as far as there is room beside `keep`."""
        room = len(self._shelves[self._sizes[layer]].free) + len(self._evictable(layer, keep))
        missing = [record for record in records.tolist() if self._slot_of[record] < 0][:room]
        self._read(layer, missing, keep)
        self._ahead.update((record, float(self._uses[record])) for record in missing)
        self.stats.ahead += len(missing)

    def _collect(self) -> None:
        """Finish the reads that have ended."""
        for record, read in list(self._reading.items()):
            if read.done():
                self._finish(record, read)

    def _finish(self, record: int, read: Future[None]) -> None:
        del self._reading[record]
        try:
            read.result()
        except BaseException:
            slot = int(self._slot_of[record])
            self._slot_of[record], self._owner[slot] = -1, -1
            self._shelves[self._sizes[record // self._experts]].free.append(slot)
            raise
        self._publish(record)

    def _publish(self, record: int) -> None:
        """Tell the kernels where a record is."""
        layer, expert = divmod(record, self._experts)
        base = self._base + self._starts[self._slot_of[record]]
        for matrix, form in enumerate(self.file.layout.layers[layer]):
            codes = base + self.file.layout.matrix_at(layer, matrix)
            place = self._places[(2 * layer + matrix) * self._experts + expert]
            place.codes, place.scales = codes, codes + form.scales_at if form.scales else None

    def _evictable(self, layer: int, keep: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots that fit a layer's records and hold something finished that is not in `keep`."""
        busy = np.zeros(self._uses.size + 1, np.bool_)  # the last: of no record
        busy[keep] = busy[-1] = True
        busy[list(self._reading)] = True
        shelf = self._shelves[self._sizes[layer]]
        owners = self._owner[shelf.first : shelf.first + shelf.slots]
        found: NDArray[np.int64] = np.flatnonzero(~busy[owners]) + shelf.first
        return found

    def _make_room(self, layer: int, count: int, keep: NDArray[np.int64]) -> None:
        """At least `count` free slots for a layer's records."""
        missing = count - len(self._shelves[self._sizes[layer]].free)
        if missing <= 0:
            return
        slots = self._evictable(layer, keep)
        if len(slots) < missing:  # the rest is being read ahead for another layer
            for record, read in list(self._reading.items()):
                self._finish(record, read)
            slots = self._evictable(layer, keep)
        records = self._owner[slots]
        worth = self._worth(records, int(keep[0]) // self._experts)
        for i in np.argpartition(worth, missing - 1)[:missing].tolist():
            self._evict(int(slots[i]))

    def _worth(self, records: NDArray[np.int64], layer: int) -> NDArray[np.float64]:
        """What goes first has the least; `layer` is being computed."""
        after = (self._layer_of[records] - layer - 1) % self._layers  # layers until it is asked again
        worth: NDArray[np.float64] = self._uses[records] - 1e-6 * after
        return worth

    def _evict(self, slot: int) -> None:
        record = int(self._owner[slot])
        layer, expert = divmod(record, self._experts)
        for matrix in (0, 1):
            self._places[(2 * layer + matrix) * self._experts + expert].codes = None
        self._owner[slot] = self._slot_of[record] = -1
        self._shelves[self._sizes[layer]].free.append(slot)
        if self._ahead.pop(record, -1.0) >= self._uses[record]:
            self.stats.wasted += 1

    # -- counts --------------------------------------------------------------------------------------------------------

    def _fade(self) -> None:
        """Let counts fade: rows that came n rows of their layer ago weigh 0.5 ** (n / half-life).

        What came since the last time, which may be a long prompt, is taken to have come evenly.
        """
        uses, old = (counts.reshape(self._layers, self._experts) for counts in (self._uses, self._old))
        came = (uses - old).sum(1)
        chosen = came >= self._half_life / 32
        if chosen.any():
            rows = came[chosen, None]
            kept = 0.5 ** (rows / self._half_life)
            weight = (1 - kept) * self._half_life / np.log(2) / rows
            old[chosen] = uses[chosen] = old[chosen] * kept + (uses[chosen] - old[chosen]) * weight

    def _report(self) -> None:
        """A line in the log, now and then, while there is reading."""
        now, read = time.monotonic(), self.stats.read_bytes
        seconds = now - self._reported
        if seconds >= _REPORT_SECONDS:
            held = len(self._memory) - self.untouched_bytes
            logger.info(
                "experts: read %.1f GB in %.0f s (%.0f MB/s); %.1f of %.1f GB are in memory",
                (read - self._reported_bytes) / 1e9, seconds, (read - self._reported_bytes) / 1e6 / seconds,
                held / 1e9, self.file.layout.num_bytes / 1e9,
            )  # fmt: skip
            self._reported, self._reported_bytes = now, read
