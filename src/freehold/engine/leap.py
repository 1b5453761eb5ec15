"""Many decode steps at once, for whoever drives the scheduler with a made-up clock. Pure integers; torch-free.

While nobody arrives, ends, is admitted or is preempted, every step is like the one before: each running request gets
its tokens. `steady_steps` says for how many steps that holds, `leap` does them, and leaves scheduler and block manager
exactly as that many rounds of `schedule` and `update` would.
"""

from __future__ import annotations

from collections.abc import Sequence

from freehold.engine.scheduler import Scheduler
from freehold.engine.step import StepInput
from freehold.errors import EngineError


def steady_steps(scheduler: Scheduler, step: StepInput, most: int) -> int:
    """How many steps like `step`, the one just updated, certainly follow.

    most: tokens that a step gives a request at most. Call it only if `step` was scheduled without a preemption, and
    nothing was added or aborted since.
    """
    running = scheduler.running
    if not running or len(step.seqs) != len(running):
        return 0  # somebody ended: the next step may admit another
    if any(request.num_computed_tokens != request.num_tokens - 1 for request in running):
        return 0  # prompts are being computed
    steps = min(request.params.max_tokens - len(request.output_token_ids) - 1 for request in running) // most
    while steps > 0 and _blocks_missing(scheduler, steps * most) > scheduler.blocks.num_free:
        steps //= 2
    return max(0, steps)


def _blocks_missing(scheduler: Scheduler, tokens: int) -> int:
    """Blocks that all running requests lack if each gets `tokens` more."""
    blocks = scheduler.blocks
    return sum(
        max(0, blocks.blocks_for(scheduler.positions_wanted(request, tokens)) - len(request.table.blocks))
        for request in scheduler.running
    )


def leap(scheduler: Scheduler, tokens: Sequence[int]) -> None:
    """Give every running request, in order, that many tokens (all 0), as if it had been step by step."""
    for request, count in zip(scheduler.running, tokens, strict=True):
        # Each step reserves places for what is known before it, so those of the last token are not taken yet.
        if not scheduler.blocks.extend(request.table, scheduler.positions_wanted(request, count - 1)):
            raise EngineError("leap: the cache has no room for so many steps")  # excluded by steady_steps()
        request.token_ids.extend([0] * count)
        request.output_token_ids.extend([0] * count)
        request.num_computed_tokens = len(request.token_ids) - 1
