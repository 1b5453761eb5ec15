"""Rates and concurrency of a key: requests and tokens a minute by GCRA, calls at once by counting.

GCRA (ATM Forum, Traffic Management 4.0, 1996, in its virtual-scheduling form) keeps one time per limit, the
`theoretical arrival time` (TAT), at which the allowance is whole again. A key that was quiet may use a minute's worth
at once; after that the rate holds. Tokens are estimated at the start and corrected when the call ends, so that what
counts is what was used; a call that used more delays the next one.

In memory, for each gateway on its own: n gateways behind one address admit up to n times a rate. Budgets are shared.
"""

from __future__ import annotations

import math

from freehold.errors import BudgetExhausted, FreeholdError, Overloaded

MINUTE = 60.0
BYTES_A_TOKEN = 4  # of English text; only an estimate, corrected at the end
OUTPUT_ESTIMATE = 1024  # at most so many output tokens are taken in advance


class Gcra:
    """One rate. per_minute: how much of it; times are monotonic seconds."""

    __slots__ = ("per_minute", "tat")

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.tat = -math.inf

    def wait(self, now: float, amount: float = 1) -> float:
        """Seconds until `amount` may be taken: 0 for now. More than a minute's worth may be taken when all is there."""
        amount = min(amount, self.per_minute)
        return max(0.0, self.tat + amount * MINUTE / self.per_minute - MINUTE - now)

    def take(self, now: float, amount: float = 1) -> None:
        """Take it: after `wait` gave 0, or to correct an estimate. Negative: give back."""
        self.tat = max(self.tat, now) + amount * MINUTE / self.per_minute

    def remaining(self, now: float) -> int:
        """How much may be taken now."""
        free = MINUTE - max(0.0, self.tat - now)
        return max(0, math.floor(free * self.per_minute / MINUTE + 1e-6))  # the sum of many floats is a little off

    def reset(self, now: float) -> float:
        """Seconds until a whole minute's worth is there."""
        return max(0.0, self.tat - now)


class Meter:
    """What one key uses now. A limit that changes keeps what was used of it."""

    __slots__ = ("requests", "running", "tokens")

    def __init__(self) -> None:
        self.running = 0
        self.requests: Gcra | None = None
        self.tokens: Gcra | None = None

    def limit(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.requests = _with_rate(self.requests, requests_per_minute)
        self.tokens = _with_rate(self.tokens, tokens_per_minute)

    def headers(self, now: float) -> tuple[tuple[bytes, bytes], ...]:
        """`x-ratelimit-*` as OpenAI has them."""
        found: list[tuple[bytes, bytes]] = []
        for rate, what in ((self.requests, b"requests"), (self.tokens, b"tokens")):
            if rate is not None:
                found += (
                    (b"x-ratelimit-limit-" + what, b"%d" % rate.per_minute),
                    (b"x-ratelimit-remaining-" + what, b"%d" % rate.remaining(now)),
                    (b"x-ratelimit-reset-" + what, _span(rate.reset(now)).encode()),
                )
        return tuple(found)


def estimated_tokens(body_bytes: int, max_tokens: int | None, cap: int, choices: int) -> int:
    """What a call takes of a rate until it ends."""
    output = min(cap if max_tokens is None else max_tokens, OUTPUT_ESTIMATE)
    return body_bytes // BYTES_A_TOKEN + output * max(1, choices)


def refusal_headers(error: FreeholdError, until_next_day: float) -> tuple[tuple[bytes, bytes], ...]:
    """The headers of a 429 that tell clients when to ask again, or not to.

    until_next_day: seconds until budgets start anew. The SDKs of OpenAI and Anthropic obey `x-should-retry`, and prefer
    `retry-after-ms` to `retry-after`.
    """
    if not isinstance(error, Overloaded):
        return ()
    seconds = error.retry_after
    should = b"true"
    if seconds is None:
        if not isinstance(error, BudgetExhausted):
            return ()
        seconds, should = until_next_day, b"false"
    return (
        (b"retry-after", b"%d" % math.ceil(seconds)),
        (b"retry-after-ms", b"%d" % math.ceil(seconds * 1000)),
        (b"x-should-retry", should),
    )


def _with_rate(rate: Gcra | None, per_minute: int | None) -> Gcra | None:
    if per_minute is None:
        return None
    if rate is None:
        return Gcra(per_minute)
    rate.per_minute = per_minute
    return rate


def _span(seconds: float) -> str:
    """As OpenAI writes it: 0s, 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms" if seconds else "0s"
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"
