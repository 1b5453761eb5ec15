"""Rates over time, against a plain count of what was taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.errors import BudgetExhausted, NotFound, Overloaded, RateLimited
from freehold.gateway.access.limits import Gcra, Meter, estimated_tokens, refusal_headers


def test_a_minutes_worth_at_once_and_then_the_rate() -> None:
    rate = Gcra(60)
    for _ in range(60):
        assert rate.wait(100.0) == 0
        rate.take(100.0)
    assert rate.remaining(100.0) == 0
    assert rate.wait(100.0) == pytest.approx(1)
    assert rate.wait(101.0) == pytest.approx(0)
    rate.take(101.0)
    assert rate.wait(101.5) == pytest.approx(0.5)
    assert rate.reset(101.0) == pytest.approx(60)
    assert Gcra(60).remaining(0) == 60


@given(
    per_minute=st.integers(1, 200),
    steps=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 30)), min_size=1, max_size=60),
)
def test_no_stretch_of_time_has_more_than_its_share(per_minute: int, steps: list[tuple[float, int]]) -> None:
    rate, now = Gcra(per_minute), 0.0
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        now += pause
        amount = min(amount, per_minute)
        if rate.wait(now, amount) == 0:
            rate.take(now, amount)
            taken.append((now, amount))
        else:
            # It says when: just before is too soon, then is not.
            wait = rate.wait(now, amount)
            assert rate.wait(now + wait * 0.999 - 1e-6, amount) > 0
            assert rate.wait(now + wait + 1e-6, amount) == 0
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            seconds = taken[last][0] - taken[first][0]
            assert sum(amount for _, amount in taken[first : last + 1]) <= per_minute * (1 + seconds / 60) + 1e-6


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=20))
def test_corrected_estimates_leave_what_was_used(calls: list[tuple[int, int]]) -> None:
    """Whatever was estimated: after the calls ended, the rate stands where their tokens put it."""
    estimated, exact = Gcra(100_000), Gcra(100_000)
    for estimate, _ in calls:
        estimated.take(0.0, estimate)
    for estimate, used in calls:
        estimated.take(0.0, used - estimate)
        exact.take(0.0, used)
    assert estimated.reset(0.0) == pytest.approx(exact.reset(0.0), abs=1e-6)


def test_a_call_larger_than_the_rate_waits_for_all_of_it() -> None:
    rate = Gcra(1000)
    assert rate.wait(0.0, 5000) == 0
    rate.take(0.0, 5000)
    assert rate.wait(0.0, 1) == pytest.approx(240.06)
    assert rate.wait(300.0, 5000) == 0


def test_what_is_given_back_is_not_credit() -> None:
    rate = Gcra(60)
    rate.take(0.0, -1000)
    assert rate.remaining(0.0) == 60
    rate.take(0.0, 60)
    assert rate.remaining(0.0) == 0


def test_a_changed_limit_keeps_what_was_used() -> None:
    meter = Meter()
    meter.limit(60, None)
    assert meter.requests is not None
    meter.requests.take(0.0, 60)
    meter.limit(120, 1000)
    assert meter.requests.per_minute == 120
    assert meter.requests.wait(0.0) > 0
    assert meter.tokens is not None
    meter.limit(None, None)
    assert meter.requests is meter.tokens is None


def test_headers_tell_the_state() -> None:
    meter = Meter()
    meter.limit(60, 6000)
    assert meter.requests is not None
    assert meter.tokens is not None
    meter.requests.take(0.0)
    meter.tokens.take(0.0, 5999)
    assert dict(meter.headers(0.0)) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"1",
        b"x-ratelimit-reset-tokens": b"1m0s",
    }
    assert dict(meter.headers(0.5))[b"x-ratelimit-reset-requests"] == b"500ms"
    assert dict(meter.headers(1.0))[b"x-ratelimit-reset-requests"] == b"0s"
    assert dict(meter.headers(1.0))[b"x-ratelimit-reset-tokens"] == b"59s"


def test_tokens_are_estimated_from_the_body_and_the_limit() -> None:
    assert estimated_tokens(400, 10, 32_768, 1) == 110
    assert estimated_tokens(400, 10, 32_768, 2) == 120
    assert estimated_tokens(400, None, 32_768, 1) == 1124
    assert estimated_tokens(400, None, 500, 0) == 600


def test_a_refusal_tells_when_to_ask_again() -> None:
    limited = refusal_headers(RateLimited("slow down", retry_after=1.2), 5000.0)
    assert limited == ((b"retry-after", b"2"), (b"retry-after-ms", b"1200"), (b"x-should-retry", b"true"))
    soon = dict(refusal_headers(BudgetExhausted("running", retry_after=1.0), 5000.0))
    assert soon[b"x-should-retry"] == b"true"
    spent = refusal_headers(BudgetExhausted("spent"), 4999.5)
    assert spent == ((b"retry-after", b"5000"), (b"retry-after-ms", b"4999500"), (b"x-should-retry", b"false"))
    assert refusal_headers(Overloaded("queue"), 1.0) == ()
    assert refusal_headers(NotFound("no"), 1.0) == ()
