"""What one forward pass needs besides weights: tokens, positions, cache slots and block tables.

Rows of a batch are tokens of several sequences laid end to end. A `Span` is a run of rows that are consecutive
positions of one sequence. `engine/batch.py` makes these from a `StepInput`; tests and training make them by hand.

Shape suffixes: T rows of the batch; P cache positions of one sequence; B blocks of one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Rows row .. row+length-1 are positions start .. start+length-1 of one sequence.

    table_B: int64 block ids that cover every position below `end`.
    """

    row: int
    length: int
    start: int
    table_B: Tensor

    @property
    def end(self) -> int:
        return self.start + self.length

    def slots_P(self, block_size: int) -> Tensor:
        """Cache slots of positions 0 .. end-1, int64 [end]."""
        blocks = (self.end + block_size - 1) // block_size
        offsets = torch.arange(block_size, device=self.table_B.device)
        return (self.table_B[:blocks, None] * block_size + offsets).view(-1)[: self.end]


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """One forward pass. token_ids_T, positions_T and slots_T are int64 [T]; slots_T says where each row's cache
    entry is written. spans cover the rows in order, each row once."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    spans: tuple[Span, ...]
    block_size: int

    @property
    def num_rows(self) -> int:
        return self.token_ids_T.shape[0]


def single_sequence(
    token_ids: Sequence[int], *, start: int = 0, block_size: int = 64, table: Sequence[int] | None = None
) -> ForwardInput:
    """One sequence's tokens at positions start.., in blocks `table` (default 0, 1, 2, …)."""
    end = start + len(token_ids)
    blocks = (end + block_size - 1) // block_size
    table_B = torch.tensor(list(table) if table is not None else list(range(blocks)), dtype=torch.int64)
    positions_T = torch.arange(start, end)
    slots_T = table_B[positions_T // block_size] * block_size + positions_T % block_size
    span = Span(0, len(token_ids), start, table_B)
    return ForwardInput(torch.tensor(list(token_ids), dtype=torch.int64), positions_T, slots_T, (span,), block_size)
