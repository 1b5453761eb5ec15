"""The simulation: exact where a closed form exists, the real scheduler's queueing, and sums by cause."""

from __future__ import annotations

from dataclasses import replace

import pytest

from freehold.errors import InsufficientMemory
from freehold.plan import simulate as simulation
from freehold.plan.hardware import gpu
from freehold.plan.kept import bundled
from freehold.plan.lengths import Call
from freehold.plan.models import load
from freehold.plan.roofline import CAUSES, Chunk, Efficiencies, StepTimes, seconds
from freehold.plan.simulate import EngineLimits, Loop, Run, simulate
from freehold.plan.types import CacheFormat, Layout

EFFICIENCIES = Efficiencies(0.8, 0.2, 0.7, 4e-6, 20e-6, 30e-6, 0.01)
TIMES = StepTimes(load("glm-5-fp8"), gpu("h200"), Layout(tp=8), "sglang", CacheFormat("bf16", all_layers=True))
DRAFTING = StepTimes(load("glm-5-fp8"), gpu("h200"), Layout(tp=8), "sglang", CacheFormat("bf16"), drafts=3)
ROOM = EngineLimits(chunk=8192, cache_tokens=300_000)


def closed(calls: list[Call], concurrency: int, limits: EngineLimits = ROOM) -> Run:
    return simulate(TIMES, EFFICIENCIES, Loop(calls, concurrency), limits)


def test_one_request_takes_its_prompt_and_its_steps() -> None:
    (served,) = closed([Call(4000, 50)], 1).served
    factors = EFFICIENCIES.factors
    prompt = seconds(TIMES.prefill([Chunk(0, 4000)], factors), factors)
    steps = sum(seconds(TIMES.decode(1, 2048, 4000 + n, factors), factors) for n in range(1, 50))
    assert served.ttft == pytest.approx(EFFICIENCIES.requests + prompt)
    assert served.last - served.first == pytest.approx(steps, rel=1e-6)
    assert served.tpot == pytest.approx(steps / 49, rel=1e-6)


def test_times_are_sums_of_their_causes() -> None:
    calls = [Call(1000 + 37 * n, 40 + 3 * n) for n in range(30)]
    factors = EFFICIENCIES.factors
    for one in closed(calls, 6).served:
        assert seconds(one.to_first, factors) == pytest.approx(one.ttft, rel=0.02)
        assert seconds(one.rest, factors) == pytest.approx(one.last - one.first)
        assert one.to_first[CAUSES.index("requests")] == 1


def test_leaps_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [Call(900 + 11 * n, 200 + 7 * n) for n in range(24)]
    fast = closed(calls, 5)
    monkeypatch.setattr(simulation, "steady_steps", lambda *_: 0)
    slow = closed(calls, 5)
    assert [one.call for one in fast.served] == [one.call for one in slow.served]
    for one, other in zip(fast.served, slow.served, strict=True):
        assert one.ttft == pytest.approx(other.ttft, rel=1e-3)
        assert one.tpot == pytest.approx(other.tpot, rel=1e-3)
    assert fast.busy == pytest.approx(slow.busy, rel=1e-3)


def test_too_little_cache_shows_as_waiting() -> None:
    calls = [Call(8000, 200)] * 60
    roomy, tight = closed(calls, 12), closed(calls, 12, replace(ROOM, cache_tokens=50_000))
    waited, at_once = (sum(one.ttft for one in run.served) / 60 for run in (tight, roomy))
    assert tight.starved > 0.9
    assert roomy.starved < 0.2
    assert waited > 1.3 * at_once
    assert tight.busy < 7


def test_more_callers_never_get_a_first_token_sooner() -> None:
    means = []
    for concurrency in (1, 2, 4, 8, 16, 32):
        served = closed([Call(2000, 100)] * (6 * concurrency), concurrency).served
        means.append(sum(one.ttft for one in served) / len(served))
    assert means == sorted(means)


def test_an_open_loop_that_cannot_keep_up_waits_longer_and_longer() -> None:
    calls = [Call(8000, 100)] * 40
    slow, fast = (
        simulate(TIMES, EFFICIENCIES, Loop(calls, arrivals=[n * gap for n in range(40)]), ROOM) for gap in (5.0, 0.05)
    )
    assert slow.served[-1].ttft == pytest.approx(slow.served[0].ttft, rel=0.05)
    assert fast.served[-1].ttft > 5 * fast.served[0].ttft


def test_what_the_prefix_cache_has_is_not_computed_but_takes_room() -> None:
    cold, warm = (closed([Call(8000, 10, cached=cached)], 1).served[0] for cached in (0, 7000))
    assert warm.ttft < 0.5 * cold.ttft
    with pytest.raises(InsufficientMemory):
        closed([Call(8000, 10, cached=7000)], 1, replace(ROOM, cache_tokens=4096))


def test_drafts_give_their_acceptance_length() -> None:
    loop = Loop([Call(1000, 301)] * 4, concurrency=4, acceptance=2.5)
    served = simulate(DRAFTING, EFFICIENCIES, loop, ROOM).served
    plain = simulate(
        StepTimes(load("glm-5-fp8"), gpu("h200"), Layout(tp=8), "sglang", CacheFormat("bf16")),
        EFFICIENCIES,
        replace(loop, acceptance=1.0),
        ROOM,
    ).served
    kernels = CAUSES.index("kernels")
    per_step = DRAFTING.decode(4, 4 * 1000, 4 * 1000, EFFICIENCIES.factors)[kernels]
    for one in served:
        assert one.rest[kernels] / per_step == pytest.approx(300 / 2.5, abs=1)
    assert served[0].tpot is not None
    assert plain[0].tpot is not None
    assert served[0].tpot < 0.7 * plain[0].tpot


def test_calls_that_had_begun_are_not_reported() -> None:
    begun = [Call(500, 30, cached=500)] * 4
    run = simulate(TIMES, EFFICIENCIES, Loop([Call(500, 60)] * 40, 4, begun=begun, measured=8), ROOM)
    assert len(run.served) == 8
    assert all(one.sent > 0 for one in run.served)
    assert run.in_flight == pytest.approx(4, abs=0.5)


def test_the_bundled_efficiencies_can_be() -> None:
    assert 0.5 < bundled().memory <= 1
    assert 1e-6 < bundled().kernels < 1e-5
