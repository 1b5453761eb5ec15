"""From the integers of a `StepInput` to the tensors of a `ForwardInput`.

Block tables are kept as tensors from step to step and only appended to, so that a decode step costs the same at any
context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.engine.step import ScheduledSeq, StepInput
from freehold.model.inputs import ForwardInput, Span


@dataclass(slots=True)
class _Table:
    """A request's block table: `buffer[:length]` is valid, for the scheduler's `epoch` of the table."""

    epoch: int
    length: int
    buffer: Tensor


class BatchBuilder:
    """Makes forward inputs; owns the requests' block tables until `release`."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._tables: dict[str, _Table] = {}

    def release(self, request_id: str) -> None:
        self._tables.pop(request_id, None)

    def build(self, step: StepInput, drafts: Sequence[Sequence[int]] = ()) -> ForwardInput:
        """Rows in the order of `step.seqs`, each sequence's tokens in order of position.

        drafts: for each sequence, tokens that come behind its own (default none); its table covers them.
        """
        size = self.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans = []
        for n, seq in enumerate(step.seqs):
            behind = drafts[n] if drafts else ()
            count = len(seq.token_ids) + len(behind)
            spans.append(Span(len(token_ids), count, seq.start, self._table(seq)))
            token_ids.extend(seq.token_ids)
            token_ids.extend(behind)
            blocks = seq.block_ids
            for position in range(seq.start, seq.start + count):
                positions.append(position)
                slots.append(blocks[position // size] * size + position % size)
        rows = torch.tensor((token_ids, positions, slots), dtype=torch.int64)
        return ForwardInput(rows[0], rows[1], rows[2], tuple(spans), size)

    def _table(self, seq: ScheduledSeq) -> Tensor:
        blocks = len(seq.block_ids)
        table = self._tables.get(seq.request_id)
        if table is None or table.epoch != seq.block_epoch or table.length > blocks:
            table = _Table(seq.block_epoch, 0, torch.empty(max(16, blocks), dtype=torch.int64))
            self._tables[seq.request_id] = table
        if blocks > table.buffer.shape[0]:
            grown = torch.empty(2 * blocks, dtype=torch.int64)
            grown[: table.length] = table.buffer[: table.length]
            table.buffer = grown
        if blocks > table.length:
            table.buffer[table.length : blocks] = torch.tensor(seq.block_ids[table.length :], dtype=torch.int64)
            table.length = blocks
        return table.buffer[:blocks]
