"""Many decode steps at once, for whoever drives the scheduler with a made-up clock. Pure integers; torch-free.

While nobody arrives, ends, is admitted or is preempted, every step is like the one before: each running request gets
its tokens. `steady_steps` says for how many steps that holds, `leap` does them, and leaves scheduler and block manager
exactly as that many rounds of `schedule` and `update` would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from freehold.engine.scheduler import Scheduler
from freehold.engine.step import StepInput
from freehold.errors import EngineError

_HAIR = 1e-6  # of a step: fractions are carried with rounding errors


def steady_steps(scheduler: Scheduler, step: StepInput, rate: float, carried: Sequence[float] = ()) -> int:
    """How many steps certainly follow `step`, the one just updated, in which all that run decode and nothing else is.

    rate: tokens that a step gives each request on average. carried: of a token, what each running request has left over
    from the steps so far (0 without): s steps give it `int(carried + s * rate)`.
    Call it only if `step` was scheduled without a preemption, and nothing was added or aborted since.
    """
    running = scheduler.running
    if not running or (scheduler.waiting and len(step.seqs) != len(running)):
        return 0  # somebody ended: the next step may admit another
    least = math.inf
    for request, over in zip(running, carried or [0.0] * len(running), strict=True):
        if request.num_computed_tokens != len(request.token_ids) - 1:
            return 0  # prompts are being computed
        least = min(least, request.params.max_tokens - len(request.output_token_ids) - over)
    steps = math.ceil(least / rate - _HAIR) - 1  # the last before somebody has its last token
    while steps > 0 and not _has_room(scheduler, math.ceil(steps * rate)):
        steps //= 2
    return max(0, steps)


def _has_room(scheduler: Scheduler, tokens: int) -> bool:
    """Whether there are blocks for all running requests to get `tokens` more."""
    blocks, running = scheduler.blocks, scheduler.running
    most = blocks.blocks_for(tokens + scheduler.config.num_draft_tokens + 1)  # that one request can lack
    if len(running) * most <= blocks.num_free:
        return True
    missing = sum(
        max(0, blocks.blocks_for(scheduler.positions_wanted(request, tokens)) - len(request.table.blocks))
        for request in running
    )
    return missing <= blocks.num_free


def leap(scheduler: Scheduler, tokens: Sequence[int]) -> None:
    """Give every running request, in order, that many tokens (all 0), as if it had been step by step."""
    blocks = scheduler.blocks
    for request, count in zip(scheduler.running, tokens, strict=True):
        # Each step reserves places for what is known before it, so those of the last token are not taken yet.
        positions, table = scheduler.positions_wanted(request, count - 1), request.table
        if positions > len(table.blocks) * blocks.block_size and not blocks.extend(table, positions):
            raise EngineError("leap: the cache has no room for so many steps")  # excluded by steady_steps()
        request.extend([0] * count)
        request.num_computed_tokens = len(request.token_ids) - 1
