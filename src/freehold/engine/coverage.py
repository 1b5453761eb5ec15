"""Which cached positions the MTP layer has entries for, next to the target's. Torch-free.

The target computes every position of a request; the MTP layer only those that were computed while drafts were wanted.
A request's entries are good from one position on, its *base*, the beginning of a block, up to what is computed: before
it there may be nothing, or what other requests left. The MTP layer sees the sequence from the base on.

Blocks outlive requests (prefix cache), so how far each is filled is remembered by block. One entry of a shared prefix
may be stale: that of its last position was made with the token that followed for the request that computed it. It can
only cost acceptance, of drafts that attend to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from freehold.engine.step import ScheduledSeq


@dataclass(slots=True)
class _Run:
    """Positions base .. end-1 of a request have entries, under the block table of this epoch."""

    epoch: int
    base: int
    end: int


class Coverage:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._size = block_size
        self._filled = [0] * num_blocks  # entries from the start of each block on
        self._runs: dict[str, _Run] = {}

    def drop(self, request_id: str) -> None:
        self._runs.pop(request_id, None)

    def base_of(self, request_id: str) -> int:
        """Where the entries of a request that was extended begin."""
        return self._runs[request_id].base

    def base(self, seq: ScheduledSeq) -> tuple[int, int]:
        """Where the entries of a request begin, if it goes on at seq.start; and how many of the positions right before
        seq.start, in the same block, have none: they are to be blanked."""
        run = self._runs.get(seq.request_id)
        if run is not None and run.epoch == seq.block_epoch and run.end == seq.start:
            return run.base, 0
        block, inside = divmod(seq.start, self._size)
        if inside and self._filled[seq.block_ids[block]] < inside:
            self._filled[seq.block_ids[block]] = 0  # never whole: nobody else is to take blanks for entries
            return block * self._size, inside
        while block and self._filled[seq.block_ids[block - 1]] == self._size:
            block -= 1
        return block * self._size, 0

    def extend(self, seq: ScheduledSeq, base: int, count: int) -> None:
        """Entries were written for `count` positions from seq.start on."""
        end = seq.start + count
        self._runs[seq.request_id] = _Run(seq.block_epoch, base, end)
        for block in range(seq.start // self._size, -(-end // self._size)):
            first = max(seq.start - block * self._size, 0)
            if self._filled[seq.block_ids[block]] >= first:
                self._filled[seq.block_ids[block]] = min(end - block * self._size, self._size)

    def skip(self, seq: ScheduledSeq, count: int) -> None:
        """The target computed `count` positions from seq.start on, and the MTP layer did not."""
        self._runs.pop(seq.request_id, None)
        for block in range(seq.start // self._size, -(-(seq.start + count) // self._size)):
            first = max(seq.start - block * self._size, 0)
            self._filled[seq.block_ids[block]] = min(self._filled[seq.block_ids[block]], first)
