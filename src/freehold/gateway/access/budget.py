"""Budgets by key and team and UTC day: reserve what a call may cost at most, then settle what it did cost.

A call is admitted only if what is spent, what running calls have reserved and what it may cost itself stay within the
budget. So calls that come at once, long streams and aborted ones cannot overspend it: it is passed only where a call
costs more than its bound, and by that difference.

    bound      input: no token is shorter than a byte of the body; output: `max_tokens`, or the alias's
               `max_output_tokens`, which the upstream is then told; times the choices, at the dearest of the targets
               that may answer
    spent      what the rows say: the sum of `cost`, by the day of the request; mirrored calls are not the key's
    unknown    an answered call whose tokens nobody could count stays reserved in full until the day ends
    kill -9    what running calls had reserved stays reserved for its day: they may have cost that much. The store has
               both, at most its flush window old

What a body only points at (an image by its address, an earlier response) is not bounded by its bytes: it is charged
when the upstream has counted it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from freehold.errors import BudgetExhausted
from freehold.gateway.call import Request, Target
from freehold.gateway.keeping.records import DAY_SECONDS, Reservation, Usage
from freehold.ledger import Row

PER_MILLION = 1_000_000
MOST = 2**53  # micro-dollars that a call is ever said to cost: sums of it stay within a database's integers
SOON_SECONDS = 1.0  # running calls may give back enough by then


def bound(request: Request, targets: Sequence[Target], cap: int) -> int:
    """Micro-dollars that a call costs at most. cap: output tokens of a request that sets no limit."""
    if request.endpoint == "embeddings":
        output_tokens = 0
    else:
        output_tokens = (cap if request.max_tokens is None else request.max_tokens) * max(1, request.choices)
    input_tokens = len(request.body)
    dearest = 0
    for target in targets:
        price = target.price
        a_token_in = max(price.input, price.cached_input or 0)
        dearest = max(
            dearest, -(-input_tokens * a_token_in // PER_MILLION) + -(-output_tokens * price.output // PER_MILLION)
        )
    return min(dearest, MOST)


def spent_by(rows: Sequence[Row]) -> tuple[int, bool]:
    """Micro-dollars that the attempts of a call have cost its key, and whether some of it is unknown."""
    total, unknown = 0, False
    for row in rows:
        if row.shadow_of:
            continue
        if row.cost is not None:
            total += row.cost
        elif 200 <= row.status < 300:
            unknown = True
    return total, unknown


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget that a call counts against. per_day: micro-dollars; None: counted, but not limited."""

    scope: str
    per_day: int | None


class Budgets(Protocol):
    """Who reserves: the memory of the only gateway, or a database that several share."""

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit]) -> None:
        """Take it from all budgets in limits, or from none. Raises BudgetExhausted."""

    def settle(self, reservation: Reservation | None, charged: Sequence[str], day: int, spent: int, keep: bool) -> None:
        """The call is over, and has cost `spent`, of each scope in `charged`. keep: it may have cost more."""


class Journal(Protocol):
    """Remembers reservations for after a crash: the store."""

    def reserve(self, reservation: Reservation) -> None: ...

    def release(self, reservation_id: str) -> None: ...


class LocalBudgets:
    """Budgets of the only gateway: counted in memory, written down by the store as it writes rows."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._today = 0  # the newest day that a call was of
        self._spent: dict[tuple[str, int], int] = {}
        self._reserved: dict[tuple[str, int], int] = {}

    def load(self, usage: Sequence[Usage], day: int) -> None:
        """Take up what the database has of a day: at the start, before the first call."""
        for each in usage:
            self._spent[each.scope, day] = each.spent
            self._reserved[each.scope, day] = each.reserved

    def usage(self, scope: str, day: int) -> Usage:
        return Usage(scope, self._spent.get((scope, day), 0), self._reserved.get((scope, day), 0))

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit]) -> None:
        """See `Budgets.reserve`. Nothing is awaited: no other call comes between looking and taking."""
        day = reservation.day
        self._turn_to(day)
        for limit in limits:
            spent = self._spent.get((limit.scope, day), 0)
            reserved = self._reserved.get((limit.scope, day), 0)
            if limit.per_day is not None and spent + reserved + reservation.amount > limit.per_day:
                raise refusal(limit, spent, reserved, reservation)
        for scope in reservation.scopes:
            self._reserved[scope, day] = self._reserved.get((scope, day), 0) + reservation.amount
        self._journal.reserve(reservation)

    def settle(self, reservation: Reservation | None, charged: Sequence[str], day: int, spent: int, keep: bool) -> None:
        """See `Budgets.settle`."""
        self._turn_to(day)
        if spent and day >= self._today - 1:
            for scope in charged:
                self._spent[scope, day] = self._spent.get((scope, day), 0) + spent
        if reservation is not None and not keep:
            for scope in reservation.scopes:
                if (scope, day) in self._reserved:
                    self._reserved[scope, day] -= reservation.amount
            self._journal.release(reservation.id)

    def _turn_to(self, day: int) -> None:
        """Forget the days before yesterday with the first call of a new one; yesterday's calls may still run. Those of
        older ones hold nothing any more, as in the store, which has what they cost."""
        if day <= self._today:
            return
        self._today = day
        for table in (self._spent, self._reserved):
            for old in [key for key in table if key[1] < day - 1]:
                del table[old]


class Shared(Journal, Protocol):
    """A database that reserves for several gateways: the store on PostgreSQL."""

    async def reserve_shared(
        self, reservation: Reservation, limits: Sequence[int | None]
    ) -> tuple[int, int, int] | None: ...


class SharedBudgets:
    """Budgets of several gateways: each reservation is one question to the database. Rows are charged as they arrive
    there; a reservation is given back in the same transaction, so that no money is missing in between."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    async def reserve(self, reservation: Reservation, limits: Sequence[Limit]) -> None:
        """See `Budgets.reserve`. Raises Unavailable if the database does not answer."""
        refused = await self._shared.reserve_shared(reservation, [limit.per_day for limit in limits])
        if refused is not None:
            which, spent, reserved = refused
            raise refusal(limits[which], spent, reserved, reservation)

    def settle(self, reservation: Reservation | None, charged: Sequence[str], day: int, spent: int, keep: bool) -> None:
        """See `Budgets.settle`: the store charges `spent` from the rows."""
        if reservation is not None and not keep:
            self._shared.release(reservation.id)


def refusal(limit: Limit, spent: int, reserved: int, reservation: Reservation) -> BudgetExhausted:
    """What the caller is told. retry_after: soon, if running calls hold what is missing; else None: not today."""
    per_day = limit.per_day or 0
    whose, _, name = limit.scope.partition(":")
    return BudgetExhausted(
        f"the budget of {whose} {name!r} for this UTC day is {dollars(per_day)}: {dollars(spent)} are spent, "
        f"{dollars(reserved)} reserved by running calls, and this call may cost {dollars(reservation.amount)}; "
        + ("try again when some have ended" if spent + reservation.amount <= per_day else _advice(spent, per_day)),
        retry_after=SOON_SECONDS if spent + reservation.amount <= per_day else None,
    )


def _advice(spent: int, per_day: int) -> str:
    return "a lower max_tokens costs less" if spent < per_day else "it starts anew at 00:00 UTC"


def until_next_day(at: float) -> float:
    """Seconds until the budgets start anew."""
    return DAY_SECONDS - at % DAY_SECONDS


def dollars(amount: int) -> str:
    """Micro-dollars as dollars: cents, and as many more digits as the amount has."""
    whole, rest = divmod(amount, PER_MILLION)
    digits = f"{rest:06d}".rstrip("0")
    return f"${whole:,}.{digits:0<2}"
