"""The number of drafts: the fastest one for given acceptance and times, none where none pays, and back again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from freehold.engine.draft_policy import DraftPolicy

Cost = Callable[[int], float]
"""Seconds by number of drafts."""


class Machine:
    """Steps of one load with these chances and times. `drafting(None)` is a step without the MTP layer: 0."""

    def __init__(self, policy: DraftPolicy, chances: Sequence[float], target: Cost, drafting: Cost, n: int = 1) -> None:
        self.policy, self.chances, self.target, self.drafting, self.n = policy, chances, target, drafting, n
        self.random = random.Random(1)
        self.noise = 0.0
        self.planned: list[int | None] = []
        self.seconds = 0.0
        self.tokens = 0
        self._pending = 0

    def step(self) -> None:
        noisy = 1 + self.noise * self.random.random()
        seconds = self.target(self._pending) * noisy
        for _ in range(self.n):
            accepted = 0
            while accepted < self._pending and self.random.random() < self.chances[accepted]:
                accepted += 1
            self.tokens += 1 + accepted
            if self._pending:
                self.policy.note_verified([(self._pending, accepted)])
        self.policy.note_target(self.n, self._pending, seconds)
        plan = self.policy.plan(self.n, 15)
        if plan is not None:
            drafting = self.drafting(plan) * noisy
            self.policy.note_drafting(self.n, plan, drafting)
            seconds += drafting
        self.seconds += seconds
        self.planned.append(plan)
        self._pending = plan or 0

    def run(self, steps: int) -> list[int | None]:
        for _ in range(steps):
            self.step()
        return self.planned[-steps:]

    def speed(self, drafts: int) -> float:
        """Tokens a second with always so many drafts."""
        chance, tokens = 1.0, 1.0
        for at in range(drafts):
            chance *= self.chances[at]
            tokens += chance
        return self.n * tokens / (self.target(drafts) + (self.drafting(drafts) if drafts else 0.0))


def linear(base: float, slope: float) -> Cost:
    return lambda drafts: base + slope * drafts


TIMES = {
    "cheap rows": (linear(1.0, 0.02), linear(0.02, 0.02)),
    "dear rows": (linear(1.0, 0.35), linear(0.1, 0.1)),
    "a step up": (lambda k: 1.0 + 0.05 * k + (0.8 if k > 3 else 0.0), linear(0.05, 0.05)),
}


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("first", [0.0, 0.3, 0.5, 0.7, 0.9, 0.98])
def test_it_is_nearly_as_fast_as_the_best_number(first: float, times: str, noise: float) -> None:
    target, drafting = TIMES[times]
    machine = Machine(DraftPolicy(7), [first * 0.97**at for at in range(7)], target, drafting)
    machine.noise = noise
    machine.run(300)
    tokens, seconds = machine.tokens, machine.seconds
    machine.run(3000)
    best = max(machine.speed(drafts) for drafts in range(8))
    assert (machine.tokens - tokens) / (machine.seconds - seconds) > 0.93 * best / (1 + noise / 2)


def test_useless_drafts_cost_next_to_nothing_from_the_start() -> None:
    machine = Machine(DraftPolicy(3), [0.0] * 3, linear(1.0, 0.4), linear(0.15, 0.15))
    machine.run(600)
    assert machine.seconds / machine.tokens < 1.05 * machine.target(0)
    assert machine.run(2000).count(None) > 1900


def test_trials_grow_rare_and_begin_with_extending() -> None:
    machine = Machine(DraftPolicy(3), [0.0] * 3, linear(1.0, 0.4), linear(0.15, 0.15))
    plans = machine.run(6000)
    begins = [at for at, (before, plan) in enumerate(pairwise(plans), 1) if before is None and plan is not None]
    assert len(begins) > 3
    gaps = [later - earlier for earlier, later in pairwise(begins)]
    assert all(later > 1.5 * earlier for earlier, later in pairwise(gaps))
    for begin in begins:
        trial = plans[begin : begin + 14]
        assert trial == [0] * 8 + [1] * 6


def test_it_comes_back_when_drafts_pay_again() -> None:
    machine = Machine(DraftPolicy(5), [0.05] * 5, linear(1.0, 0.1), linear(0.1, 0.05))
    machine.run(400)
    assert machine.planned[-1] is None
    machine.chances = [0.95] * 5
    machine.run(600)
    assert machine.run(100).count(5) > 90
    machine.chances = [0.02] * 5
    machine.run(200)
    assert machine.run(100).count(None) > 80


def test_each_number_of_requests_has_its_own_times() -> None:
    policy = DraftPolicy(3)
    alone = Machine(policy, [0.6] * 3, linear(1.0, 0.05), linear(0.05, 0.05))
    many = Machine(policy, [0.6] * 3, linear(1.0, 0.9), linear(0.4, 0.3), n=5)
    for _ in range(400):
        alone.step()
        many.step()
    assert sum((plan or 0) >= 2 for plan in alone.run(50)) > 40
    assert many.run(300).count(None) > 240


def test_a_trial_that_could_not_be_timed_is_no_failure() -> None:
    """Steps with prompts in them are not timed."""
    policy = DraftPolicy(3)
    machine = Machine(policy, [0.0] * 3, linear(1.0, 0.4), linear(0.15, 0.15))
    machine.run(40)
    assert machine.planned[-1] is None
    assert len([policy.plan(1, 3) for _ in range(400)]) == 400
    fresh = DraftPolicy(3)
    assert {fresh.plan(2, 3) for _ in range(400)} <= {0, 1, 2, 3, None}


def test_no_room_is_no_drafts() -> None:
    policy = DraftPolicy(3)
    assert policy.plan(20, 0) is None
    assert policy.plan(8, 1) in (0, 1)
