"""Experiments over a ledger: fed in its order, obeying operators, the same after a restart or on another gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from freehold.errors import FreeholdError, InvalidRequest, NotFound, Unavailable
from freehold.gateway.canary import canaries as canaries_module
from freehold.gateway.canary.canaries import AT_ONCE, Canaries
from freehold.gateway.canary.machine import Canary
from freehold.gateway.canary.record import Plan, Record
from freehold.gateway.parts import Asked
from freehold.ledger import Note
from tests.canarying import NAME, LedgerOf, MemoryLedger, experiment, row, settings, traffic

EACH = experiment("error")


class Now:
    """A clock that is set."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def gateway(ledger: MemoryLedger, now: Now, name: str = "a", changes: list[Record] | None = None) -> Canaries:
    told = changes if changes is not None else []
    return Canaries(ledger.of(name), settings(EACH), clock=now, on_change=told.append)


async def asked(canaries: Canaries, route: str, names: Mapping[str, str], **query: str) -> dict[str, object]:
    method, path = route.split(" ")
    answer = await canaries.routes()[route](Asked(method, path, query, {}, b"", names=names))
    found: dict[str, object] = msgspec.json.decode(answer.body)
    return found


async def test_a_failing_canary_is_rolled_back_and_the_router_hears_of_it() -> None:
    ledger, now, changes = MemoryLedger(), Now(), list[Record]()
    canaries = gateway(ledger, now, changes=changes)
    assert canaries.standing(NAME) is None
    await canaries.advance(NAME)
    assert canaries.standing(NAME) == Plan("ramping", 0.05)
    ledger.all_rows += traffic(20_000, 0.05, 0.0, fails=(0.01, 0.2))
    now.at = 60.0
    await canaries.advance(NAME)
    assert canaries.standing(NAME) == Plan("rolled_back", 0.0)
    assert [record.state for record in changes] == ["rolled_back"]
    assert [record.number for record in ledger.all_records] == list(range(len(ledger.all_records)))
    again = await canaries.replayed(NAME)
    assert (again["same"], again["state"], again["decisions"]) == (True, "rolled_back", 1)
    assert canaries.standing("another") is None


async def test_a_restart_goes_on_where_it_was() -> None:
    ledger, now = MemoryLedger(), Now()
    rows = list(traffic(20_000, 0.05, 0.0, fails=(0.01, 0.04)))
    straight = gateway(whole := MemoryLedger(), now)
    await straight.advance(NAME)
    whole.all_rows += rows
    await straight.advance(NAME)
    for cut in (0, 2_500, 6_000, 20_000):
        ledger.all_rows = rows[:cut]
        restarted = gateway(ledger, now, name=f"after {cut}")
        await restarted.advance(NAME)
    assert ledger.all_records == whole.all_records
    assert ledger.all_records[-1].state == "rolled_back"
    assert sum(record.kind == "start" for record in ledger.all_records) == 1


async def test_calls_get_their_turn_while_many_rows_are_counted() -> None:
    ledger = MemoryLedger()
    canaries = gateway(ledger, Now())
    await canaries.advance(NAME)
    ledger.all_rows += traffic(4_000, 0.05, 0.0)
    counting = asyncio.create_task(canaries.advance(NAME))
    turns = 0
    while not counting.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 4_000 / AT_ONCE
    status = await canaries.status(NAME)
    assert status["compared"] == sum(each.arm == "new" for each in ledger.all_rows)


async def test_a_look_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, at whichever look: the decision is the one that would have been, and can be replayed."""
    rows = list(traffic(20_000, 0.05, 0.0, fails=(0.01, 0.025)))
    feedback = [Note(row_id=each.row_id, at=0.0, name="feedback", value=0.5) for each in rows[:9000]]
    each = experiment("error", "feedback")

    async def run(fault: Callable[[MemoryLedger], None]) -> tuple[list[Record], dict[str, Any], list[str]]:
        ledger, faults = MemoryLedger(page=700), list[str]()
        fault(ledger)
        canaries = Canaries(ledger.of("a"), settings(each), clock=Now())
        await canaries.advance(NAME)
        ledger.all_rows, ledger.all_notes = rows, feedback
        for _ in range(6):
            try:
                await canaries.advance(NAME)
            except Exception as error:
                faults.append(str(error))
        monkeypatch.undo()
        return ledger.all_records, await canaries.replayed(NAME), faults

    def of_the_look(*numbers: int) -> Callable[[MemoryLedger], None]:
        def prepare(ledger: MemoryLedger) -> None:
            look, count = Canary.look, iter(range(1000))

            def fails(self: Canary, at: float) -> None:
                if next(count) in numbers:
                    raise ArithmeticError("fault")
                look(self, at)

            monkeypatch.setattr(Canary, "look", fails)

        return prepare

    def of_the_store(error: Exception, *numbers: int, after: bool = False) -> Callable[[MemoryLedger], None]:
        def prepare(ledger: MemoryLedger) -> None:
            add, count = LedgerOf.add, iter(range(1000))

            async def fails(self: LedgerOf, record: Record) -> None:
                failing = next(count) in numbers
                if after or not failing:
                    await add(self, record)
                if failing:
                    raise error

            monkeypatch.setattr(LedgerOf, "add", fails)

        return prepare

    straight, again, faults = await run(lambda ledger: None)
    assert (again["same"], faults, straight[-1].state) == (True, [], "rolled_back")
    for fault in (
        of_the_look(0),
        of_the_look(4, 5, 9),
        of_the_look(len(straight) - 2),
        of_the_store(OSError("fault"), 2, 3),
        of_the_store(Unavailable("fault"), 2, 3),
        of_the_store(OSError("fault"), 4, after=True),
    ):
        records, again, faults = await run(fault)
        assert faults
        assert again["same"], again
        looks = [[(each.kind, each.rows, each.requests, each.state) for each in found] for found in (records, straight)]
        assert looks[0] == looks[1]


async def test_an_experiment_that_fails_rests_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(canaries_module, "EVERY_SECONDS", 0.001)
    canaries, tries = gateway(MemoryLedger(), Now()), list[str]()

    async def advance(name: str) -> None:
        tries.append(name)
        raise ArithmeticError("fault")

    monkeypatch.setattr(canaries, "advance", advance)
    for rest in (0.0, 60.0):
        monkeypatch.setattr(canaries_module, "REST_SECONDS", rest)
        tries.clear()
        running = asyncio.create_task(canaries.run())
        while len(tries) < 3 and (not rest or not tries):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert len(tries) >= 3 if not rest else len(tries) == 1
    assert "stands still" in caplog.text


async def test_a_fault_whose_records_cannot_be_written_either_is_raised_and_rests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = MemoryLedger()
    canaries = gateway(ledger, Now())
    await canaries.advance(NAME)
    ledger.all_rows += traffic(20_000, 0.05, 0.0)
    look, looks = Canary.look, list[float]()

    def fails_later(self: Canary, at: float) -> None:
        looks.append(at)
        if len(looks) == 2:
            raise ArithmeticError("fault")
        look(self, at)  # its record is written after the fault

    async def refuses(self: LedgerOf, record: Record) -> None:
        raise Unavailable("no disk")

    monkeypatch.setattr(Canary, "look", fails_later)
    monkeypatch.setattr(LedgerOf, "add", refuses)
    monkeypatch.setattr(canaries_module, "EVERY_SECONDS", 0.001)
    running = asyncio.create_task(canaries.run())
    async with asyncio.timeout(20.0):
        while "stands still" not in caplog.text:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert len(looks) == 2  # it rests
    assert "no disk" in caplog.text
    assert "ArithmeticError: fault" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(canaries_module, "EVERY_SECONDS", 0.001)
    canaries.configure(settings(EACH))  # nothing new: it rests on
    await asyncio.sleep(0.05)
    assert len(ledger.all_records) == 1
    canaries.configure(settings(experiment("error", steps=[0.1, 1.0])))
    async with asyncio.timeout(20.0):
        while len(ledger.all_records) < 2:
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert ledger.all_records[1].kind == "start"


async def test_notes_come_after_their_rows_whatever_is_read_first() -> None:
    ledger, now = MemoryLedger(), Now()
    canaries = Canaries(ledger.of("a"), settings(experiment("error", "feedback")), clock=now)
    await canaries.advance(NAME)
    for part in range(4):
        fresh = list(traffic(1500, 0.05, 0.0, first=1500 * part))
        ledger.all_rows += fresh
        ledger.all_notes += [Note(row_id=each.row_id, at=0.0, name="feedback", value=0.5) for each in fresh]
        await canaries.advance(NAME)
    assert (await canaries.replayed(NAME))["same"]
    status = await canaries.status(NAME)
    assert status["compared"] == sum(each.arm == "new" for each in ledger.all_rows)


async def test_one_of_two_gateways_decides_and_the_other_follows() -> None:
    ledger, now = MemoryLedger(), Now()
    first, second = gateway(ledger, now, "a"), gateway(ledger, now, "b")
    ledger.leader = "a"
    await first.advance(NAME)
    await second.advance(NAME)
    assert second.standing(NAME) == Plan("ramping", 0.05)
    with pytest.raises(InvalidRequest, match="another gateway decides"):
        await second.command(NAME, "abort", "ann")
    await first.command(NAME, "force", "ann")
    await second.advance(NAME)
    assert second.standing(NAME) == Plan("ramping", 0.25)
    ledger.leader = "b"
    await second.command(NAME, "abort", "ann")
    await first.advance(NAME)
    assert first.standing(NAME) == Plan("rolled_back", 0.0)
    assert (await first.replayed(NAME))["same"]


async def test_two_that_both_believe_they_lead_write_no_two_records_of_one_number() -> None:
    ledger, now = MemoryLedger(), Now()
    first, second = gateway(ledger, now, "a"), gateway(ledger, now, "b")
    await first.advance(NAME)
    await second.advance(NAME)
    await first.command(NAME, "force", "ann")
    with pytest.raises(FreeholdError, match="is there already"):
        await second.command(NAME, "abort", "bob")
    assert second.standing(NAME) == Plan("ramping", 0.05)  # nothing is acted upon that was not written
    await second.advance(NAME)
    assert second.standing(NAME) == Plan("ramping", 0.25)


async def test_changed_settings_start_it_again_and_others_do_not() -> None:
    ledger, now = MemoryLedger(), Now()
    canaries = gateway(ledger, now)
    await canaries.advance(NAME)
    ledger.all_rows += traffic(3000, 0.05, 0.0)
    await canaries.advance(NAME)
    canaries.configure(settings(EACH))
    await canaries.advance(NAME)
    assert sum(record.kind == "start" for record in ledger.all_records) == 1
    canaries.configure(settings(experiment("error", steps=[0.1, 1.0])))
    now.at = 100.0
    await canaries.advance(NAME)
    assert canaries.standing(NAME) == Plan("ramping", 0.1)
    assert [record.kind for record in ledger.all_records].count("start") == 2
    ledger.all_rows += traffic(3000, 0.1, 100.0, first=3000)
    await canaries.advance(NAME)
    assert (await canaries.replayed(NAME))["same"]
    canaries.configure(settings(None))
    assert canaries.standing(NAME) is None


async def test_a_ledger_that_was_changed_is_found() -> None:
    ledger, now = MemoryLedger(), Now()
    canaries = gateway(ledger, now)
    await canaries.advance(NAME)
    ledger.all_rows += traffic(3000, 0.05, 0.0)
    await canaries.advance(NAME)
    index = next(i for i, each in enumerate(ledger.all_rows) if each.arm == "new" and not each.error)
    ledger.all_rows[index] = msgspec.structs.replace(ledger.all_rows[index], error="cut")
    again = await canaries.replayed(NAME)
    assert not again["same"]
    assert again["differing"]


async def test_the_admin_api() -> None:
    ledger, now = MemoryLedger(), Now()
    canaries = gateway(ledger, now)
    await canaries.advance(NAME)
    ledger.all_rows += traffic(3000, 0.05, 0.0)
    await canaries.advance(NAME)
    listed = await asked(canaries, "GET /admin/experiments", {})
    one = await asked(canaries, "GET /admin/experiments/{name}", {"name": NAME})
    assert listed == {"experiments": [one]}
    look = one["look"]
    assert isinstance(look, dict)
    assert {each["metric"] for each in look["guardrails"]} == {"error"}
    assert look["guardrails"][0]["detectable"] > 0
    command = "POST /admin/experiments/{name}/{command}"
    paused = await asked(canaries, command, {"name": NAME, "command": "pause"}, by="ann")
    assert (paused["state"], paused["by"], paused["reason"]) == ("hold", "ann", "pause by ann")
    again = await asked(canaries, "GET /admin/experiments/{name}/replay", {"name": NAME})
    assert again["same"]
    with pytest.raises(InvalidRequest, match="none of pause, resume"):
        await asked(canaries, command, {"name": NAME, "command": "promote"})
    with pytest.raises(NotFound, match="no experiment 'x'"):
        await asked(canaries, command, {"name": "x", "command": "pause"})


async def test_rows_of_other_experiments_are_passed_over() -> None:
    ledger, now = MemoryLedger(), Now()
    canaries = gateway(ledger, now)
    await canaries.advance(NAME)
    ledger.all_rows = [row(n, "new", 10.0, experiment="other") for n in range(100)]
    ledger.all_rows += traffic(300, 0.05, 0.0, first=100)
    await canaries.advance(NAME)
    assert (await canaries.status(NAME))["compared"] == sum(each.arm == "new" for each in ledger.all_rows[100:])
