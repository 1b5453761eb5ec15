"""Speeds of candidates: what is simulated and remembered, what load does, and what ranks before simulating."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from freehold.plan.footprint import footprint
from freehold.plan.hardware import cluster
from freehold.plan.layouts import support
from freehold.plan.lengths import lengths
from freehold.plan.models import load
from freehold.plan.roofline import StepTimes
from freehold.plan.search import Candidate
from freehold.plan.simulate import EngineLimits, Loop, simulate
from freehold.plan.speeds import Speeds, prompt_chunk
from freehold.plan.types import Layout, Slo
from freehold.plan.workload import Workload

TP8 = Layout(tp=8)
NO_SLO = Slo()


@cache
def candidate(layout: Layout = TP8, *, mtp: bool = False, replicas: int = 1) -> Candidate:
    model, machine = load("glm-5.2-fp8"), cluster("8xh200")
    room = footprint(model, machine.gpu, layout, "sglang", mtp=mtp)
    known = support("sglang", machine.gpu, model)
    return Candidate(model, machine.gpu, "sglang", layout, room, known, replicas, mtp)


def speeds(concurrency: int = 8, *, slo: Slo = NO_SLO, **others: object) -> Speeds:
    return Speeds(Workload(lengths("2048"), lengths("128"), concurrency, **others), slo)  # type: ignore[arg-type]


def test_more_load_gives_more_tokens_and_slower_ones() -> None:
    asked = speeds()
    few, many = (asked.closed(candidate(), concurrency) for concurrency in (2, 16))
    assert many.output_rate.value > few.output_rate.value
    assert many.tpot.p50.value > few.tpot.p50.value
    assert many.concurrency == pytest.approx(16, rel=0.01)


def test_nothing_is_simulated_twice() -> None:
    asked = speeds()
    assert asked.of(candidate()) is asked.of(candidate())
    shared = candidate(Layout(tp=8, ep=8))
    assert asked.of(shared) is asked.of(candidate()), "experts cut or dealt in one group move the same bytes"


def test_a_cache_that_is_too_small_shows_as_waiting() -> None:
    starved = replace(candidate(), footprint=replace(candidate().footprint, cache_tokens=2 * 2304))
    asked = speeds(8)
    assert asked.of(candidate()).starved < 0.2
    assert asked.of(starved).starved > 0.5
    assert asked.of(starved).ttft.p50.value > 5 * asked.of(candidate()).ttft.p50.value


def test_promises_are_kept_by_single_requests() -> None:
    kept = speeds(slo=Slo(tpot=10.0, ttft=100.0)).of(candidate())
    broken = speeds(slo=Slo(tpot=1e-6)).of(candidate())
    assert kept.meets_slo
    assert kept.goodput.value == pytest.approx(kept.request_rate.value)
    assert not broken.meets_slo
    assert broken.goodput.value == 0


def test_an_open_loop_finishes_what_comes() -> None:
    asked = Speeds(Workload(lengths("2048"), lengths("128"), rate=0.5), Slo())
    assert asked.of(candidate()).request_rate.value == pytest.approx(0.5, rel=0.15)


def test_the_bound_ranks_as_simulations_do() -> None:
    asked = speeds(16)
    layouts = [Layout(tp=8), Layout(tp=1, dp=8, ep=8)]
    bounds = [asked.bound(candidate(layout)) for layout in layouts]
    rates = [asked.of(candidate(layout)).request_rate.value for layout in layouts]
    assert (bounds[0] < bounds[1]) == (rates[0] > rates[1])
    assert speeds(16, slo=Slo(tpot=1e-6)).bound(candidate()) > 100 * bounds[0], "promises that cannot be kept"


def test_an_output_token_takes_more_than_a_prompt_token_and_a_cached_one_least() -> None:
    weights = speeds().weights(candidate())
    assert weights.output > weights.uncached > weights.cached > 0


def test_drafts_and_hits_make_it_faster() -> None:
    plain = speeds(4).of(candidate())
    drafted = speeds(4, drafts=3).of(candidate(mtp=True))
    hit = speeds(4, hit_rate=0.9).of(candidate())
    assert drafted.tpot.p50.value < plain.tpot.p50.value
    assert hit.ttft.p50.value < plain.ttft.p50.value


def test_prompt_chunks_are_those_that_are_launched() -> None:
    h200 = cluster("8xh200").gpu
    assert prompt_chunk("sglang", h200, Layout(tp=1, dp=8, ep=8)) == 32_768
    assert prompt_chunk("sglang", h200, Layout(tp=8)) == 8192
    assert prompt_chunk("sglang", cluster("8xb200").gpu, Layout(tp=8)) == 16_384


@pytest.mark.parametrize("callers", [16, 64, 200])
def test_more_callers_than_can_run_wait_as_long_as_they_would_in_a_long_run(callers: int) -> None:
    """A cache for 8 requests: the throughput of a long run from a cold start is that of the load in its stride."""
    room = 8 * 2304
    starved = replace(candidate(), footprint=replace(candidate().footprint, cache_tokens=room))
    asked = speeds(callers)
    found = asked.of(starved)
    times = StepTimes(starved.model, starved.gpu, TP8, "sglang", starved.footprint.cache)
    calls = asked.workload.draw(400, seed=1)
    long = simulate(times, asked.efficiencies, Loop(calls, callers), EngineLimits(8192, room))
    assert found.request_rate.value == pytest.approx(long.finished / long.seconds, rel=0.06)
    late = [one.ttft for one in long.served[200:300]]
    assert found.ttft.mean.value == pytest.approx(sum(late) / len(late), rel=0.15)
    assert found.concurrency == pytest.approx(callers, rel=1e-6)


def test_a_million_callers_are_answered_quickly() -> None:
    crowd = speeds(1_000_000).of(candidate())
    assert crowd.ttft.p50.value > 1000
    assert crowd.concurrency == pytest.approx(1e6, rel=1e-6)
