"""One engine step as data: what the scheduler hands to a runner, and what the runner hands back.

The scheduler and the block manager are pure Python; a runner turns these integers into tensors
(`runner.ModelRunner`), into canned text (`sim.SimRunner`) or into a clock (the planner).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from freehold.types import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request the runner has not seen: it keeps per-request sampling state from here to `StepInput.finished`.

    adapter: the name of the adapter that computes it; None: the model as it is.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """One request's share of a step.

    token_ids: the tokens to compute, at positions start .. start+len-1. Decode has one; a prefill chunk
        (or a recompute after preemption, which also replays generated tokens) has many.
    block_ids: the block table; it covers every position up to start+len-1, and those of drafts behind it as far as
        the request may still go. Position p lives in slot block_ids[p // block_size] * block_size + p % block_size.
    block_epoch: changes whenever the table was rebuilt rather than only extended, so that a runner may
        keep a tensor of the table and append to it.
    samples: the chunk reaches the last known token, so its last logits give the next token.
    following: the token after the chunk, where it is known: where `samples` is false.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    block_epoch: int
    samples: bool
    following: int | None = None


@dataclass(frozen=True, slots=True)
class StepInput:
    """What to compute: decodes first, then prefill chunks. Never empty when executed."""

    step_id: int
    seqs: tuple[ScheduledSeq, ...]
    new: tuple[NewRequest, ...] = ()
    finished: tuple[str, ...] = ()  # finished or aborted since the last step: drop their state

    @property
    def num_tokens(self) -> int:
        return sum(len(seq.token_ids) for seq in self.seqs)


@dataclass(frozen=True, slots=True)
class SeqOutput:
    """What the runner found for one scheduled sequence, in the order of `StepInput.seqs`.

    token_ids: () where `samples` was false; else the accepted tokens (1, or up to k+1 with drafts), whose positions
        but the last's are in the cache; () also if there is none yet, and the same step is to be tried again.
    prompt_logprobs: one entry per computed prompt position p of this chunk, scoring token p+1
        (absent for the last prompt token, whose successor is sampled); None if not asked for.
    error: the failure of this request alone (for instance its grammar); it is finished with ERROR.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    draft_proposed: int = 0
    draft_accepted: int = 0
    error: Exception | None = None


class Runner(Protocol):
    """Executes steps. Called from one thread only."""

    def execute(self, step: StepInput) -> list[SeqOutput]:
        """Compute one step. Raises only for failures of the whole step."""
        ...

    def release(self, request_ids: tuple[str, ...]) -> None:
        """Drop per-request state outside a step (when nothing is left to run)."""
        ...

    def close(self) -> None:
        """Free threads and memory; idempotent."""
        ...
