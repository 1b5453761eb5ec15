"""Several gateways on one PostgreSQL while a canary's share rises: no conversation changes its arm."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable

import pytest

from freehold.errors import FreeholdError, Unavailable
from freehold.gateway.canary import canaries as canaries_module
from freehold.gateway.canary.canaries import Canaries
from freehold.gateway.canary.ledger import ExperimentLedger
from freehold.gateway.config import Settings
from freehold.gateway.keeping import pins as pins_module
from freehold.gateway.keeping import postgres as postgres_module
from freehold.gateway.keeping.pins import SharedPins
from freehold.gateway.keeping.postgres import PostgresStore
from freehold.gateway.routing import crossing as crossing_module
from freehold.gateway.routing.agreement import Change, aa_until
from freehold.gateway.routing.crossing import Agreed, Crossings
from freehold.gateway.routing.router import Router
from freehold.ledger import Row
from tests.canarying import NAME
from tests.routing import SECRET, request

LIVE = 1.0
numbers = itertools.count()


def settings(**more: object) -> Settings:
    """An experiment whose arms are different models."""
    each = {"alias": "chat", "control": "old", "canary": "new", "guardrails": [{"metric": "error"}]}
    return Settings.model_validate(
        {
            "upstreams": {"u": {"url": "http://127.0.0.1:1/v1", "models": {"old": {}, "new": {}}}},
            "models": {"chat": {"arms": [{"name": name, "upstream": "u", "model": name} for name in ("old", "new")]}},
            "experiments": {NAME: each | {"warm_up_requests": 0, "steps": [0.1, 0.3, 0.6, 1.0]} | more},
        }
    )


class Gateway:
    """What of a gateway has to do with arms: its store, its experiments, and the router. agrees: as it should."""

    def __init__(self, dsn: str, found: Settings, agrees: bool = True) -> None:
        self.store = PostgresStore(dsn, 0.02, serving=True)
        self.canaries = Canaries(ExperimentLedger(self.store), found)
        self.crossings = Crossings(found, SharedPins(self.store))
        shared = self.crossings if agrees else None
        self.router = Router(found, SECRET, shared or self.canaries, lambda name, each: {}, crossings=shared)
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> Gateway:
        await self.store.start()
        await self.canaries.advance(NAME)
        await self.crossings.turn(NAME)
        self.tasks = [asyncio.create_task(self.canaries.run()), asyncio.create_task(self.crossings.run())]
        return self

    async def ask(self, conversation: str) -> str:
        """The model that a call of this conversation gets; the call ends at once."""
        asked = request("chat", conversation, conversation=conversation, at=time.time())
        if self.router.crossing:
            await self.router.settle(asked)
        decision = self.router.decide(asked)
        number = f"r{next(numbers)}"
        self.store.append(
            Row(
                row_id=number,
                request_id=number,
                at=asked.at,
                endpoint="chat",
                alias="chat",
                experiment=decision.experiment,
                arm=decision.arm,
                served_arm=decision.arm,
                unit=decision.unit,
                conversation=conversation,
                status=200,
            )
        )
        return decision.targets[0].model_id

    async def rest(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks = []

    async def stop(self) -> None:
        await self.rest()
        await self.store.stop()

    async def die(self) -> None:
        """Without a word."""
        await self.rest()
        await self.store._end_chores()
        assert self.store._writer_task is not None
        self.store._writer_task.cancel()
        await self.store._pool.close()

    def number(self) -> int:
        return self.crossings._places[NAME].mark.number

    def settled(self) -> bool:
        return not self.router.crossing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(crossing_module, "LIVE_SECONDS", LIVE)
    monkeypatch.setattr(pins_module, "LIVE_SECONDS", LIVE)
    monkeypatch.setattr(crossing_module, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(canaries_module, "EVERY_SECONDS", 0.05)


@pytest.fixture
async def start(database: str, quick: None) -> AsyncIterator[Callable[..., Gateway]]:
    made: list[Gateway] = []

    def make(found: Settings | None = None, agrees: bool = True) -> Gateway:
        made.append(Gateway(database, found or settings(), agrees))
        return made[-1]

    yield make
    for gateway in made:
        if gateway.tasks:
            await gateway.stop()


class Traffic:
    """Conversations that begin all the time, each on its own gateways at random, and where they went."""

    def __init__(self, seed: int = 0) -> None:
        self.gateways: list[Gateway] = []
        self.models: defaultdict[str, list[str]] = defaultdict(list)
        self.refused = 0
        self._random = random.Random(seed)
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, at_once: int = 12) -> None:
        self._tasks = [asyncio.create_task(self._talk(number)) for number in range(at_once)]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        for found in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(found, asyncio.CancelledError), found

    async def _talk(self, number: int) -> None:
        open_ = [f"{number}-{n}" for n in range(6)]
        for n in itertools.count(6):
            if self._random.random() < 0.3:
                open_[self._random.randrange(len(open_))] = f"{number}-{n}"
            conversation = self._random.choice(open_)
            both = self._random.sample(self.gateways, min(2, len(self.gateways)))
            # At the same time on two gateways, as the calls of an agent are: the hardest case.
            answers = await asyncio.gather(*(self._ask(each, conversation) for each in both))
            self.models[conversation] += [each for each in answers if each]
            await asyncio.sleep(self._random.random() * 0.01)

    async def _ask(self, gateway: Gateway, conversation: str) -> str:
        try:
            return await gateway.ask(conversation)
        except Unavailable:
            self.refused += 1
            return ""

    @property
    def switched(self) -> list[str]:
        return [name for name, models in self.models.items() if len(set(models)) > 1]


async def force(gateways: list[Gateway]) -> None:
    """The next step, by whichever gateway decides."""
    for gateway in gateways:
        try:
            await gateway.canaries.command(NAME, "force", "me")
        except FreeholdError:
            continue
        return
    raise AssertionError("nobody decides")


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)


async def ramped(gateways: list[Gateway], traffic: Traffic, number: int) -> None:
    """One step, while calls go on, until it is in force everywhere."""
    await force(gateways)
    await until(lambda: all(each.number() >= number and each.settled() for each in gateways))
    begun = len(traffic.models)
    await until(lambda: len(traffic.models) > begun + 20)


async def test_no_conversation_changes_its_arm_when_the_share_rises(start: Callable[..., Gateway]) -> None:
    gateways = [await start().start() for _ in range(2)]
    traffic = Traffic()
    traffic.gateways = gateways
    traffic.begin()
    await until(lambda: len(traffic.models) > 60)
    for number in (1, 2, 3):
        await ramped(gateways, traffic, number)
    await traffic.end()
    assert not traffic.switched
    assert not traffic.refused
    late = list(traffic.models)[-20:]
    assert {model for name in late for model in traffic.models[name]} == {"new"}  # the last step is all of it
    talked = [models for models in traffic.models.values() if len(models) > 10]
    assert {model for models in talked for model in models} == {"old", "new"}


async def test_without_the_agreement_some_do(start: Callable[..., Gateway]) -> None:
    """The traffic of these tests finds the fault that the agreement prevents."""
    gateways = [await start(agrees=False).start() for _ in range(2)]
    traffic = Traffic()
    traffic.gateways = gateways
    traffic.begin()
    await until(lambda: len(traffic.models) > 60)
    for share in (0.3, 0.6):
        await force(gateways)
        await until(lambda share=share: all(_share(each) == share for each in gateways))  # type: ignore[misc]
        begun = len(traffic.models)
        await until(lambda begun=begun: len(traffic.models) > begun + 60)  # type: ignore[misc]
    await traffic.end()
    assert traffic.switched


def _share(gateway: Gateway) -> float:
    plan = gateway.canaries.standing(NAME)
    return plan.share if plan is not None else 0.0


async def test_gateways_come_go_and_die_meanwhile(start: Callable[..., Gateway]) -> None:
    first, second = await start().start(), await start().start()
    traffic = Traffic(1)
    traffic.gateways = [first, second]
    traffic.begin()
    await until(lambda: len(traffic.models) > 60)
    third = start()
    _, ready = await asyncio.gather(force([first, second]), third.start())
    traffic.gateways = [first, second, ready]
    await ramped(traffic.gateways, traffic, 2)
    traffic.gateways = [first, third]
    await asyncio.sleep(0.1)  # its last calls end, and their rows are written
    await second.store.flush()
    await second.die()
    await ramped(traffic.gateways, traffic, 3)
    await traffic.end()
    assert not traffic.switched


async def test_what_a_dead_gateway_knew_is_in_the_ledger(start: Callable[..., Gateway]) -> None:
    first, second = await start().start(), await start().start()
    names = [f"c{number}" for number in range(60)]
    before = {name: await second.ask(name) for name in names}
    assert set(before.values()) == {"old", "new"}
    await second.store.flush()
    await second.die()
    await force([first])
    begun = time.monotonic()
    await until(lambda: first.number() == 1 and first.settled())
    assert time.monotonic() - begun < 4 * LIVE + 10
    assert {name: await first.ask(name) for name in names} == before
    fresh = [await first.ask(f"n{number}") for number in range(200)]
    assert 30 < fresh.count("new") < 90


async def test_one_that_stalls_joins_again_before_it_decides(start: Callable[..., Gateway]) -> None:
    first, second = await start().start(), await start().start()
    await second.rest()  # it hears nothing, and tells nothing
    await force([first])
    await until(lambda: first.number() == 1 and first.settled())
    names = [f"c{number}" for number in range(80)]
    there = {name: await first.ask(name) for name in names}
    assert second.router.crossing
    assert {name: await second.ask(name) for name in names} == there
    assert second.number() == 1


async def test_who_is_taken_for_dead_can_claim_nothing(start: Callable[..., Gateway]) -> None:
    gateway = await start().start()
    shared = SharedPins(gateway.store)
    assert await shared.claim(NAME, "before", True) is True
    assert await shared.claim(NAME, "before", False) is True
    await gateway.rest()
    await asyncio.sleep(LIVE + 0.1)
    assert await shared.claim(NAME, "before", True) is None
    assert await shared.claim(NAME, "after", False) is None
    assert [each.name for each in await shared.shared(NAME, 0.0)] == ["before"]


async def test_without_the_database_what_is_not_known_is_refused(
    start: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start().start()
    models = {name: await gateway.ask(name) for name in map(str, range(20))}
    pinned = next(name for name, model in models.items() if model == "old")

    async def gone(*args: object) -> None:
        raise Unavailable("PostgreSQL does not answer", retry_after=1)

    with monkeypatch.context() as patch:
        patch.setattr(gateway.store, "fetch", gone)
        await until(lambda: gateway.router.crossing)
        assert await gateway.ask(pinned) == "old"
        with pytest.raises(Unavailable):
            await gateway.ask("unknown")
    await until(gateway.settled)
    assert await gateway.ask("unknown") in ("old", "new")


async def test_a_rollback_takes_effect_without_waiting_for_anybody(start: Callable[..., Gateway]) -> None:
    first, second = await start().start(), await start().start()
    await second.rest()
    await force([first])
    await first.canaries.command(NAME, "abort", "me")
    begun = time.monotonic()
    await until(lambda: first.crossings.standing(NAME) == Agreed(0.0))
    assert time.monotonic() - begun < LIVE
    assert {await first.ask(f"c{number}") for number in range(30)} == {"old"}


async def test_who_was_on_an_equal_arm_stays_with_the_control(start: Callable[..., Gateway]) -> None:
    found = settings(aa_units=1000, steps=[0.5, 1.0])
    first, second = await start(found).start(), await start(found).start()
    names = [f"c{number}" for number in range(40)]
    assert {await first.ask(name) for name in names} == {"old"}
    await first.store.flush()
    await first.die()
    await until(lambda: second.canaries._running[NAME].canary is not None, seconds=30.0)
    await force([second])
    await until(lambda: second.crossings.standing(NAME) == Agreed(0.5))
    third = await start(found).start()
    for gateway in (second, third):
        assert {await gateway.ask(name) for name in names} == {"old"}
        assert {await gateway.ask(f"n{number}") for number in range(40)} == {"old", "new"}


def test_the_end_of_the_last_run_of_equal_arms() -> None:
    equal, begun = Change(0, 1.0, 0.5, True), Change(1, 2.0, 0.5, False)
    assert aa_until([]) == aa_until([begun]) == float("-inf")
    assert aa_until([equal, begun, Change(2, 3.0, 1.0, False)]) == 2.0
    assert aa_until([equal, begun, Change(2, 3.0, 0.5, True)]) == float("inf")


async def test_one_gateway_decides_and_another_when_it_dies(start: Callable[..., Gateway]) -> None:
    gateways = [await start().start() for _ in range(3)]
    for name in range(300):
        await gateways[name % 3].ask(f"c{name}")
    await until(lambda: sum(each.canaries._running[NAME].canary is not None for each in gateways) == 1)
    await force(gateways)
    (leader,) = [each for each in gateways if each.canaries._running[NAME].canary is not None]
    await leader.die()
    others = [each for each in gateways if each is not leader]
    await until(lambda: sum(each.canaries._running[NAME].canary is not None for each in others) == 1)
    await force(others)
    await until(lambda: all(_share(each) == 0.6 for each in others))
    records = await ExperimentLedger(others[0].store).records(NAME)
    assert [record.number for record in records] == list(range(len(records)))
    assert [record.kind for record in records].count("start") == 1
    assert (await others[0].canaries.replayed(NAME))["same"]


async def test_a_gateway_that_stops_gives_way_at_once(start: Callable[..., Gateway]) -> None:
    first = await start().start()
    second = await start().start()
    assert first.canaries._running[NAME].canary is not None
    await first.stop()
    await until(lambda: second.canaries._running[NAME].canary is not None, seconds=5.0)
    assert await second.store.fetch("SELECT DISTINCT writer FROM followers") == [(second.store.writer,)]
