"""Reserve, then settle: no interleaving of calls overspends a budget or loses money, in memory or in PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from freehold.errors import BudgetExhausted
from freehold.gateway.access.budget import Limit, LocalBudgets, SharedBudgets, bound, dollars, spent_by
from freehold.gateway.call import Caller, Price, Request, Target
from freehold.gateway.identity import new_id
from freehold.gateway.keeping.postgres import PostgresStore
from freehold.gateway.keeping.records import Reservation, Usage, day_of
from tests.unit.gateway.ledger_rows import NOON, row

DAY = day_of(NOON)
KEY, TEAM = "key:k", "team:t"


class Journal:
    """What a store would have on disk."""

    def __init__(self) -> None:
        self.open: dict[str, Reservation] = {}

    def reserve(self, reservation: Reservation) -> None:
        self.open[reservation.id] = reservation

    def release(self, reservation_id: str) -> None:
        del self.open[reservation_id]


def reservation(amount: int, scopes: Sequence[str] = (KEY,)) -> Reservation:
    return Reservation(new_id(), tuple(scopes), DAY, amount, NOON)


def request(body: bytes = b"x" * 1000, **changes: object) -> Request:
    fields = {"request_id": "r", "at": NOON, "endpoint": "chat", "caller": Caller("k"), "alias": "glm", "body": body}
    return Request(**{**fields, **changes})  # type: ignore[arg-type]


CHEAP = Target("u", "m", price=Price(input=600_000, cached_input=100_000, output=2_200_000))
DEAR = Target("v", "n", price=Price(input=5_000_000, output=25_000_000))


@pytest.mark.parametrize(
    ("changes", "targets", "micro_dollars"),
    [
        ({"max_tokens": 100}, [CHEAP], 600 + 220),
        ({"max_tokens": 100, "choices": 3}, [CHEAP], 600 + 660),
        ({}, [CHEAP], 600 + 110),  # the alias's cap of 50
        ({"max_tokens": 100}, [CHEAP, DEAR], 5000 + 2500),  # whoever answers
        ({"max_tokens": 1, "body": b"x"}, [CHEAP], 1 + 3),  # rounded up, each
        ({"endpoint": "embeddings"}, [CHEAP], 600),
        ({"max_tokens": 0}, [], 0),
        ({"max_tokens": 10**30}, [CHEAP], 2**53),  # as much as a database can add up
        ({"max_tokens": 0}, [Target("u", "m", price=Price(input=1_000_000, cached_input=1_250_000))], 1250),
    ],
)
def test_the_bound_of_a_call(changes: dict[str, object], targets: list[Target], micro_dollars: int) -> None:
    assert bound(request(**changes), targets, cap=50) == micro_dollars


def test_what_a_call_has_cost() -> None:
    assert spent_by([]) == (0, False)
    assert spent_by([row(status=200, cost=5), row(status=200, cost=7), row(cost=9, shadow_of="r")]) == (12, False)
    assert spent_by([row(status=0, error="connect"), row(status=500), row(status=200, cost=7)]) == (7, False)
    assert spent_by([row(status=200)]) == (0, True)


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "$0.00"), (5_000_000, "$5.00"), (1_234_567_890, "$1,234.56789"), (1, "$0.000001")]
)
def test_dollars(amount: int, text: str) -> None:
    assert dollars(amount) == text


async def test_the_first_calls_at_once_share_what_is_there() -> None:
    budgets = LocalBudgets(Journal())
    answers = await asyncio.gather(
        *(budgets.reserve(reservation(30), [Limit(KEY, 100)]) for _ in range(10)), return_exceptions=True
    )
    assert answers.count(None) == 3
    refused = [answer for answer in answers if isinstance(answer, BudgetExhausted)]
    assert len(refused) == 7
    assert all(error.retry_after == 1.0 and "running calls" in error.message for error in refused)


async def test_a_spent_budget_says_not_to_try_again_today() -> None:
    budgets = LocalBudgets(Journal())
    budgets.load([Usage(KEY, 90, 0)], DAY)
    with pytest.raises(BudgetExhausted, match=r"\$0.00009 are spent.*lower max_tokens") as refusal:
        await budgets.reserve(reservation(30), [Limit(KEY, 100)])
    assert refusal.value.retry_after is None
    await budgets.reserve(reservation(10), [Limit(KEY, 100)])
    await budgets.reserve(Reservation("1", (KEY,), DAY + 1, 100, NOON), [Limit(KEY, 100)])  # another day


async def test_of_two_budgets_both_or_none() -> None:
    journal = Journal()
    budgets = LocalBudgets(journal)
    limits = [Limit(KEY, 1000), Limit(TEAM, 50)]
    with pytest.raises(BudgetExhausted, match="team 't'"):
        await budgets.reserve(reservation(60, (KEY, TEAM)), limits)
    assert (budgets.usage(KEY, DAY), journal.open) == (Usage(KEY, 0, 0), {})


def test_what_a_crash_left_stays_reserved() -> None:
    budgets = LocalBudgets(Journal())
    budgets.load([Usage(KEY, 10, 60)], DAY)
    with pytest.raises(BudgetExhausted):
        asyncio.run(budgets.reserve(reservation(40), [Limit(KEY, 100)]))
    asyncio.run(budgets.reserve(reservation(30), [Limit(KEY, 100)]))


async def test_old_days_are_forgotten_when_a_new_one_begins() -> None:
    """But for yesterday's, whose calls may still run; a call that ran for longer is settled all the same."""
    budgets, journal = LocalBudgets(kept := Journal()), kept

    def on(day: int, amount: int = 30) -> Reservation:
        return Reservation(new_id(), (KEY,), day, amount, NOON)

    longest = on(DAY)
    await budgets.reserve(longest, [Limit(KEY, 100)])
    for day in range(DAY, DAY + 30):
        each = on(day)
        await budgets.reserve(each, [Limit(KEY, 100)])
        budgets.settle(each, [KEY, TEAM], day, 20, keep=False)
        assert budgets.usage(KEY, day).spent == 20
    assert budgets.usage(KEY, DAY + 28) == Usage(KEY, 20, 0)
    assert budgets.usage(KEY, DAY + 27) == budgets.usage(KEY, DAY) == Usage(KEY, 0, 0)
    assert len(budgets._spent) == 4
    assert len(budgets._reserved) == 2
    budgets.settle(longest, [KEY, TEAM], DAY, 20, keep=False)
    assert not journal.open
    assert len(budgets._spent) == 4
    assert len(budgets._reserved) == 2
    # A key without a budget reserves nothing, and is counted all the same: its days turn too.
    budgets.settle(None, [TEAM], DAY + 31, 5, keep=False)
    assert {day for _, day in (*budgets._spent, *budgets._reserved)} == {DAY + 31}


def at_once(answer: Coroutine[None, None, None]) -> None:
    """Run what must never wait: an await in it would let another call come between looking and taking."""
    with pytest.raises(StopIteration):
        answer.send(None)


class Interleaved(RuleBasedStateMachine):
    """Calls begin, end, are aborted and crash in any order; a model that adds up says what must come out."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal()
        self.budgets = LocalBudgets(self.journal)
        self.limits = {KEY: 1000, TEAM: 1500}
        self.spent = dict.fromkeys(self.limits, 0)
        self.held: dict[str, Reservation] = {}

    @rule(target=running, amount=st.integers(0, 600), scopes=st.sampled_from([(KEY,), (TEAM,), (KEY, TEAM)]))
    def begin(self, amount: int, scopes: tuple[str, ...]) -> Reservation | None:
        wanted = reservation(amount, scopes)
        fits = all(self.taken(scope) + amount <= self.limits[scope] for scope in scopes)
        try:
            at_once(self.budgets.reserve(wanted, [Limit(scope, self.limits[scope]) for scope in scopes]))
        except BudgetExhausted:
            assert not fits
            return None
        assert fits
        self.held[wanted.id] = wanted
        return wanted

    @rule(call=consumes(running), part=st.floats(0, 1), keep=st.booleans())
    def end(self, call: Reservation | None, part: float, keep: bool) -> None:
        if call is not None:
            cost = round(call.amount * part)
            self.budgets.settle(call, call.scopes, DAY, cost, keep)
            for scope in call.scopes:
                self.spent[scope] += cost
            if not keep:
                del self.held[call.id]

    @rule(target=running)
    def crash(self) -> None:
        """The store has what was spent and what is open; whoever comes next takes it up. Calls end unseen."""
        open_now = list(self.journal.open.values())
        usage = [
            Usage(scope, self.spent[scope], sum(each.amount for each in open_now if scope in each.scopes))
            for scope in self.limits
        ]
        self.budgets = LocalBudgets(self.journal)
        self.budgets.load(usage, DAY)

    def taken(self, scope: str) -> int:
        return self.spent[scope] + sum(each.amount for each in self.held.values() if scope in each.scopes)

    @invariant()
    def nothing_is_lost(self) -> None:
        for scope, spent in self.spent.items():
            usage = self.budgets.usage(scope, DAY)
            assert usage.spent == spent
            assert usage.spent + usage.reserved == self.taken(scope)
        assert self.journal.open == self.held


TestInterleaved = Interleaved.TestCase


@given(
    calls=st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), max_size=30),
    limit=st.integers(0, 300),
)
def test_what_is_spent_never_passes_the_budget(calls: list[tuple[int, float]], limit: int) -> None:
    """All start together and cost at most their bound: however many there are, the sum stays within the budget."""
    budgets = LocalBudgets(Journal())

    async def call(amount: int, part: float) -> None:
        mine = reservation(amount)
        try:
            await budgets.reserve(mine, [Limit(KEY, limit)])
        except BudgetExhausted:
            return
        await asyncio.sleep(0)
        budgets.settle(mine, (KEY,), DAY, int(amount * part), keep=False)

    async def storm() -> None:
        await asyncio.gather(*(call(amount, part) for amount, part in calls))

    asyncio.run(storm())
    usage = budgets.usage(KEY, DAY)
    assert usage.spent <= limit
    assert usage.reserved == 0


async def test_several_gateways_share_a_budget(database: str) -> None:
    """A storm on three gateways: the sum never passes the budget, and all that was not spent comes back."""
    stores = [PostgresStore(database, flush_seconds=0.01) for _ in range(3)]
    await asyncio.gather(*(store.start() for store in stores))
    gateways = [SharedBudgets(store) for store in stores]
    admitted = refused = 0

    async def call(number: int) -> None:
        nonlocal admitted, refused
        store, budgets = stores[number % 3], gateways[number % 3]
        mine = reservation(40, (KEY, TEAM))
        try:
            await budgets.reserve(mine, [Limit(KEY, 500), Limit(TEAM, 1000)])
        except BudgetExhausted:
            refused += 1
            return
        admitted += 1
        used = (await stores[0].usage(DAY))[0]
        assert used.spent + used.reserved <= 500
        store.append(row(team="t", cost=7))
        budgets.settle(mine, (KEY, TEAM), DAY, 7, keep=False)

    for _ in range(6):
        await asyncio.gather(*(call(number) for number in range(30)))
        await asyncio.gather(*(store.flush() for store in stores))
    assert admitted + refused == 180
    assert refused
    assert await stores[0].usage(DAY) == [Usage(KEY, 7 * admitted, 0), Usage(TEAM, 7 * admitted, 0)]
    # A call of another team of the same key meets the key's budget alone; limits that are None do not limit.
    left = 500 - 7 * admitted
    await gateways[0].reserve(reservation(left, (KEY,)), [Limit(KEY, 500)])
    with pytest.raises(BudgetExhausted, match="key 'k'"):
        await gateways[1].reserve(reservation(1, (KEY,)), [Limit(KEY, 500)])
    await gateways[1].reserve(reservation(1, (KEY,)), [Limit(KEY, None)])
    for store in stores:
        await store.stop()
