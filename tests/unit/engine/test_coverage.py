"""Which positions the MTP layer has entries for: random requests over shared blocks, against what was written."""

from __future__ import annotations

import random

import pytest

from freehold.engine.coverage import Coverage
from freehold.engine.step import ScheduledSeq

SIZE, BLOCKS = 4, 12


def seq(name: str, start: int, count: int, blocks: tuple[int, ...], epoch: int = 1) -> ScheduledSeq:
    return ScheduledSeq(name, tuple(range(count)), start, blocks, epoch, True)


class FollowsEpochs(Coverage):
    """Takes what lies in a rebuilt table for the request's own."""

    def base(self, seq: ScheduledSeq) -> tuple[int, int]:
        run = self._runs.get(seq.request_id)
        return (run.base, 0) if run is not None else super().base(seq)


class NeverSkips(Coverage):
    """Does not notice that the target went on without the layer."""

    def skip(self, seq: ScheduledSeq, count: int) -> None:
        return


class CountsBlanks(Coverage):
    """Offers a block that begins with blanks as a whole one."""

    def extend(self, seq: ScheduledSeq, base: int, count: int) -> None:
        super().extend(seq, base, count)
        for block in range(seq.start // SIZE, (seq.start + count) // SIZE):
            self._filled[seq.block_ids[block]] = SIZE


def play(coverage: Coverage, seed: int) -> int:
    """Requests come, go on with or without the layer, go, and come back to blocks they left whole. Returns how many
    positions of others' could be used."""
    draw = random.Random(seed)
    slots: dict[int, tuple[str, int] | None] = {}  # what the layer wrote: (text, position); None: a blank
    whole: dict[str, list[int]] = {}  # blocks of a text that the target has computed whole, in order
    free = list(range(BLOCKS))
    used = 0
    for number in range(60):
        text = draw.choice("ab")
        known = whole.get(text, [])
        table = [*known]
        while len(table) < 5 and free:
            table.append(free.pop(draw.randrange(len(free))))
        name, start, end = f"r{number}", len(known) * SIZE, len(table) * SIZE
        epoch = number
        while start < end and draw.random() < 0.95:
            count = min(draw.choice([1, 1, 2, 5, 9]), end - start)
            step = seq(name, start, count, tuple(table), epoch)
            if draw.random() < 0.35:
                coverage.skip(step, count)
                for position in range(start, start + count):
                    slots[table[position // SIZE] * SIZE + position % SIZE] = ("nothing", -1)
            else:
                base, blanks = coverage.base(step)
                assert base % SIZE == 0
                for position in range(start - blanks, start):
                    slots[table[position // SIZE] * SIZE + position % SIZE] = None
                for position in range(base, start):
                    entry = slots.get(table[position // SIZE] * SIZE + position % SIZE)
                    assert entry is None or entry == (text, position), f"seed {seed}: read {entry} at {position}"
                    assert entry is not None or position // SIZE == base // SIZE, "a blank in the middle"
                    used += entry is not None and position < len(known) * SIZE
                for position in range(start, start + count):
                    slots[table[position // SIZE] * SIZE + position % SIZE] = (text, position)
                coverage.extend(step, base, count)
            start += count
        coverage.drop(name)
        full = start // SIZE
        free += table[full:]
        whole[text] = table[:full]
        if draw.random() < 0.5:
            free += whole.pop(text)
    return used


def play_all(kind: type[Coverage]) -> int:
    return sum(play(kind(BLOCKS, SIZE), seed) for seed in range(300))


def test_only_entries_of_the_same_sequence_are_read() -> None:
    assert play_all(Coverage) > 1000, "nothing was ever shared"


@pytest.mark.parametrize("wrong", [NeverSkips, CountsBlanks], ids=lambda kind: kind.__name__)
def test_a_wrong_book_is_seen(wrong: type[Coverage]) -> None:
    with pytest.raises(AssertionError, match=r"read|blank"):
        play_all(wrong)


def test_a_rebuilt_table_is_looked_at_again() -> None:
    def second_base(coverage: Coverage) -> int:
        coverage.extend(seq("a", 0, 6, (3, 4)), 0, 6)
        return coverage.base(seq("a", 6, 2, (3, 5), epoch=2))[0]

    assert second_base(Coverage(BLOCKS, SIZE)) == SIZE  # block 5 has nothing of positions 4 and 5
    assert second_base(FollowsEpochs(BLOCKS, SIZE)) == 0
