"""Many decode steps at once leave the scheduler as step by step does."""

from __future__ import annotations

import random

import pytest

from freehold.engine.block_manager import BlockManager
from freehold.engine.leap import leap, steady_steps
from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from freehold.engine.step import SeqOutput
from freehold.errors import EngineError
from freehold.types import SamplingParams


def scheduler(blocks: int, seqs: int = 8, drafts: int = 0) -> Scheduler:
    config = SchedulerConfig(10_000, seqs, 256 + seqs * (1 + drafts), num_draft_tokens=drafts)
    return Scheduler(config, BlockManager(blocks, 16, enable_prefix_cache=False))


def play(seed: int, *, leaping: bool, drafts: int = 0) -> list[tuple[int, str, int]]:
    """(number of the step, who ended, tokens): a closed loop over a cache that is too small for all."""
    random_ = random.Random(seed)
    made = scheduler(blocks=random_.randint(40, 90), drafts=drafts)
    lengths = [(random_.randint(1, 200), random_.randint(1, 120)) for _ in range(24)]
    for number, (prompt, output) in enumerate(lengths):
        made.add(Request(str(number), (0,) * prompt, SamplingParams(max_tokens=output, ignore_eos=True)))
    ended, steps = [], 0
    while made.has_work:
        before = made.counters.preemptions
        step = made.schedule()
        assert step is not None
        steps += 1
        # Every request gets as many tokens in a step as a step can give, so that leaps need no fractions.
        decoding = {seq.request_id for seq in step.seqs if len(seq.token_ids) == 1}
        outputs = [
            SeqOutput(seq.request_id, (0,) * ((1 + drafts if seq.request_id in decoding else 1) if seq.samples else 0))
            for seq in step.seqs
        ]
        chunks = [chunk for chunk in made.update(step, outputs) if chunk.finish_reason is not None]
        ended += [(steps, chunk.request_id, chunk.usage.completion_tokens) for chunk in chunks]
        made.check_integrity()
        if leaping and before == made.counters.preemptions:
            more = steady_steps(made, step, 1 + drafts)
            if more > 0:
                leap(made, [more * (1 + drafts)] * len(made.running))
                steps += more
                made.check_integrity()
    return ended


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_same_requests_end_in_the_same_steps(drafts: int) -> None:
    for seed in range(25):
        assert play(seed, leaping=True, drafts=drafts) == play(seed, leaping=False, drafts=drafts)


def test_no_step_is_steady_while_prompts_are_computed_or_somebody_is_about_to_end() -> None:
    made = scheduler(blocks=100)
    made.add(Request("long", (0,) * 600, SamplingParams(max_tokens=50, ignore_eos=True)))
    step = made.schedule()
    assert step is not None
    made.update(step, [SeqOutput("long")])
    assert steady_steps(made, step, 1) == 0  # the prompt is not finished
    made.add(Request("short", (0,) * 3, SamplingParams(max_tokens=2, ignore_eos=True)))
    for _ in range(3):
        step = made.schedule()
        assert step is not None
        made.update(step, [SeqOutput(seq.request_id, (0,) if seq.samples else ()) for seq in step.seqs])
        if "short" in made.requests:
            assert steady_steps(made, step, 1) == 0


def test_a_leap_beyond_the_cache_is_refused() -> None:
    made = scheduler(blocks=4)
    made.add(Request("one", (0,) * 30, SamplingParams(max_tokens=30, ignore_eos=True)))
    step = made.schedule()
    assert step is not None
    made.update(step, [SeqOutput("one", (0,))])
    with pytest.raises(EngineError, match="no room"):
        leap(made, [40])
