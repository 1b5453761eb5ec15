"""Which experts are in memory: a bound that holds, counts that survive a prompt, reads that fail."""

from __future__ import annotations

import ctypes
import math
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from freehold.errors import CheckpointError, InsufficientMemory
from freehold.model.expert_file import PAGE, Layout, MatrixBytes
from freehold.model.pager import ExpertPager, _Place, _shelves

EXPERTS = 4
SMALL, LARGE = MatrixBytes(1, 1000, 8), MatrixBytes(1, 5000, 8)


class File:
    """Reads layer * 16 + expert into every byte; can be held back, and can fail."""

    def __init__(self, layers: str = "sss") -> None:
        forms = {"s": SMALL, "l": LARGE}
        self.layout = Layout(tuple((forms[form], forms[form]) for form in layers), EXPERTS)
        self.read_records: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[tuple[int, int]] = set()

    def read(self, layer: int, expert: int, into: memoryview) -> None:
        self.gate.wait(10)
        assert len(into) == self.layout.record_bytes(layer)
        if (layer, expert) in self.broken:
            raise CheckpointError("the disk is broken")
        self.read_records.append((layer, expert))
        into[:] = bytes([layer * 16 + expert]) * len(into)

    def close(self) -> None:
        pass


@pytest.fixture
def made() -> Iterator[Any]:
    pagers: list[ExpertPager] = []

    def make(file: Any, slots: int, **options: Any) -> ExpertPager:
        pagers.append(ExpertPager(file, slots * PAGE, **options))
        return pagers[-1]

    yield make
    for pager in pagers:
        pager.close()


def in_memory(pager: ExpertPager) -> set[tuple[int, int]]:
    """What the kernels would take as present, checked byte by byte, in both matrices."""
    found = set()
    for layer, (gate_up, _) in enumerate(pager.file.layout.layers):
        for expert in range(EXPERTS):
            places = [_place(pager, layer, matrix, expert) for matrix in (0, 1)]
            assert (places[0].codes is None) == (places[1].codes is None)
            if places[0].codes is None:
                continue
            for place in places:
                assert ctypes.string_at(place.codes, gate_up.codes) == bytes([layer * 16 + expert]) * gate_up.codes
                assert place.scales == place.codes + gate_up.scales_at
            found.add((layer, expert))
    return found


def _place(pager: ExpertPager, layer: int, matrix: int, expert: int) -> _Place:
    return pager._places[(2 * layer + matrix) * EXPERTS + expert]


def use(pager: ExpertPager, layer: int, *experts: int, times: int = 1) -> None:
    """As the kernels do: count, and ask if one is missing."""
    np.add.at(pager._uses, layer * EXPERTS + np.array(experts), times)
    if any(_place(pager, layer, 0, expert).codes is None for expert in experts):
        pager.need(layer, experts)
    assert {(layer, expert) for expert in experts} <= in_memory(pager)


def test_what_is_needed_is_read_once_and_in_memory(made: Any) -> None:
    file = File()
    pager = made(file, 6)
    use(pager, 0, 2, 3, 2)
    use(pager, 1, 1)
    use(pager, 0, 3)
    assert in_memory(pager) == {(0, 2), (0, 3), (1, 1)}
    assert sorted(file.read_records) == [(0, 2), (0, 3), (1, 1)]
    assert pager.stats.reads == 3
    assert pager.stats.read_bytes == 3 * PAGE
    assert bytes(pager.view(1, 1)) == bytes([17]) * PAGE
    assert pager.untouched_bytes == 3 * PAGE


def test_the_least_used_goes(made: Any) -> None:
    pager = made(File(), 4)
    for expert, times in ((0, 5), (1, 2), (2, 9), (3, 3)):
        use(pager, 1, expert, times=times)
    use(pager, 0, 1, times=4)
    assert in_memory(pager) == {(1, 0), (1, 2), (1, 3), (0, 1)}
    use(pager, 0, 2, times=1)
    assert in_memory(pager) == {(1, 0), (1, 2), (0, 1), (0, 2)}


def test_among_equals_the_layer_that_comes_round_last_goes(made: Any) -> None:
    pager = made(File(), 4)
    use(pager, 0, 0)
    use(pager, 1, 0)
    use(pager, 2, 0)
    use(pager, 2, 1)
    use(pager, 1, 1)  # after layer 1 come 2, 0, 1
    assert in_memory(pager) == {(0, 0), (2, 0), (2, 1), (1, 1)}


def test_a_prompt_does_not_push_out_what_is_used_most(made: Any) -> None:
    """A list of least recently used would keep nothing: 12 experts pass through 8 slots."""
    file = File()
    pager = made(file, 8)
    for layer in range(3):
        use(pager, layer, 0, times=50)
    file.read_records.clear()
    for layer in range(3):
        use(pager, layer, 0, 1, 2, 3)
    assert {(0, 0), (1, 0), (2, 0)} <= in_memory(pager)
    assert not {(0, 0), (1, 0), (2, 0)} & set(file.read_records)


def test_counts_fade(made: Any) -> None:
    pager = made(File(), 4, half_life=100)
    use(pager, 0, 0, times=20)
    use(pager, 1, 0, times=20)
    for _ in range(40):
        use(pager, 0, 1, times=10)
        pager.need(0, [1])
    assert pager._uses[0] == pytest.approx(20 * 0.5**4.2, rel=0.1)  # its own 20 rows, and 400 after them
    assert pager._uses[1] == pytest.approx(100 / math.log(2), rel=0.1)  # what a count tends to
    assert pager._uses[4] == pytest.approx(20, rel=0.1)  # time passes for each layer by its own rows


def test_a_long_prompt_weighs_as_if_its_rows_had_come_one_by_one(made: Any) -> None:
    pagers = [made(File(), 4, half_life=100) for _ in range(2)]
    use(pagers[0], 0, 0, 1, times=150)
    pagers[0].need(0, [0])
    for _ in range(75):
        use(pagers[1], 0, 0, 1, times=2)
        pagers[1].need(0, [0])
    assert pagers[0]._uses[:2] == pytest.approx(pagers[1]._uses[:2], rel=0.1)


def test_after_a_step_of_many_the_next_layer_is_read_ahead(made: Any) -> None:
    file = File()
    pager = made(file, 8, stages=2)
    use(pager, 0, 0, 1, 2)
    assert pager.stats.ahead == 4
    use(pager, 1, 0, 1, 2, 3)
    assert pager.stats.reads == 7
    use(pager, 1, 0, 1)
    assert pager.stats.ahead == 4  # layer 2 is not a stage that follows
    assert pager.stats.wasted == 0


def test_a_read_ahead_that_was_in_vain_is_counted_and_its_slot_used_again(made: Any) -> None:
    pager = made(File(), 8)
    use(pager, 0, 0, 1, 2, 3)
    for _ in range(3):
        for expert in range(EXPERTS):
            use(pager, 2, expert, times=9)
    assert pager.stats.ahead == 4
    assert pager.stats.wasted >= 1


def test_a_read_ahead_leaves_what_is_computed_alone(made: Any) -> None:
    """Experts of the layer that is being computed stay where they are, however little they were used."""
    file = File()
    pager = made(file, 5)
    use(pager, 0, 0, 1, 2, 3)
    assert {(0, 0), (0, 1), (0, 2), (0, 3)} <= in_memory(pager)
    assert pager.stats.ahead == 1


def test_a_guess_is_read_while_the_layer_before_is_computed(made: Any) -> None:
    file = File()
    pager = made(file, 6)
    use(pager, 0, 1, 2)
    pager.guess(1, [0, 3, 3])
    assert pager.stats.ahead == 2
    assert {(0, 1), (0, 2)} <= in_memory(pager)
    use(pager, 1, 3, 2)  # one of them was right
    assert pager.stats.reads == 5
    use(pager, 2, 0)
    use(pager, 0, 0, times=5)
    use(pager, 2, 1)
    assert pager.stats.wasted == 1
    assert (1, 0) not in in_memory(pager)


def test_a_guess_takes_no_slot_of_the_layer_that_is_computed(made: Any) -> None:
    """Not even of experts that were in memory already, for which nobody called."""
    pager = made(File(), 4)
    use(pager, 1, 0, 1)
    use(pager, 0, 0, times=9)
    use(pager, 1, 0, 1)  # found, without a call
    for experts in ([0, 1], [2, 3], [0, 1]):
        pager.guess(2, experts)
        assert {(1, 0), (1, 1)} <= in_memory(pager)
    before = pager.stats.ahead
    assert before >= 2
    pager.guess(2, range(EXPERTS))  # of a prompt: not here
    assert pager.stats.ahead == before


def test_a_guess_that_cannot_be_read_harms_nobody(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    file = File()
    pager = made(file, 8)
    file.broken.add((1, 2))
    ids = (ctypes.c_int64 * 2)(2, 3)
    for _ in range(2):
        pager._look_ahead(1, ctypes.cast(ids, ctypes.POINTER(ctypes.c_int64)), 2)
        while not all(read.done() for read in pager._reading.values()):
            time.sleep(0.001)
    assert "the disk is broken" in caplog.text
    use(pager, 0, 1)
    file.broken.clear()
    use(pager, 1, 2, 3)


def test_nothing_is_present_before_it_has_arrived(made: Any) -> None:
    file = File()
    pager = made(file, 8)
    file.gate.clear()
    waiting = threading.Thread(target=use, args=(pager, 0, 0, 1, 2, 3))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    assert in_memory(pager) == set()
    file.gate.set()
    waiting.join(10)
    assert len(in_memory(pager)) == 4


def test_a_failed_read_is_said_and_can_be_tried_again(made: Any) -> None:
    file = File()
    pager = made(file, 4)
    file.broken.add((1, 2))
    with pytest.raises(CheckpointError, match="the disk is broken"):
        pager.need(1, [1, 2])
    ids = (ctypes.c_int64 * 1)(2)
    assert pager._fetch(1, ctypes.cast(ids, ctypes.POINTER(ctypes.c_int64)), 1) == 1
    assert isinstance(pager.failure, CheckpointError)
    assert (1, 2) not in in_memory(pager)
    file.broken.clear()
    use(pager, 1, 1, 2)


def test_records_of_several_sizes_have_slots_of_their_own(made: Any) -> None:
    file = File("slss")
    small, large = file.layout.record_bytes(0), file.layout.record_bytes(1)
    assert (small, large) == (PAGE, 3 * PAGE)
    pager = made(file, 4 * 3 + 4 + 4)
    assert {size: shelf.slots for size, shelf in pager._shelves.items()} == {small: 8, large: 4}
    for _ in range(2):
        for layer in range(4):
            use(pager, layer, 0, 1, 2, 3)


@pytest.mark.parametrize(
    ("budget", "slots"),
    [(4 * 7, {2: 4, 5: 4}), (4 * 7 + 9, {2: 8, 5: 4}), (4 * 9, {2: 8, 5: 4}), (1000, {2: 12, 5: 4})],
)
def test_how_memory_is_shared(budget: int, slots: dict[int, int]) -> None:
    found = {size: shelf.slots for size, shelf in _shelves([2, 2, 5, 2], 4, budget).items()}
    assert found == slots
    assert sum(size * count for size, count in found.items()) <= budget


def test_too_little_memory_is_refused_with_what_is_needed() -> None:
    with pytest.raises(InsufficientMemory, match=r"all 4 experts of a layer, which are 16,384 bytes"):
        ExpertPager(File(), 4 * PAGE - 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_uses_keeps_the_bound_and_the_contents(made: Any, seed: int) -> None:
    choose = random.Random(seed)
    file = File("ssls")
    pager = made(file, 12 + choose.randrange(4, 14), readers=choose.randrange(1, 4), half_life=60)
    for _ in range(200):
        layer = choose.randrange(4)
        if choose.random() < 0.05:
            file.broken = {(choose.randrange(4), choose.randrange(4))}
        if choose.random() < 0.3 and layer < 3:
            with suppress(CheckpointError):
                pager.guess(layer + 1, [choose.randrange(EXPERTS) for _ in range(2)])
        try:
            use(pager, layer, *(choose.randrange(EXPERTS) for _ in range(choose.randrange(1, 7))))
        except CheckpointError:
            file.broken = set()
        held = [record for record in pager._owner.tolist() if record >= 0]
        assert len(held) == len(set(held))
        assert all(pager._owner[pager._slot_of[record]] == record for record in held)
        assert int(np.sum(pager._slot_of >= 0)) == len(held)
        free = [slot for shelf in pager._shelves.values() for slot in shelf.free]
        assert sorted(free) == np.flatnonzero(pager._owner < 0).tolist()
