"""Whether a call may be made now: concurrency, rates, budgets; and what it used, when it is over.

`admit` takes everything or nothing. `settle` takes effect once for each ticket, also for calls that were aborted.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from freehold.errors import Overloaded, RateLimited, Unavailable
from freehold.gateway.access.budget import Budgets, Limit, LocalBudgets, SharedBudgets, bound, spent_by, until_next_day
from freehold.gateway.access.limits import Gcra, Meter, estimated_tokens, refusal_headers
from freehold.gateway.call import Caller, Decision, Request
from freehold.gateway.config import MAX_OUTPUT_TOKENS, Settings
from freehold.gateway.identity import new_id
from freehold.gateway.keeping.postgres import PostgresStore
from freehold.gateway.keeping.records import Reservation, day_of
from freehold.gateway.keeping.store import Store
from freehold.gateway.keeping.transactions import scopes_of
from freehold.gateway.parts import Header
from freehold.gateway.parts import Ticket as AnyTicket
from freehold.ledger import Row

logger = logging.getLogger("freehold.gateway")

Headers: TypeAlias = tuple[Header, ...]

LOG_SECONDS = 10.0  # between two lines about a ledger that cannot be written
BUSY_SECONDS = 1.0  # when to ask again while all of a key's calls run
COMPLETIONS_CAP = 16  # output tokens of /v1/completions without `max_tokens`: that API's own default


class Ticket:
    """What was taken for one call. headers: `x-ratelimit-*`, for its answer. output_limit: see `parts.Ticket`."""

    __slots__ = ("caller", "day", "headers", "meter", "output_limit", "reservation", "settled", "tokens")

    def __init__(self, caller: Caller, day: int, meter: Meter | None, tokens: int) -> None:
        self.caller = caller
        self.day = day
        self.meter = meter
        self.tokens = tokens
        self.reservation: Reservation | None = None
        self.settled = False
        self.headers: Headers = ()
        self.output_limit: int | None = None


class Admission:
    """Limits and budgets of all keys. trouble: why calls cannot be written down now, or ''.

    clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: Settings,
        budgets: Budgets,
        trouble: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budgets = budgets
        self._trouble = trouble
        self._clock = clock
        self._meters: dict[str, Meter] = {}
        self._caps: dict[str, int | None] = {}
        self._logged = -math.inf
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take the aliases' output limits. What keys have used is kept; their limits come with each caller."""
        self._caps = {alias: model.output_limit for alias, model in settings.models.items()}

    def _cap(self, request: Request) -> int:
        """Output tokens of a request that names no limit: the alias's, or a default that upstreams take."""
        named = self._caps.get(request.alias)
        if named is not None:
            return named
        return COMPLETIONS_CAP if request.endpoint == "completions" else MAX_OUTPUT_TOKENS

    async def admit(self, request: Request, decision: Decision) -> Ticket:
        """Take a place, its share of the rates, and the most that the call may cost; or nothing.

        Raises RateLimited, BudgetExhausted (with `retry_after` None: not before the next day), or Unavailable: the
        ledger cannot be written, or a shared budget not be asked.
        """
        if trouble := self._trouble():
            raise self._unwritten(trouble)
        try:
            return await self._admit(request, decision)
        except Unavailable as error:
            raise self._unwritten(error.message) from None
        except Overloaded as error:
            known = self._meters.get(request.caller.key_id)
            rates = known.headers(self._clock()) if known is not None else ()
            error.headers = (*refusal_headers(error, until_next_day(request.at)), *rates)
            raise

    def _unwritten(self, trouble: str) -> Unavailable:
        """For the caller, without the words for the operator: they name files, addresses and statements."""
        now = self._clock()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.error("calls are refused: %s", trouble)
        return Unavailable("calls cannot be written down now; the gateway's log says why", retry_after=BUSY_SECONDS)

    async def _admit(self, request: Request, decision: Decision) -> Ticket:
        caller = request.caller
        cap = self._cap(request)
        ticket = self._take(request, caller, cap)
        if caller.budget_per_day is not None or (caller.team and caller.team_budget_per_day is not None):
            try:
                ticket.reservation = await self._reserve(request, decision, caller, cap)
            except BaseException:
                ticket.settled = True
                self._give_back(ticket, 0)
                raise
            if request.max_tokens is None and request.endpoint != "embeddings":
                ticket.output_limit = cap
        return ticket

    def settle(self, ticket: AnyTicket, rows: Sequence[Row]) -> None:
        """Give back what was not used. rows: the call's, which the store was given before; none if it was not tried."""
        assert isinstance(ticket, Ticket)
        if ticket.settled:
            return
        ticket.settled = True
        spent, unknown = spent_by(rows)
        charged = scopes_of(ticket.caller.key_id, ticket.caller.team)
        self.budgets.settle(ticket.reservation, charged, ticket.day, spent, keep=unknown)
        if ticket.meter is not None:
            used = sum((row.input_tokens or 0) + (row.output_tokens or 0) for row in rows if not row.shadow_of)
            self._give_back(ticket, used)

    def count(self, caller: Caller) -> Headers:
        """See `parts.Admission.count`."""
        if caller.requests_per_minute is None:
            return ()
        meter, now = self._meter(caller), self._clock()
        rate = meter.requests
        assert rate is not None
        if (wait := rate.wait(now)) > 0:
            error = _too_many(caller, rate, "requests", wait)
            error.headers = (*refusal_headers(error, 0.0), *meter.headers(now))
            raise error
        rate.take(now)
        return meter.headers(now)

    def _meter(self, caller: Caller) -> Meter:
        meter = self._meters.get(caller.key_id)
        if meter is None:
            meter = self._meters[caller.key_id] = Meter()
        meter.limit(caller.requests_per_minute, caller.tokens_per_minute)
        return meter

    def _take(self, request: Request, caller: Caller, cap: int) -> Ticket:
        day = day_of(request.at)
        if caller.requests_per_minute is caller.tokens_per_minute is caller.max_concurrent is None:
            return Ticket(caller, day, None, 0)
        meter, now = self._meter(caller), self._clock()
        if caller.max_concurrent is not None and meter.running >= caller.max_concurrent:
            raise RateLimited(
                f"all {caller.max_concurrent} calls that key {caller.key_id!r} may make at once are running",
                retry_after=BUSY_SECONDS,
            )
        tokens = estimated_tokens(len(request.body), request.max_tokens, cap, request.choices)
        for rate, amount, what in ((meter.requests, 1, "requests"), (meter.tokens, tokens, "tokens")):
            if rate is not None and (wait := rate.wait(now, amount)) > 0:
                raise _too_many(caller, rate, what, wait)
        meter.running += 1
        if meter.requests is not None:
            meter.requests.take(now)
        if meter.tokens is not None:
            meter.tokens.take(now, tokens)
        ticket = Ticket(caller, day, meter, tokens)
        ticket.headers = meter.headers(now)
        return ticket

    async def _reserve(self, request: Request, decision: Decision, caller: Caller, cap: int) -> Reservation:
        limits = [Limit(f"key:{caller.key_id}", caller.budget_per_day)]
        if caller.team:
            limits.append(Limit(f"team:{caller.team}", caller.team_budget_per_day))
        limits = [limit for limit in limits if limit.per_day is not None]
        reservation = Reservation(
            id=new_id(),
            scopes=tuple(limit.scope for limit in limits),
            day=day_of(request.at),
            amount=bound(request, decision.targets, cap),
            at=request.at,
        )
        await self.budgets.reserve(reservation, limits)
        return reservation

    def _give_back(self, ticket: Ticket, used: int) -> None:
        meter = ticket.meter
        if meter is not None:
            meter.running -= 1
            if meter.tokens is not None:
                meter.tokens.take(self._clock(), used - ticket.tokens)


def _too_many(caller: Caller, rate: Gcra, what: str, wait: float) -> RateLimited:
    return RateLimited(
        f"key {caller.key_id!r} may use {rate.per_minute:,} {what} a minute; try again in {wait:.1f} s",
        retry_after=wait,
    )


async def open_admission(store: Store, settings: Settings, now: float) -> Admission:
    """Admission on a store that was started, with what its budgets have used today. now: epoch seconds."""
    if isinstance(store, PostgresStore):
        return Admission(settings, SharedBudgets(store), lambda: store.trouble)
    budgets = LocalBudgets(store)
    for day in (day_of(now) - 1, day_of(now)):  # a call from just before midnight may still arrive
        budgets.load(await store.usage(day), day)
    return Admission(settings, budgets, lambda: store.trouble)
