"""A real engine whose runner says what a test wants it to say, token for token."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from freehold.engine.async_engine import AsyncEngine
from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.step import ScheduledSeq, SeqOutput, StepInput
from freehold.model.tokenizer import Tokenizer
from freehold.types import SamplingParams, TokenLogprobs

TOY = Tokenizer.toy(512)


def special(text: str) -> int:
    """The id of a control token of the toy tokenizer."""
    found = TOY.special_id(text)
    assert found is not None
    return found


END = special("<|user|>")


class ScriptedRunner:
    """Gives every request the tokens of one script, `per_step` at a time, and then end-of-turn tokens for ever.

    fail_after: the request fails when it has that many tokens. seconds: that a step takes, for tests that must come in
    between. Each token's logprob is minus its place in the script.
    """

    def __init__(
        self,
        script: str,
        *,
        per_step: int = 1,
        fail_after: int | None = None,
        special: bool = True,
        seconds: float = 0.0,
    ) -> None:
        self.token_ids = TOY.encode(script, special=special)
        self.per_step = per_step
        self.fail_after = fail_after
        self.seconds = seconds
        self.params: dict[str, SamplingParams] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}

    def execute(self, step: StepInput) -> list[SeqOutput]:
        time.sleep(self.seconds)
        for new in step.new:
            self.params[new.request_id] = new.params
            self.prompts[new.request_id] = new.prompt_token_ids
        return [self._output(seq) for seq in step.seqs]

    def _output(self, seq: ScheduledSeq) -> SeqOutput:
        prompt, params = self.prompts[seq.request_id], self.params[seq.request_id]
        following = prompt[seq.start + 1 : seq.start + len(seq.token_ids) + 1]
        scored = tuple(TokenLogprobs(id_, -float(n), 1) for n, id_ in enumerate(following, seq.start + 1))
        prompt_logprobs = scored if params.prompt_logprobs is not None else None
        if not seq.samples:
            return SeqOutput(seq.request_id, prompt_logprobs=prompt_logprobs)
        first = max(0, seq.start + len(seq.token_ids) - len(prompt))
        if self.fail_after is not None and first >= self.fail_after:
            return SeqOutput(seq.request_id, error=ZeroDivisionError("scripted failure"))
        places = range(first, first + (1 if len(seq.token_ids) > 1 else self.per_step))
        ids = tuple(self.token_ids[i] if i < len(self.token_ids) else END for i in places)
        logprobs = tuple(
            TokenLogprobs(id_, -float(i), 1, ((id_, -float(i)),)) for i, id_ in zip(places, ids, strict=True)
        )
        drafts = len(ids) - 1
        return SeqOutput(
            seq.request_id, ids, logprobs if params.logprobs is not None else None, prompt_logprobs, drafts, drafts
        )

    def release(self, request_ids: tuple[str, ...]) -> None:
        """Keeps everything, for tests to look at."""

    def close(self) -> None:
        """Nothing to close."""


@asynccontextmanager
async def scripted_engine(
    runner: ScriptedRunner, *, max_model_len: int = 4096, num_blocks: int = 512
) -> AsyncIterator[AsyncEngine]:
    """A running engine; on leaving, it must hold no block and no request."""
    config = EngineConfig(
        model_name="scripted",
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=16,
        eos_token_ids=(END, special("<|observation|>"), special("<|endoftext|>")),
        vocab_size=TOY.vocab_size,
        cache_bytes_per_token=10,
        num_draft_tokens=runner.per_step - 1,
    )
    engine = AsyncEngine(Engine(config, runner))
    await engine.start()
    try:
        yield engine
        await engine.drain(5)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
    finally:
        await engine.close()
