"""A call takes a place, a share of its rates and of its budget, or none of them; and gives back what it did not use."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from freehold.errors import BudgetExhausted, RateLimited, Unavailable
from freehold.gateway.access.admission import Admission, open_admission
from freehold.gateway.access.budget import LocalBudgets
from freehold.gateway.call import Caller, Decision, Price, Request, Target
from freehold.gateway.keeping.records import Usage, day_of
from freehold.gateway.keeping.store import Store
from tests.unit.gateway.ledger_rows import NOON, row
from tests.unit.gateway.settings_text import settings
from tests.unit.gateway.test_budget import Journal

TARGETS = Decision((Target("local", "m", price=Price(input=1_000_000, output=1_000_000)),))  # a micro-dollar a token


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def call(caller: Caller, size: int = 40, max_tokens: int | None = 10) -> Request:
    return Request("r", NOON, "chat", caller, "glm", b"x" * size, max_tokens=max_tokens)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def admission(clock: Clock, journal: Journal) -> Admission:
    return Admission(settings(), LocalBudgets(journal), lambda: "", clock)


async def test_a_key_without_limits_is_admitted(admission: Admission, journal: Journal) -> None:
    ticket = await admission.admit(call(Caller("k")), TARGETS)
    assert ticket.headers == ()
    assert not journal.open
    admission.settle(ticket, [row(cost=5)])
    assert isinstance(admission.budgets, LocalBudgets)
    assert admission.budgets.usage("key:k", day_of(NOON)) == Usage("key:k", 5, 0)  # counted all the same


async def test_no_more_calls_at_once_than_allowed(admission: Admission) -> None:
    caller = Caller("k", max_concurrent=2)
    tickets = [await admission.admit(call(caller), TARGETS) for _ in range(2)]
    with pytest.raises(RateLimited, match="all 2 calls") as refusal:
        await admission.admit(call(caller), TARGETS)
    assert refusal.value.retry_after
    admission.settle(tickets[0], [])
    admission.settle(tickets[0], [])  # counts once
    await admission.admit(call(caller), TARGETS)
    with pytest.raises(RateLimited):
        await admission.admit(call(caller), TARGETS)
    await admission.admit(call(Caller("other", max_concurrent=1)), TARGETS)


async def test_requests_a_minute(admission: Admission, clock: Clock) -> None:
    caller = Caller("k", requests_per_minute=2)
    first = await admission.admit(call(caller), TARGETS)
    assert dict(first.headers)[b"x-ratelimit-remaining-requests"] == b"1"
    await admission.admit(call(caller), TARGETS)
    with pytest.raises(RateLimited, match="2 requests a minute") as refusal:
        await admission.admit(call(caller), TARGETS)
    assert refusal.value.retry_after == pytest.approx(30)
    headers = dict(refusal.value.headers)
    assert (headers[b"retry-after"], headers[b"x-should-retry"]) == (b"30", b"true")
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    admission.settle(first, [])
    with pytest.raises(RateLimited):  # a call that ended was a request all the same
        await admission.admit(call(caller), TARGETS)
    clock.now += 30
    await admission.admit(call(caller), TARGETS)


async def test_tokens_a_minute_are_those_used(admission: Admission) -> None:
    caller = Caller("k", tokens_per_minute=100)
    ticket = await admission.admit(call(caller), TARGETS)  # 40 bytes and 10 tokens: 20
    assert dict(ticket.headers)[b"x-ratelimit-remaining-tokens"] == b"80"
    admission.settle(ticket, [row(input_tokens=70, output_tokens=25), row(input_tokens=9, shadow_of="r")])
    ticket = await admission.admit(call(caller, 8, 1), TARGETS)
    assert dict(ticket.headers)[b"x-ratelimit-remaining-tokens"] == b"2"
    with pytest.raises(RateLimited, match="100 tokens a minute"):
        await admission.admit(call(caller), TARGETS)


async def test_a_refused_call_takes_nothing(admission: Admission, journal: Journal) -> None:
    caller = Caller("k", "search", max_concurrent=1, requests_per_minute=1, tokens_per_minute=100, budget_per_day=45)
    with pytest.raises(BudgetExhausted):
        await admission.admit(call(caller), TARGETS)
    assert not journal.open
    # The place and the tokens are free again; the request counts.
    ticket = await admission.admit(call(replace(caller, requests_per_minute=None, budget_per_day=50)), TARGETS)
    assert dict(ticket.headers)[b"x-ratelimit-remaining-tokens"] == b"80"


async def test_money_is_reserved_and_settled(admission: Admission, journal: Journal) -> None:
    caller = Caller("k", "search", budget_per_day=100, team_budget_per_day=60)
    ticket = await admission.admit(call(caller), TARGETS)
    (reserved,) = journal.open.values()
    assert (reserved.amount, reserved.scopes) == (50, ("key:k", "team:search"))
    with pytest.raises(BudgetExhausted, match="team 'search'"):
        await admission.admit(call(caller), TARGETS)
    admission.settle(ticket, [row(team="search", cost=3)])
    assert not journal.open
    await admission.admit(call(caller), TARGETS)  # 3 + 50
    with pytest.raises(BudgetExhausted):
        await admission.admit(call(caller), TARGETS)


async def test_an_unknown_cost_stays_reserved(admission: Admission, journal: Journal) -> None:
    caller = Caller("k", budget_per_day=60)
    ticket = await admission.admit(call(caller), TARGETS)
    admission.settle(ticket, [row(status=200, cost=None)])
    assert len(journal.open) == 1
    with pytest.raises(BudgetExhausted):
        await admission.admit(call(caller), TARGETS)


async def test_a_request_without_a_limit_may_cost_the_aliass(admission: Admission, journal: Journal) -> None:
    await admission.admit(call(Caller("k", budget_per_day=1000), max_tokens=None), TARGETS)
    assert [each.amount for each in journal.open.values()] == [140]
    admission.configure(settings().model_copy(update={"models": {}}))
    with pytest.raises(BudgetExhausted):
        await admission.admit(call(Caller("k", budget_per_day=1000), max_tokens=None), TARGETS)


async def test_nothing_is_admitted_that_cannot_be_written_down(clock: Clock) -> None:
    admission = Admission(settings(), LocalBudgets(Journal()), lambda: "disk full", clock)
    with pytest.raises(Unavailable, match="written down"):
        await admission.admit(call(Caller("k")), TARGETS)


async def test_the_next_process_goes_on_with_what_was_spent(store: Store) -> None:
    caller = Caller("k", "search", budget_per_day=100)
    admission = await open_admission(store, settings(), NOON)
    running = await admission.admit(call(caller), TARGETS)
    done = await admission.admit(call(caller), TARGETS)
    spent = row(team="search", cost=20)
    store.append(spent)
    admission.settle(done, [spent])
    await store.flush()
    again = await open_admission(store, settings(), NOON)
    with pytest.raises(BudgetExhausted, match=r"\$0.00002 are spent, \$0.00005 reserved"):
        await again.admit(call(caller), TARGETS)
    admission.settle(running, [])
    await store.flush()
    await (await open_admission(store, settings(), NOON)).admit(call(caller), TARGETS)


async def test_an_aborted_wait_gives_its_place_back(clock: Clock) -> None:
    class Slow(LocalBudgets):
        async def reserve(self, *_: object) -> None:
            await asyncio.sleep(60)

    admission = Admission(settings(), Slow(Journal()), lambda: "", clock)
    caller = Caller("k", max_concurrent=1, budget_per_day=100)
    waiting = asyncio.create_task(admission.admit(call(caller), TARGETS))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await admission.admit(call(replace(caller, budget_per_day=None)), TARGETS)


@pytest.mark.parametrize("where", ["the ledger", "the budgets"])
async def test_callers_are_not_told_what_is_wrong_with_the_database(
    where: str, journal: Journal, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone(LocalBudgets):
        async def reserve(self, *_: object) -> None:
            raise Unavailable(words)

    words = "/var/lib/ledger.sqlite3: INSERT INTO calls ...: disk I/O error"
    budgets = LocalBudgets(journal) if where == "the ledger" else Gone(journal)
    admission = Admission(settings(), budgets, lambda: words if where == "the ledger" else "", clock)
    for _ in range(3):
        with pytest.raises(Unavailable) as refusal:
            await admission.admit(call(Caller("k", budget_per_day=1000, max_concurrent=1)), TARGETS)
        assert "sqlite3" not in refusal.value.message
        assert refusal.value.retry_after
    assert [record.getMessage() for record in caplog.records] == [f"calls are refused: {words}"]
