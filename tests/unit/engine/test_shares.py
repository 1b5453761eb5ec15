"""Who gets what of a step that has prompts to compute, and how equal prompts are computed once."""

from __future__ import annotations

import pytest

from freehold.engine.block_manager import BlockManager
from freehold.engine.request import RequestStatus
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from tests.scheduling import ask, make, run, shape

# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_half_of_the_budget_goes_by_age_and_the_rest_to_the_shortest() -> None:
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add(ask("a", 40))
    scheduler.add(ask("b", 9))
    scheduler.add(ask("c", 3))
    assert shape(run(scheduler)[0]) == [("a", 0, 5, False), ("b", 0, 2, False), ("c", 0, 3, True)]
    # c takes 1 for its token; of the other 9, a gets 5 and b 4.
    assert shape(run(scheduler)[0]) == [("c", 3, 1, True), ("a", 5, 5, False), ("b", 2, 4, False)]
    # 3 of b are left, and the rest goes back to a.
    assert shape(run(scheduler)[0]) == [("c", 4, 1, True), ("a", 10, 6, False), ("b", 6, 3, True)]


def test_a_short_request_overtakes_two_long_prompts_one_of_which_waits() -> None:
    scheduler = make(num_blocks=200, max_num_batched_tokens=16)
    scheduler.add(ask("first", 150))
    run(scheduler)
    scheduler.add(ask("second", 160))
    scheduler.add(ask("short", 6))
    step, chunks = run(scheduler)
    assert shape(step) == [("first", 16, 10, False), ("short", 0, 6, True)]
    assert [chunk.request_id for chunk in chunks] == ["short"]
    assert scheduler.requests["second"].status is RequestStatus.RUNNING, "it has its blocks"
    assert [new.request_id for new in step.new] == ["short"], "but the runner has not heard of it"


def test_short_requests_that_never_end_take_half_of_a_long_prompts_speed() -> None:
    scheduler = make(num_blocks=200, max_num_batched_tokens=16)
    scheduler.add(ask("long", 160))
    steps = 0
    while scheduler.requests["long"].num_computed_tokens < 160:
        for number in range(2):
            scheduler.add(ask(f"short {steps} {number}", 8, max_tokens=1))
        run(scheduler)
        steps += 1
    assert steps == 160 / 8


def test_a_request_that_does_not_fit_is_not_overtaken() -> None:
    scheduler = make(num_blocks=12, max_num_batched_tokens=16)
    scheduler.add(ask("a", 30, max_tokens=2))
    run(scheduler)
    scheduler.add(ask("large", 30, max_tokens=2))
    scheduler.add(ask("small", 2, max_tokens=2))
    step, _ = run(scheduler)
    assert [seq.request_id for seq in step.seqs] == ["a"]
    assert [request.request_id for request in scheduler.waiting] == ["large", "small"]


def test_the_oldest_prompt_gets_on_with_a_budget_of_one_token_each() -> None:
    scheduler = make(max_num_batched_tokens=3)
    for name in "abc":
        scheduler.add(ask(name, 5, max_tokens=20))
    shapes = [shape(run(scheduler)[0]) for _ in range(5)]
    assert shapes[0] == [("a", 0, 3, False)]
    assert shapes[1] == [("a", 3, 2, True), ("b", 0, 1, False)]
    assert shapes[2] == [("a", 5, 1, True), ("b", 1, 2, False)]


# ── equal prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_equal_prompts_that_arrive_together_one_is_computed() -> None:
    scheduler = make()
    prompt = list(range(100, 118))
    for name in "abc":
        scheduler.add(ask(name, prompt))
    step, _ = run(scheduler)
    assert shape(step) == [("a", 0, 18, True)]
    assert [new.request_id for new in step.new] == ["a"]
    step, chunks = run(scheduler)
    assert shape(step) == [("a", 18, 1, True), ("b", 16, 2, True), ("c", 16, 2, True)]
    assert [chunk.usage.cached_tokens for chunk in chunks] == [0, 16, 16]
    assert scheduler.blocks.usage == (5 + 2 * 1) / 64, "they share the four blocks"
    assert (scheduler.counters.prefix_hits, scheduler.counters.prefix_queries) == (32, 54)


def test_a_prompt_follows_another_that_is_computed_in_chunks() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(ask("a", [*range(100, 120), 1]))
    scheduler.add(ask("b", [*range(100, 120), 2]))
    shapes = [shape(run(scheduler)[0]) for _ in range(4)]
    assert shapes == [
        [("a", 0, 8, False)],
        [("a", 8, 8, False)],
        [("a", 16, 5, True)],
        [("a", 21, 1, True), ("b", 20, 1, True)],
    ]


@pytest.mark.parametrize("different", [{"salt": "s"}, {"prompt_logprobs": 0}])
def test_equal_prompts_that_may_not_share_do_not_wait(different: dict[str, object]) -> None:
    scheduler = make()
    prompt = list(range(100, 112))
    scheduler.add(ask("a", prompt))
    scheduler.add(ask("b", prompt, **different))  # type: ignore[arg-type]
    step = scheduler.schedule()
    assert step is not None
    assert shape(step) == [("a", 0, 12, True), ("b", 0, 12, True)]


def test_nobody_waits_without_a_prefix_cache() -> None:
    blocks = BlockManager(64, 4, enable_prefix_cache=False)
    scheduler = Scheduler(SchedulerConfig(max_model_len=200, max_num_batched_tokens=32), blocks)
    prompt = list(range(100, 112))
    scheduler.add(ask("a", prompt))
    scheduler.add(ask("b", prompt))
    assert shape(run(scheduler)[0]) == [("a", 0, 12, True), ("b", 0, 12, True)]


def test_nobody_waits_for_who_is_not_computed() -> None:
    """The one that is ahead may be a long prompt whose turn has not come."""
    scheduler = make(num_blocks=200, max_num_batched_tokens=16)
    scheduler.add(ask("first", 150))
    run(scheduler)
    scheduler.add(ask("second", [*range(100, 104), *range(500, 630)]))
    scheduler.add(ask("short", [*range(100, 104), 7, 8]))
    assert shape(run(scheduler)[0]) == [("first", 16, 10, False), ("short", 0, 6, True)]
