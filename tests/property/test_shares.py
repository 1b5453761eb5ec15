"""However prompts arrive, short ones overtake and no prompt starves: the bounds that `engine.shares` states."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from freehold.engine.block_manager import BlockManager
from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from freehold.engine.step import SeqOutput
from freehold.types import SamplingParams
from tests.fairness import FairStep
from tests.faults.schedulers import AlwaysWaits, EqualSlices, FirstComeFirstServed, LatestFirst, ShortestFirst


@dataclass(frozen=True)
class Arrival:
    """before: steps since the one before it. Texts are few, so that prompts have prefixes in common."""

    before: int
    text: int
    length: int
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    budget: int
    block_size: int
    max_num_seqs: int
    arrivals: tuple[Arrival, ...]


plans = st.builds(
    Plan,
    budget=st.integers(2, 24),
    block_size=st.integers(2, 4),
    max_num_seqs=st.integers(2, 12),
    arrivals=st.lists(
        st.builds(
            Arrival,
            before=st.sampled_from([0, 0, 1, 1, 2, 5]),
            text=st.integers(0, 4),
            length=st.one_of(st.integers(1, 12), st.integers(1, 12), st.integers(40, 120)),
            max_tokens=st.integers(1, 6),
        ),
        min_size=2,
        max_size=40,
    ).map(tuple),
)


@dataclass
class Wait:
    """A prompt that runs and is not finished. left: tokens of it and of those before it; halves: of each step since."""

    left: int
    before: int
    halves: list[int] = field(default_factory=list)

    def check(self) -> None:
        """In all steps but as many as there were prompts, half of the budget went to these prompts."""
        spent = sorted(self.halves)[: -(self.before + 1)]
        assert sum(spent) <= self.left, f"a prompt took {len(self.halves)} steps, with {self.left} tokens before it"


def play(plan: Plan, scheduler_class: type[Scheduler]) -> None:
    config = SchedulerConfig(max_model_len=10**6, max_num_seqs=plan.max_num_seqs, max_num_batched_tokens=plan.budget)
    scheduler = scheduler_class(config, BlockManager(800, plan.block_size))
    waits: dict[str, Wait] = {}
    arrivals = list(plan.arrivals)
    pause = 0
    for _ in range(10_000):
        while arrivals and pause >= arrivals[0].before:
            arrival, pause = arrivals.pop(0), 0
            prompt = [1000 * arrival.text + at for at in range(arrival.length)]
            params = SamplingParams(max_tokens=arrival.max_tokens)
            scheduler.add(Request(f"r{len(arrivals)}", prompt, params))
        pause += 1
        watch = FairStep(scheduler)
        step = scheduler.schedule()
        if step is None:
            if not arrivals:
                scheduler.check_integrity()
                return
            continue
        watch.check(step)
        left = 0
        for before, request in enumerate(watch.prompts):
            left += request.num_tokens - request.num_computed_tokens
            waits.setdefault(request.request_id, Wait(left, before)).halves.append(watch.half)
        for seq in step.seqs:
            if seq.samples and (wait := waits.pop(seq.request_id, None)):
                wait.check()
        scheduler.update(step, [SeqOutput(seq.request_id, (1,) if seq.samples else ()) for seq in step.seqs])
    raise AssertionError("the schedule does not end")


@settings(max_examples=max(1000, settings().max_examples), deadline=None, suppress_health_check=list(HealthCheck))
@given(plans)
def test_nobody_starves(plan: Plan) -> None:
    play(plan, Scheduler)


SEARCH = settings(max_examples=2000, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


def fails(plan: Plan, fault: type[Scheduler]) -> bool:
    try:
        play(plan, fault)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("fault", [FirstComeFirstServed, ShortestFirst, LatestFirst, EqualSlices, AlwaysWaits])
def test_an_unfair_scheduler_is_caught(fault: type[Scheduler]) -> None:
    find(plans, lambda plan: fails(plan, fault), settings=SEARCH)


@pytest.mark.parametrize("fault", [ShortestFirst, LatestFirst])
def test_the_bound_on_waiting_alone_catches_starvation(fault: type[Scheduler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FairStep, "_check_shares", lambda self: None)
    short = tuple(Arrival(1, text=n, length=8, max_tokens=1) for n in range(1, 60))
    plan = Plan(8, 2, 12, (Arrival(0, text=0, length=100, max_tokens=1), *short))
    play(plan, Scheduler)
    assert fails(plan, fault)
