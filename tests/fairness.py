"""What a step owes to whom: the promises of `engine.scheduler` and `engine.shares`, told from a step alone.

watch = FairStep(scheduler)        # before scheduler.schedule()
watch.check(step)                  # after it, before scheduler.update()
"""

from __future__ import annotations

from freehold.engine.request import Request, RequestStatus
from freehold.engine.scheduler import Scheduler
from freehold.engine.step import ScheduledSeq, StepInput


class FairStep:
    """budget: what the decodes left for prompts; prompts: those that run, in order of arrival. Both after `check`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._generating = [r for r in scheduler.running if r.num_computed_tokens == r.num_tokens - 1]
        self.budget = 0
        self.prompts: list[Request] = []

    def check(self, step: StepInput) -> None:
        config = self._scheduler.config
        self._seqs = {seq.request_id: seq for seq in step.seqs}
        assert len(self._seqs) == len(step.seqs), "a request is twice in a step"
        generating = [r for r in self._generating if r.status is RequestStatus.RUNNING]
        for request in generating:
            assert request.request_id in self._seqs, "every stream advances in every step"
        self.budget = config.max_num_batched_tokens - len(generating) * (1 + config.num_draft_tokens)
        self.prompts = [r for r in self._scheduler.running if r not in generating]
        if self.prompts:
            self._check_shares()

    def given(self, request: Request) -> int:
        seq = self._seqs.get(request.request_id)
        return 0 if seq is None else len(seq.token_ids)

    @property
    def half(self) -> int:
        """Tokens of this step that go in order of arrival."""
        return self.budget - self.budget // 2

    def _check_shares(self) -> None:
        given = {r: self.given(r) for r in self.prompts}
        left = {r: r.num_tokens - r.num_computed_tokens for r in self.prompts}
        oldest = self.prompts[0]
        assert given[oldest] >= min(left[oldest], self.half), "the oldest prompt got less than half"
        for request in self.prompts:
            no_longer = sum(tokens for tokens in left.values() if tokens <= left[request])
            if no_longer <= self.budget // 2 and not self._waits(request):
                assert given[request] == left[request], "a short prompt was not finished"
        assert sum(0 < given[r] < left[r] for r in self.prompts) <= 2, "more than two prompts were cut"
        if sum(given.values()) < self.budget:
            for request in self.prompts:
                assert given[request] == left[request] or self._waits(request), "some of the budget was left"

    def _waits(self, request: Request) -> bool:
        """Whether somebody fills the block in this step that holds the request's next token."""
        if self.given(request) or request.prompt_logprobs is not None:
            return False
        size = self._scheduler.blocks.block_size
        end = (request.num_computed_tokens // size + 1) * size
        others = (other for other in self.prompts if other is not request and self.given(other))
        return end < request.num_tokens and any(
            other.cache_salt == request.cache_salt
            and other.token_ids[:end] == request.token_ids[:end]
            and _fills(self._seqs[other.request_id], end)
            for other in others
        )


def _fills(seq: ScheduledSeq, end: int) -> bool:
    return seq.start < end <= seq.start + len(seq.token_ids)
