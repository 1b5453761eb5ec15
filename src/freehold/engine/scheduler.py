"""Which tokens of which requests are computed next. Pure Python: integers in, one frozen `StepInput` out. Torch-free.

Each step is filled in this order, under `max_num_batched_tokens`:

    1. decode     every running request that generates gets its one token (and room for its drafts);
    2. admission  waiting requests are admitted, first come first served, as long as there are blocks for all their
                  tokens and fewer than `max_running` run, whether or not their turn to be computed has come;
    3. prefill    the rest of the budget is shared by the prompts that are not finished, in chunks (`shares`): half of
                  it in order of arrival, the rest shortest first.

So a long prompt delays running streams, and short prompts behind it, by at most one chunk's step, and what arrives
later takes at most half of its speed.

Blocks for a whole prompt are taken at admission, so only decoding can run out of them. Then the youngest running
request is preempted: its blocks are freed, it returns to the head of the queue, and later recomputes its prompt and
output (the prefix cache usually still has them). Blocks are given and taken in one order, that of arrival, even though
prompts are not finished in it; hence `running` is always sorted, all of it is older than all of `waiting`, and the
oldest request gets on in every step: its token if it generates, else at least half of what the decodes leave.

What the prefix cache has is looked up at admission and again before each chunk, for in between an equal prompt may
have been computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from freehold.engine.block_manager import BlockManager
from freehold.engine.request import Request, RequestStatus
from freehold.engine.shares import share
from freehold.engine.step import NewRequest, ScheduledSeq, SeqOutput, StepInput
from freehold.errors import ContextTooLong, EngineError, InsufficientMemory, InvalidRequest
from freehold.types import FinishReason, SamplingParams, TokenChunk


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """max_num_batched_tokens: the token budget of a step. max_num_seqs: requests that run at once.

    num_draft_tokens: positions reserved behind the last token of a request that samples, for drafts that the runner
        writes to the cache and verifies in the same step; a runner then returns 1 to num_draft_tokens+1 tokens. Near a
        request's limit fewer are reserved: what the block table covers is what a runner may write.
    cache_bytes_per_token: only for messages.
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    num_draft_tokens: int = 0
    cache_bytes_per_token: int = 0

    @property
    def max_running(self) -> int:
        """No more than the budget can decode in one step, so that every stream advances in every step."""
        return max(1, min(self.max_num_seqs, self.max_num_batched_tokens // (1 + self.num_draft_tokens)))


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start. Prefix tokens are counted when a request first runs, not after a preemption.

    draft_…_at: drafts by their place behind the last token, the first at index 0.
    """

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    draft_rounds: int = 0
    draft_proposed: int = 0
    draft_accepted: int = 0
    draft_proposed_at: list[int] = field(default_factory=list)
    draft_accepted_at: list[int] = field(default_factory=list)

    def count_drafts(self, proposed: int, accepted: int) -> None:
        """One round: drafts of one request in one step."""
        self.draft_rounds += 1
        self.draft_proposed += proposed
        self.draft_accepted += accepted
        missing = proposed - len(self.draft_proposed_at)
        self.draft_proposed_at.extend([0] * missing)
        self.draft_accepted_at.extend([0] * missing)
        for at in range(proposed):
            self.draft_proposed_at[at] += 1
            self.draft_accepted_at[at] += at < accepted


class Scheduler:
    """Owns every unfinished request. `schedule` and `update` alternate; `add` and `abort` come between them."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.counters = SchedulerCounters()
        self._eos = frozenset(config.eos_token_ids)
        self._finished: list[str] = []  # known to the runner, to be dropped by it
        self._next_sequence = 0
        self._next_step = 0

    # ── entering and leaving ──────────────────────────────────────────────────────────────────────────────────────────

    def check(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Refuse what could never run, even alone. Reads only the configuration, so any thread may call it."""
        if num_prompt_tokens < 1:
            raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
        total = num_prompt_tokens + params.max_tokens
        limit = self.config.max_model_len
        if total > limit:
            raise ContextTooLong(
                f"the prompt has {num_prompt_tokens:,} tokens and max_tokens is {params.max_tokens:,}, together "
                f"{total:,}, but the context length is {limit:,}; shorten the prompt or ask for at most "
                f"{max(0, limit - num_prompt_tokens):,} tokens",
                param="max_tokens" if num_prompt_tokens < limit else None,
            )
        needed = self.blocks.blocks_for(_cached_positions(num_prompt_tokens, params.max_tokens))
        if needed > self.blocks.num_blocks:
            size = self.blocks.block_size * self.config.cache_bytes_per_token
            most = self.blocks.num_blocks * self.blocks.block_size
            raise InsufficientMemory(
                f"{total:,} tokens of context need {needed * size:,} bytes of cache, but the whole cache has "
                f"{self.blocks.num_blocks * size:,} bytes ({most:,} tokens); lower max_tokens, shorten the prompt, or "
                "serve with a larger cache",
                param="max_tokens",
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises what `check` raises, and InvalidRequest for an id that is in use."""
        self.check(request.num_prompt_tokens, request.params)
        if request.request_id in self.requests:
            raise InvalidRequest(f"request id {request.request_id!r} is in use; ids must be unique", param="request_id")
        request.sequence = self._next_sequence
        self._next_sequence += 1
        stops = frozenset(request.params.stop_token_ids)
        request.ending_ids = stops if request.params.ignore_eos else stops | self._eos
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> TokenChunk | None:
        """End a request now; its blocks are free on return. None if there is no such request."""
        request = self.requests.get(request_id)
        return None if request is None else self._finish(request, FinishReason.ABORT)

    def fail_all(self, error: Exception) -> list[TokenChunk]:
        """End every request with ERROR: the runner failed."""
        return [self._finish(request, FinishReason.ERROR, error=error) for request in list(self.requests.values())]

    def take_finished(self) -> tuple[str, ...]:
        """Ids the runner may forget, for when no step will tell it."""
        finished, self._finished = tuple(self._finished), []
        return finished

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    # ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> StepInput | None:
        """The next step, or None if there is nothing to compute."""
        if not self.requests:
            return None
        seqs: list[ScheduledSeq] = []
        new: list[NewRequest] = []
        preempted = self.counters.preemptions
        budget = self._schedule_decodes(seqs, new, self.config.max_num_batched_tokens)
        decoding = len(seqs)
        if preempted == self.counters.preemptions:  # what was just preempted must not be admitted in its place
            self._admit()
        self._schedule_prefills(seqs, new, budget, decoding)
        if not seqs:
            raise EngineError("scheduler: requests are waiting but none can run")  # excluded by check()
        self._next_step += 1
        return StepInput(self._next_step, tuple(seqs), tuple(new), self.take_finished())

    def _schedule_decodes(self, seqs: list[ScheduledSeq], new: list[NewRequest], budget: int) -> int:
        running, drafts = self.running, self.config.num_draft_tokens
        at = 0
        while at < len(running):  # preemption shortens the list at its end
            request = running[at]
            at += 1
            if request.num_computed_tokens != len(request.token_ids) - 1:
                continue
            if not self._reserve(request):
                break  # it was the youngest, and preempted itself
            self._schedule(request, 1, seqs, new)
            budget -= 1 + drafts
        return budget

    def _reserve(self, request: Request) -> bool:
        """Make the table cover the last token and its drafts, preempting the youngest until it fits."""
        positions = self.positions_wanted(request)
        table = request.table
        if positions <= len(table.blocks) * self.blocks.block_size:
            return True
        while not self.blocks.extend(table, positions):
            if self.preempt_youngest() is request:
                return False
        return True

    def _admit(self) -> None:
        """Admit in order of arrival, and nobody overtakes: a large request would wait for ever."""
        while self.waiting and len(self.running) < self.config.max_running and self._take_blocks(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            request.status = RequestStatus.RUNNING

    def _take_blocks(self, request: Request) -> bool:
        """Give a waiting request blocks for all its tokens, beginning with those the prefix cache has."""
        prefix = self.blocks.find_prefix(request.table, request.token_ids) if self._may_share(request) else []
        # A spare block for each running request keeps it from preempting the newcomer as soon as its own is full.
        wanted = self.positions_wanted(request)
        if not self.blocks.allocate(request.table, wanted, prefix, spare=len(self.running)):
            return False
        request.num_computed_tokens = len(prefix) * self.blocks.block_size
        return True

    def _may_share(self, request: Request) -> bool:
        """Logprobs of the prompt need every position computed, until they have been handed out."""
        return self.blocks.enable_prefix_cache and request.prompt_logprobs is None

    def _schedule_prefills(self, seqs: list[ScheduledSeq], new: list[NewRequest], budget: int, decoding: int) -> None:
        """Chunks of all that run but the `decoding` ones that have their token, which are first in `seqs`."""
        if len(self.running) == decoding:
            return
        scheduled = {seq.request_id for seq in seqs}
        prompts = [request for request in self.running if request.request_id not in scheduled]
        for request in prompts:
            self._adopt(request)
        for request, count in self._share(prompts, budget):
            self._schedule(request, count, seqs, new)

    def _adopt(self, request: Request) -> None:
        """Take over what others have computed of a prompt since it was admitted or had its last chunk."""
        if self._may_share(request) and self.blocks.adopt(request.table, request.token_ids):
            request.num_computed_tokens = request.table.num_published * self.blocks.block_size

    def _share(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        return share(prompts, budget, self.blocks.block_size if self.blocks.enable_prefix_cache else None)

    def _schedule(self, request: Request, count: int, seqs: list[ScheduledSeq], new: list[NewRequest]) -> None:
        """Add the next `count` tokens of a request to the step."""
        if not request.announced:
            self._announce(request, new)
        start, stop = request.num_computed_tokens, request.num_computed_tokens + count
        tokens = (request.token_ids[start],) if count == 1 else tuple(request.token_ids[start:stop])
        table = request.table
        samples = stop == len(request.token_ids)
        following = None if samples else request.token_ids[stop]
        seqs.append(ScheduledSeq(request.request_id, tokens, start, table.ids, table.epoch, samples, following))

    def _announce(self, request: Request, new: list[NewRequest]) -> None:
        """A request runs for the first time: tell the runner, and count what others had computed of it."""
        request.announced = True
        new.append(NewRequest(request.request_id, request.prompt_token_ids, request.params, request.adapter))
        if self._may_share(request):
            request.num_cached_tokens = request.num_computed_tokens
            self.counters.prefix_queries += request.num_prompt_tokens
            self.counters.prefix_hits += request.num_cached_tokens

    def positions_wanted(self, request: Request, more: int = 0) -> int:
        """Positions to hold a place in the cache for: all known tokens, and drafts as far as the request can go.

        more: as it will be when so many more tokens are known.
        """
        known = len(request.token_ids) + more
        drafts = self.config.num_draft_tokens
        if not drafts:
            return known
        most = _cached_positions(request.num_prompt_tokens, request.params.max_tokens)
        return max(known, min(known + drafts, most))

    def preempt_youngest(self) -> Request | None:
        """Take the blocks of the youngest running request and queue it again, at the head."""
        if not self.running:
            return None
        request = self.running.pop()
        self.blocks.free(request.table)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.counters.preemptions += 1
        return request

    # ── what came of it ───────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, step: StepInput, outputs: Sequence[SeqOutput]) -> list[TokenChunk]:
        """Take a step's outputs, in the order of `step.seqs`; returns the chunks of the requests that got tokens.

        A sequence that samples may return no token yet: it is scheduled again unchanged. Raises EngineError if the
        outputs are not those of this step.
        """
        if len(outputs) != len(step.seqs):
            raise EngineError(f"the runner returned {len(outputs)} outputs for {len(step.seqs)} sequences")
        chunks: list[TokenChunk] = []
        for seq, output in zip(step.seqs, outputs, strict=True):
            if seq.request_id != output.request_id:
                raise EngineError(f"the runner returned {output.request_id!r} in the place of {seq.request_id!r}")
            request = self.requests.get(seq.request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue  # aborted or preempted while the step ran
            if output.error is not None:
                chunks.append(self._finish(request, FinishReason.ERROR, error=output.error))
                continue
            if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
                # After a preemption, positions that were scored before come again.
                scored = len(request.prompt_logprobs) - 1 - seq.start
                request.prompt_logprobs.extend(output.prompt_logprobs[max(0, scored) :])
            if not seq.samples:
                request.num_computed_tokens = seq.start + len(seq.token_ids)
                self._publish(request)
            elif output.token_ids:
                chunks.append(self._accept(request, output))
        return chunks

    def _accept(self, request: Request, output: SeqOutput) -> TokenChunk:
        """Append the sampled tokens, up to the one that ends the request if one does."""
        broken = self._broken_contract(request, output)
        if broken is not None:
            return self._finish(request, FinishReason.ERROR, error=broken)
        kept, reason = _append(request, output.token_ids)
        # Whatever was kept but the last token is in the cache already: drafts are computed before they are accepted.
        request.num_computed_tokens = len(request.token_ids) - (kept > 0)
        self._publish(request)
        if output.draft_proposed:
            self._count_drafts(request, output.draft_proposed, min(output.draft_accepted, kept))
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        chunk = TokenChunk(
            request.request_id,
            output.token_ids[:kept],
            None if output.logprobs is None else output.logprobs[:kept],
            None if prompt_logprobs is None else tuple(prompt_logprobs),
            reason,
            request.token_ids[-1] if reason is FinishReason.STOP else None,
            request.usage(),
        )
        if reason is not None:
            self._remove(request)
        return chunk

    def _broken_contract(self, request: Request, output: SeqOutput) -> EngineError | None:
        room = 1 + self.config.num_draft_tokens
        if len(output.token_ids) > room:
            return EngineError(f"the runner returned {len(output.token_ids)} tokens, but the cache has room for {room}")
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) != request.num_prompt_tokens:
            scored, wanted = len(request.prompt_logprobs) - 1, request.num_prompt_tokens - 1
            return EngineError(f"the runner scored {scored} of {wanted} prompt tokens")
        return None

    def _count_drafts(self, request: Request, proposed: int, accepted: int) -> None:
        request.draft_proposed += proposed
        request.draft_accepted += accepted
        self.counters.count_drafts(proposed, accepted)

    def _publish(self, request: Request) -> None:
        table, blocks = request.table, self.blocks
        if blocks.enable_prefix_cache and request.num_computed_tokens // blocks.block_size > table.num_published:
            blocks.publish(table, request.token_ids, request.num_computed_tokens)

    def _finish(self, request: Request, reason: FinishReason, error: Exception | None = None) -> TokenChunk:
        self._remove(request)
        return TokenChunk(request.request_id, finish_reason=reason, usage=request.usage(), error=error)

    def _remove(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self.blocks.free(request.table)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        del self.requests[request.request_id]
        if request.announced:
            self._finished.append(request.request_id)

    # ── checks ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_integrity(self) -> None:
        """Check every invariant, between steps; raises EngineError naming the first that is broken."""

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise EngineError(f"scheduler integrity: {message}")

        order = [request.sequence for request in (*self.running, *self.waiting)]
        require(order == sorted(order), f"running and waiting requests are not in order of arrival: {order}")
        everyone = {request.request_id: request for request in (*self.running, *self.waiting)}
        require(everyone == self.requests, "a request is lost, or queued twice")
        require(len(self.running) <= self.config.max_running, "more requests run than may")
        for request in self.running:
            covered = len(request.table.blocks) * self.blocks.block_size
            require(request.status is RequestStatus.RUNNING, f"{request} runs with another status")
            require(request.num_computed_tokens < request.num_tokens, f"{request} has nothing to compute")
            require(request.num_computed_tokens <= covered, f"{request} has computed more than its table covers")
            full = request.num_computed_tokens // self.blocks.block_size
            require(request.table.num_published <= full, f"{request} has published what is not computed")
        for request in self.waiting:
            require(not request.table.blocks and request.num_computed_tokens == 0, f"{request} waits but holds blocks")
            queued = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            require(request.status in queued, f"{request} waits with another status")
        self.blocks.check_integrity(request.table for request in self.running)


def _append(request: Request, token_ids: Sequence[int]) -> tuple[int, FinishReason | None]:
    """Append tokens until one ends the request; returns how many, and why it ended, if it did."""
    room = request.params.max_tokens - len(request.output_token_ids)
    if room < 1:
        return 0, FinishReason.LENGTH  # max_tokens = 0: only the prompt was to be computed
    kept, reason = len(token_ids), None
    for at, token_id in enumerate(token_ids, 1):
        if token_id in request.ending_ids:
            kept, reason = at, FinishReason.STOP
            break
        if at == room:
            kept, reason = at, FinishReason.LENGTH
            break
    request.extend(token_ids[:kept])
    return kept, reason


def _cached_positions(num_prompt_tokens: int, max_tokens: int) -> int:
    """The most positions a request ever has in the cache: the last token it generates is never computed."""
    return num_prompt_tokens + max(0, max_tokens - 1)
