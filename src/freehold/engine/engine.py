"""The engine: a scheduler and a runner, advanced one step at a time by one thread. Torch-free; the runner is injected.

    engine.add(Request("a", prompt, SamplingParams(max_tokens=8)))
    while engine.has_work:
        for chunk in engine.step():
            ...

`AsyncEngine` drives it from a thread of its own; `LLM` and the planner drive it directly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from freehold.engine.block_manager import BlockManager
from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from freehold.engine.step import Runner
from freehold.errors import (
    INTERNAL_ERROR,
    ConfigError,
    EngineError,
    FreeholdError,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from freehold.types import SamplingParams, TokenChunk

logger = logging.getLogger("freehold.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine; how many blocks there are is the runner's to say (it allocates them).

    max_model_len: prompt and completion tokens of one request. block_size: tokens. max_num_seqs: requests that run
    at once. max_num_batched_tokens: the token budget of a step. max_queue: requests that may wait for their turn
    (`AsyncEngine` refuses more). cache_bytes_per_token: of all layers together, for messages.
    num_draft_tokens: see `SchedulerConfig`. adapters: names that requests may give; the runner has what they mean.
    """

    model_name: str
    max_model_len: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    cache_bytes_per_token: int
    block_size: int = 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_queue: int = 256
    enable_prefix_cache: bool = True
    num_draft_tokens: int = 0
    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_model_len", "num_blocks", "vocab_size", "block_size", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("max_queue", "num_draft_tokens", "cache_bytes_per_token"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must not be negative")
        if len({self.model_name, *self.adapters}) <= len(self.adapters):
            raise ConfigError(f"the model {self.model_name!r} and its adapters {self.adapters} need names of their own")
        if self.max_num_batched_tokens < 1 + self.num_draft_tokens:
            raise ConfigError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens}: with num_draft_tokens = "
                f"{self.num_draft_tokens} one request takes {1 + self.num_draft_tokens} tokens a step; allow so many"
            )

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.cache_bytes_per_token


class Engine:
    """Used by one thread; only the checks, `stats` and `failure` may be called from others."""

    def __init__(self, config: EngineConfig, runner: Runner, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.runner = runner
        self.clock = clock
        self.failure: FreeholdError | None = None  # set: the runner failed, and nothing will run again
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                eos_token_ids=config.eos_token_ids,
                num_draft_tokens=config.num_draft_tokens,
                cache_bytes_per_token=config.cache_bytes_per_token,
            ),
            BlockManager(config.num_blocks, config.block_size, config.enable_prefix_cache),
        )
        # "gpu" because that is what the label is called elsewhere; here it is whatever memory the runner uses.
        cache = {"block_size": config.block_size, "num_gpu_blocks": config.num_blocks}
        self.metrics = EngineMetrics(config.model_name, self.stats, cache, config.adapters)
        self._pending: list[TokenChunk] = []  # aborts, handed out by the next step
        self._closed = False

    def check(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Refuse what can never run. Raises InvalidRequest, ContextTooLong, or InsufficientMemory (with the bytes)."""
        self.scheduler.check(num_prompt_tokens, params)

    def check_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Refuse token ids that the model has no embedding for, with InvalidRequest."""
        top = self.config.vocab_size - 1
        if prompt_token_ids and not (min(prompt_token_ids) >= 0 and max(prompt_token_ids) <= top):
            wrong = next(token_id for token_id in prompt_token_ids if not 0 <= token_id <= top)
            raise InvalidRequest(f"prompt token id {wrong} is not in the vocabulary (0 to {top})", param="prompt")

    def check_adapter(self, name: str | None) -> None:
        """Refuse an adapter that is not loaded, with NotFound."""
        if name is not None and name not in self.config.adapters:
            loaded = ", ".join(self.config.adapters) or "none"
            raise NotFound(f"adapter {name!r} is not loaded; loaded are: {loaded}", param="adapter")

    def add(self, request: Request) -> None:
        """Queue a request; raises what the checks raise, and Unavailable once the runner failed or was closed."""
        if self.failure is not None or self._closed:
            reason = self.failure.message if self.failure is not None else "it was closed"
            raise Unavailable(f"the engine does not run any more: {reason}; restart the server")
        self.check_prompt(request.prompt_token_ids)
        self.check_adapter(request.adapter)
        self.scheduler.add(request)
        if request.measured:
            self.metrics.begin(request.request_id, request.arrival, request.adapter)

    def abort(self, request_id: str) -> None:
        """End a request, if there is one: its blocks are free at once, its last chunk comes with the next step."""
        chunk = self.scheduler.abort(request_id)
        if chunk is not None:
            self._pending.append(chunk)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to hand out."""
        return self.scheduler.has_work or bool(self._pending)

    def step(self) -> list[TokenChunk]:
        """Compute one step; returns what it produced, and what was aborted since the last one.

        Never raises for a failure of the runner: then every request ends with an ERROR chunk, and `failure` is set.
        """
        chunks, self._pending = self._pending, []
        started = self.clock()
        try:
            step = self.scheduler.schedule()
            if step is not None:
                chunks += self.scheduler.update(step, self.runner.execute(step))
            if not self.scheduler.has_work:  # no next step would tell the runner
                self._release()
        except Exception as error:
            step = None
            chunks += self._fail(error)
        now = self.clock()
        self.metrics.record(chunks, now, step_seconds=None if step is None else now - started)
        return chunks

    def stats(self) -> EngineStats:
        """State and totals; any thread may ask."""
        scheduler, metrics = self.scheduler, self.metrics
        counters = scheduler.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=scheduler.blocks.usage,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            draft_rounds=counters.draft_rounds,
            draft_proposed=counters.draft_proposed,
            draft_accepted=counters.draft_accepted,
            draft_proposed_at=tuple(counters.draft_proposed_at),
            draft_accepted_at=tuple(counters.draft_accepted_at),
            prompt_tokens=metrics.prompt_tokens,
            generation_tokens=metrics.generation_tokens,
            finished=dict(metrics.finished),
            paging=getattr(self.runner, "paging", None),  # of runners that have a model
        )

    def check_integrity(self) -> None:
        """Check every invariant of scheduler and blocks; raises EngineError naming the first that is broken."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        """End what is left and free the runner; idempotent."""
        if self._closed:
            return
        self._closed = True
        for request_id in list(self.scheduler.requests):
            self.abort(request_id)
        self.runner.close()

    def _release(self) -> None:
        finished = self.scheduler.take_finished()
        if finished:
            self.runner.release(finished)

    def _fail(self, error: Exception) -> list[TokenChunk]:
        if isinstance(error, FreeholdError):
            self.failure = error
        else:
            logger.error("a step failed", exc_info=error)
            self.failure = EngineError(INTERNAL_ERROR)  # its own words may hold other callers' data
            self.failure.__cause__ = error
        return self.scheduler.fail_all(self.failure)
