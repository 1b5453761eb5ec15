"""A scheduler without a runner: requests to ask it, steps in which every sequence gets given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from freehold.engine.block_manager import BlockManager
from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from freehold.engine.step import SeqOutput, StepInput
from freehold.types import SamplingParams, TokenChunk

EOS = 7


def make(num_blocks: int = 64, block_size: int = 4, **options: int) -> Scheduler:
    options = {"max_model_len": 200, "max_num_seqs": 8, "max_num_batched_tokens": 32, **options}
    return Scheduler(SchedulerConfig(eos_token_ids=(EOS,), **options), BlockManager(num_blocks, block_size))  # type: ignore[arg-type]


def ask(name: str, prompt: int | Sequence[int] = 3, salt: str | None = None, **params: object) -> Request:
    """A request; an int stands for so many tokens of a prompt that no other request has."""
    tokens = [(crc32(name.encode()) + at) % 9973 + 10 for at in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(name, tokens, SamplingParams(**{"max_tokens": 8, **params}), cache_salt=salt)  # type: ignore[arg-type]


def run(scheduler: Scheduler, *tokens: int) -> tuple[StepInput, list[TokenChunk]]:
    """One step in which every sequence that samples gets these tokens."""
    step = scheduler.schedule()
    assert step is not None
    tokens = tokens or (1,)
    outputs = [SeqOutput(seq.request_id, tokens if seq.samples else ()) for seq in step.seqs]
    chunks = scheduler.update(step, outputs)
    scheduler.check_integrity()
    return step, chunks


def shape(step: StepInput) -> list[tuple[str, int, int, bool]]:
    return [(seq.request_id, seq.start, len(seq.token_ids), seq.samples) for seq in step.seqs]
