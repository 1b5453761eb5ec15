"""A gateway whose database is slow, or that was taken for dead, while several agree about a share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import pytest

from freehold.errors import Unavailable
from freehold.gateway.routing import crossing as crossing_module
from freehold.gateway.routing.agreement import Change, Conversation, Mark
from freehold.gateway.routing.assign import Pins
from freehold.gateway.routing.crossing import Crossings
from tests.canarying import NAME
from tests.unit.gateway.test_crossing import settings

LIVE = 0.3


class Slow:
    """A `Shared` of one gateway in memory that takes its time, and takes for dead who does not beat for `LIVE`."""

    def __init__(self) -> None:
        self.ledger_seconds = self.pins_seconds = self.hear_seconds = self.claim_seconds = 0.0
        self.rows: list[tuple[str, str, float, float]] = []
        self.written: list[Conversation] = []
        self.found = [Change(0, 0.0, 0.1, False)]
        self.until = -1.0
        self.joins = self.heard = 0
        self.told: list[Mark] = []
        self.failing: Exception | None = None
        self.claimed: bool | None = False

    async def join(self, experiment: str, number: int) -> int:
        self.joins += 1
        self.until = time.monotonic() + LIVE
        return number

    async def beat(self, experiment: str, mark: Mark) -> list[Mark] | None:
        if time.monotonic() > self.until:
            return None
        self.until = time.monotonic() + LIVE
        self.told.append(mark)
        return []

    async def share(self, experiment: str, pinned: Mapping[str, float]) -> None: ...

    async def shared(self, experiment: str, since: float) -> list[Conversation]:
        await asyncio.sleep(self.pins_seconds)
        return self.written

    async def claim(self, experiment: str, conversation: str, on_canary: bool) -> bool | None:
        await asyncio.sleep(self.claim_seconds)
        return self.claimed

    async def in_ledger(self, experiment: str, since: float) -> list[tuple[str, str, float, float]]:
        await asyncio.sleep(self.ledger_seconds)
        if self.failing:
            raise self.failing
        return self.rows

    async def changes(self, experiment: str, after: int) -> list[Change]:
        self.heard += 1
        await asyncio.sleep(self.hear_seconds)
        if self.failing:
            raise self.failing
        return [each for each in self.found if each.number > after]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setattr(crossing_module, "LIVE_SECONDS", LIVE)
    return Slow()


class Joined:
    """Crossings on that, with a clock that can be put forward, and their pins."""

    def __init__(self, slow: Slow) -> None:
        self.ahead = 0.0
        self.pins = Pins()
        self.crossings = Crossings(settings(), slow, clock=lambda: time.monotonic() + self.ahead)
        self.crossings.pins = lambda experiment: self.pins

    async def turn(self) -> None:
        async with asyncio.timeout(10):
            await self.crossings.turn(NAME)

    async def claims(self, count: int) -> list[BaseException | None]:
        asked = (self.crossings.claim(NAME, f"c{number}", 0.0) for number in range(count))
        async with asyncio.timeout(10):
            return await asyncio.gather(*asked, return_exceptions=True)


async def test_a_question_that_takes_longer_than_it_may_be_silent_is_no_reason_to_join_again(slow: Slow) -> None:
    slow.ledger_seconds = 3 * LIVE
    joined = Joined(slow)
    await joined.turn()
    assert slow.joins == 1
    assert joined.crossings.standing(NAME) == crossing_module.Agreed(0.1)
    slow.found.append(Change(1, 0.0, 0.3, False))
    slow.told.clear()
    rising = asyncio.create_task(joined.turn())
    await asyncio.sleep(2 * LIVE)
    assert len(slow.told) >= 3
    assert set(slow.told) == {Mark(0, 3)}  # not yet the new one: its pins are not written down
    standing = joined.crossings.standing(NAME)
    assert standing is not None
    assert standing.band == (0.1, 0.3)  # not all: it is not taken for dead
    await rising
    assert slow.joins == 1
    assert slow.told[-1] == Mark(1, 3)


async def test_nor_is_it_that_reading_the_pins_takes_long(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    slow.pins_seconds = 3 * LIVE
    joined = Joined(slow)
    await joined.turn()
    monkeypatch.setattr(crossing_module, "REFRESH_SECONDS", 0.0)
    await joined.turn()
    await joined.turn()
    assert slow.joins == 1


async def test_a_claim_that_takes_long_is_waited_for_alive(slow: Slow) -> None:
    joined = Joined(slow)
    await joined.turn()
    joined.crossings._places[NAME].claiming(1)
    slow.found.append(Change(1, 0.0, 0.3, False))
    rising = asyncio.create_task(joined.turn())
    await asyncio.sleep(3 * LIVE)
    assert slow.told[-1] == Mark(1, 1)  # the others may not hear of more while it is on its way
    joined.crossings._places[NAME].claiming(-1)
    await rising
    assert slow.joins == 1
    assert slow.told[-1] == Mark(1, 3)


async def test_old_conversations_of_the_ledger_do_not_drive_out_the_living(slow: Slow) -> None:
    joined = Joined(slow)
    joined.pins = Pins(most=3)
    now = time.time()
    joined.pins.pin("living", now)
    slow.rows = [("old", f"ledger{age}", now - 900, now - age) for age in (500, 300, 400)]
    slow.written = [Conversation(f"written{age}", False, now - age) for age in (600, 200)]
    await joined.turn()
    assert list(joined.pins.living(now)) == ["ledger300", "written200", "living"]


async def test_a_level_that_was_not_reached_is_not_told(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = Joined(slow)
    await joined.turn()
    slow.found.append(Change(1, 0.0, 0.3, False))

    async def gone(*args: object) -> None:
        raise Unavailable("PostgreSQL does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(slow, "share", gone)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await joined.turn()
    assert {mark.number for mark in slow.told} == {0}
    await joined.turn()
    assert slow.told[-1] == Mark(1, 3)


async def test_one_that_is_taken_for_dead_again_and_again_gives_up_this_turn(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dead(experiment: str, mark: Mark) -> None:
        return None

    monkeypatch.setattr(slow, "beat", dead)
    with pytest.raises(Unavailable, match="too slow"):
        await Joined(slow).turn()


async def test_calls_wait_for_one_turn_together(slow: Slow) -> None:
    joined = Joined(slow)
    await joined.turn()
    joined.ahead, slow.heard = 10.0, 0
    assert await joined.claims(30) == [None] * 30
    assert slow.heard == 1
    joined.ahead, slow.heard = 20.0, 0
    slow.hear_seconds, slow.failing = 0.1, Unavailable("PostgreSQL does not answer")
    assert {type(answer) for answer in await joined.claims(30)} == {Unavailable}
    assert slow.heard == 1


async def test_a_call_does_not_wait_without_limit(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing_module, "WAIT_SECONDS", 0.1)
    slow.ledger_seconds = 1.0
    joined = Joined(slow)
    turn = asyncio.create_task(joined.turn())
    begun = time.monotonic()
    assert {type(answer) for answer in await joined.claims(3)} == {Unavailable}
    assert time.monotonic() - begun < 0.8
    await turn
    assert await joined.claims(3) == [None] * 3


async def test_an_answer_that_came_after_the_lapse_is_not_used(slow: Slow) -> None:
    joined = Joined(slow)
    await joined.turn()
    slow.claim_seconds = 0.1
    asked = asyncio.create_task(joined.claims(1))
    await asyncio.sleep(0.05)
    joined.ahead, slow.heard = 10.0, 0
    assert await asked == [None]
    assert slow.heard == 1
    assert len(joined.pins) == 0


async def test_who_is_refused_a_claim_joins_again(slow: Slow) -> None:
    joined = Joined(slow)
    await joined.turn()
    slow.claimed = None
    assert await joined.claims(1) == [None]
    assert slow.joins == 2
    assert len(joined.pins) == 0
