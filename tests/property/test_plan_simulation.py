"""Simulated loads, whatever they are: every call is answered once, in order, and the clock's causes add up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.plan.hardware import gpu
from freehold.plan.lengths import Call
from freehold.plan.models import load
from freehold.plan.roofline import Efficiencies, StepTimes, seconds
from freehold.plan.simulate import EngineLimits, Loop, simulate
from freehold.plan.types import CacheFormat, Layout

EFFICIENCIES = Efficiencies(0.8, 0.2, 0.7, 4e-6, 20e-6, 30e-6, 0.01)
PLAIN, DRAFTING = (
    StepTimes(load("glm-5.2-fp8"), gpu("h200"), Layout(tp=8), "sglang", CacheFormat("bf16"), drafts=drafts)
    for drafts in (0, 2)
)
CALLS = st.lists(
    st.builds(
        lambda prompt, output, share: Call(prompt, output, int(prompt * share)),
        st.integers(1, 3000),
        st.integers(1, 120),
        st.floats(0, 0.99),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(
    calls=CALLS,
    concurrency=st.integers(1, 6),
    gaps=st.none() | st.lists(st.floats(0, 0.5), min_size=12, max_size=12),
    chunk=st.integers(64, 4096),
    room=st.integers(0, 6000),
    acceptance=st.floats(1, 3),
    drafting=st.booleans(),
)
def test_every_call_is_answered(
    calls: list[Call],
    concurrency: int,
    gaps: list[float] | None,
    chunk: int,
    room: int,
    acceptance: float,
    drafting: bool,
) -> None:
    times = DRAFTING if drafting else PLAIN
    longest = max(call.prompt + call.output for call in calls)
    limits = EngineLimits(chunk, longest + 64 + room, sequences=8)
    gain = acceptance if drafting else 1.0
    if gaps is None:
        loop = Loop(calls, concurrency, acceptance=gain)
    else:
        arrivals = [sum(gaps[: at + 1]) for at in range(len(calls))]
        loop = Loop(calls, arrivals=arrivals, acceptance=gain)
    run = simulate(times, EFFICIENCIES, loop, limits)
    assert sorted(map(repr, (one.call for one in run.served))) == sorted(map(repr, calls))
    assert run.finished == len(calls)
    assert 0 <= run.starved <= 1
    factors = EFFICIENCIES.factors
    for one in run.served:
        assert 0 <= one.sent < one.first <= one.last <= run.seconds + 1e-9
        assert abs(seconds(one.rest, factors) - (one.last - one.first)) < 1e-6
        assert min(one.rest) >= -1e-12
    assert run.served == simulate(times, EFFICIENCIES, loop, limits).served
