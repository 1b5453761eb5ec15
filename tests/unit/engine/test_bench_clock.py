"""The part clock: every nanosecond to one part, native shares taken out of the operation that spent them."""

from __future__ import annotations

import pytest

from freehold.engine.bench import clock as module
from freehold.engine.bench.clock import PartClock, check_sums
from freehold.errors import EngineError
from freehold.model.traffic import PARTS, Part


class Time:
    """A clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000
        monkeypatch.setattr(module, "_now", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_an_outer_part_is_charged_what_no_inner_one_is(time: Time) -> None:
    clock = PartClock()
    for _ in range(2):  # a second start forgets the first
        clock.start("scheduler")
        time.passes(1)
        clock.enter("attention.project")
        time.passes(2)
        clock.enter("attention.attend")
        time.passes(4)
        clock.leave()
        time.passes(8)
        clock.leave()
        time.passes(16)
        parts = clock.stop()
    assert {part: spent for part, spent in parts.items() if spent} == {
        "scheduler": 17, "attention.project": 10, "attention.attend": 4
    }  # fmt: skip
    assert set(parts) == set(PARTS)


@pytest.mark.parametrize(("claimed", "given"), [(3.0, 3.0), (5.0, 5.0), (50.0, 5.0)])
def test_native_shares_come_out_of_the_operation_and_are_never_more_than_it(
    time: Time, claimed: float, given: float
) -> None:
    clock = PartClock()
    clock.start("other")
    clock.enter("norms")
    time.passes(7)  # before the operation
    clock.enter("norms")
    before = clock.charged("norms")
    time.passes(5)
    clock.move({"experts": claimed / 4, "mlp": claimed * 3 / 4}, before)
    clock.leave()
    clock.leave()
    parts = clock.stop()
    assert parts["experts"] == pytest.approx(given / 4)
    assert parts["mlp"] == pytest.approx(given * 3 / 4)
    assert parts["norms"] == pytest.approx(12 - given)
    assert sum(parts.values()) == pytest.approx(12)


def test_an_operation_may_name_its_own_part(time: Time) -> None:
    clock = PartClock()
    clock.start("other")
    clock.enter("mlp")
    time.passes(5)
    clock.move({"mlp": 2.0, "router": 1.0}, 0)
    clock.leave()
    parts = clock.stop()
    assert (parts["mlp"], parts["router"]) == pytest.approx((4, 1))


def test_a_native_part_that_does_not_exist(time: Time) -> None:
    clock = PartClock()
    clock.start("other")
    with pytest.raises(EngineError, match=r"'attention'; known are indexer\.project"):
        clock.move({"attention": 1.0}, 0)


def test_a_part_that_was_not_left(time: Time) -> None:
    clock = PartClock()
    clock.start("other")
    clock.enter("mlp")
    with pytest.raises(EngineError, match="mlp"):
        clock.stop()


def test_parts_that_do_not_make_the_whole() -> None:
    good: tuple[float, dict[Part, float]] = (1.0, {"mlp": 0.5, "head": 0.49})
    less: tuple[float, dict[Part, float]] = (1.0, {"mlp": 0.97})
    more: tuple[float, dict[Part, float]] = (1.0, {"mlp": 0.5, "head": 0.53})
    check_sums([good, good, less])
    for bad in (less, more):
        with pytest.raises(EngineError, match="lost or counted twice"):
            check_sums([good, bad, bad])
