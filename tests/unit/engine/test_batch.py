"""Batches: rows, slots and block tables, kept from step to step."""

from __future__ import annotations

from freehold.engine.batch import BatchBuilder
from freehold.engine.step import ScheduledSeq, StepInput


def seq(name: str, tokens: range, start: int, blocks: tuple[int, ...], epoch: int = 0) -> ScheduledSeq:
    return ScheduledSeq(name, tuple(tokens), start, blocks, epoch, True)


def test_rows_positions_and_slots_follow_the_block_tables() -> None:
    builder = BatchBuilder(block_size=4)
    inputs = builder.build(StepInput(1, (seq("a", range(7, 8), 5, (9, 2)), seq("b", range(20, 26), 2, (3, 1)))))
    assert inputs.token_ids_T.tolist() == [7, 20, 21, 22, 23, 24, 25]
    assert inputs.positions_T.tolist() == [5, 2, 3, 4, 5, 6, 7]
    assert inputs.slots_T.tolist() == [2 * 4 + 1, 14, 15, 4, 5, 6, 7]
    assert [(span.row, span.length, span.start, span.end) for span in inputs.spans] == [(0, 1, 5, 6), (1, 6, 2, 8)]
    assert inputs.spans[0].slots_P(4).tolist() == [36, 37, 38, 39, 8, 9]


def test_a_table_that_grows_keeps_its_tensor_and_a_new_epoch_rebuilds_it() -> None:
    builder = BatchBuilder(block_size=4)
    first = builder.build(StepInput(1, (seq("a", range(8), 0, (5, 6)),))).spans[0].table_B
    grown = builder.build(StepInput(2, (seq("a", range(1), 8, (5, 6, 7)),))).spans[0].table_B
    assert grown.tolist() == [5, 6, 7]
    assert grown.data_ptr() == first.data_ptr()
    long = tuple(range(100, 300))
    assert builder.build(StepInput(3, (seq("a", range(1), 9, (5, 6, 7, *long)),))).spans[0].table_B.tolist()[3:] == [
        *long
    ]
    again = builder.build(StepInput(4, (seq("a", range(8), 0, (1, 2), epoch=1),))).spans[0].table_B
    assert again.tolist() == [1, 2]
    builder.release("a")
    fresh = builder.build(StepInput(5, (seq("a", range(8), 0, (3, 4), epoch=1),))).spans[0].table_B
    assert fresh.tolist() == [3, 4]
