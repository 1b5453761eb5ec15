"""A request as the engine sees it: its tokens, how far they are computed, and where its cache lies. Torch-free.

    token_ids    p0 p1 p2 p3 p4 p5 │ o0 o1 o2        prompt, then output
    computed     ✓  ✓  ✓  ✓  ✓  ✓  │ ✓  ✓  ·         num_computed_tokens = 8

A request that decodes has exactly one token that is not computed: its last. That one invariant makes prefill, decode
and recompute after a preemption the same thing: compute the next tokens that are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from freehold.engine.block_manager import BlockTable
from freehold.types import SamplingParams, TokenLogprobs, Usage


class RequestStatus(StrEnum):
    WAITING = "waiting"  # queued, never ran
    RUNNING = "running"  # holds blocks
    PREEMPTED = "preempted"  # queued again; its blocks were taken and its tokens will be recomputed
    FINISHED = "finished"


class Request:
    """Mutable, and owned by the engine's thread from `Engine.add` on.

    arrival: seconds of the engine's clock. measured: counted in the latency metrics (a warm-up is not).
    adapter: the name of the adapter that computes it; None: the model as it is.
    num_cached_tokens: prompt tokens that the prefix cache had when the request first ran.
    """

    __slots__ = (
        "adapter",
        "announced",
        "arrival",
        "cache_salt",
        "draft_accepted",
        "draft_proposed",
        "ending_ids",
        "measured",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "output_token_ids",
        "params",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "sequence",
        "status",
        "table",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
        adapter: str | None = None,
        arrival: float = 0.0,
        measured: bool = True,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.params = params
        self.cache_salt = cache_salt
        self.adapter = adapter
        self.arrival = arrival
        self.measured = measured
        self.num_prompt_tokens = len(self.prompt_token_ids)

        self.status = RequestStatus.WAITING
        self.sequence = -1  # order of arrival, given by the scheduler; also the priority
        self.ending_ids: frozenset[int] = frozenset()  # stop tokens and end-of-sequence tokens, given by the scheduler
        self.announced = False  # the runner has been told of it
        self.token_ids = list(self.prompt_token_ids)  # prompt and output
        self.output_token_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.table = BlockTable(cache_salt, adapter)
        self.draft_proposed = 0
        self.draft_accepted = 0
        # Collected chunk by chunk while the prompt is computed, handed out with the first chunk, then None.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]

    def __repr__(self) -> str:
        done, known, blocks = self.num_computed_tokens, self.num_tokens, len(self.table.blocks)
        return f"Request({self.request_id!r}, {self.status}, {done} of {known} tokens computed, {blocks} blocks)"

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add to the output."""
        self.token_ids += token_ids
        self.output_token_ids += token_ids

    def usage(self) -> Usage:
        return Usage(
            self.num_prompt_tokens,
            len(self.output_token_ids),
            self.num_cached_tokens,
            self.draft_proposed,
            self.draft_accepted,
        )
