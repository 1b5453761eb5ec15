"""What a checkpoint makes of chats, through the engine that serves it: loss, perplexity, and whether greedy answers are
exactly the given ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.errors import EngineError
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train.data.example import Example, encode
from freehold.types import SamplingParams

_SPARE_TOKENS = 64  # an answer may be so much longer than the given one, and a half as long again, before it is cut
_AT_ONCE = 64  # requests in the engine
_ADAPTER = "adapter measured"  # its name in the engine
Progress = Callable[[int, int], None]
"""Called with (chats done, chats in all)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """chats; tokens of theirs that the assistant says; loss: nats of such a token, mean over all of them; exact: chats
    whose last answer came out exactly as given. answers: what came out, chat by chat, without the thinking."""

    chats: int
    tokens: int
    loss: float
    exact: int
    answers: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def exact_share(self) -> float:
        return self.exact / self.chats


def measure(
    directory: str | Path,
    examples: Sequence[Example],
    *,
    adapter: str | Path | None = None,
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Load the checkpoint, and an adapter of it if one is given, run every chat through it, and give its memory back.

    The loss is over all that the assistant says in a chat, given all before it; the answer is generated greedily from
    what a server would be sent, the chat without its last message. Raises what `build_engine` raises, InvalidRequest
    and ContextTooLong for a chat that does not fit, EngineError.
    """
    if not examples:
        raise ValueError("there is nothing to measure")
    options = options or EngineOptions()
    if adapter is not None:
        options = replace(options, lora=((_ADAPTER, Path(adapter)),))
    engine, tokenizer = build_engine(directory, options)
    try:
        template = ChatTemplate.from_dir(directory).for_tokenizer(tokenizer)
        return _Run(engine, tokenizer, template, None if adapter is None else _ADAPTER).measure(examples, progress)
    finally:
        engine.close()


class _Run:
    """One engine, and the requests that measure."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, adapter: str | None) -> None:
        self._engine, self._tokenizer, self._template, self._adapter = engine, tokenizer, template, adapter

    def measure(self, examples: Sequence[Example], progress: Progress | None) -> Measured:
        losses: list[float] = []
        answers: list[str] = []
        exact = 0
        for first in range(0, len(examples), _AT_ONCE):
            some = examples[first : first + _AT_ONCE]
            losses += self._losses(some)
            for example, answer in zip(some, self._answers(some), strict=True):
                answers.append(answer)
                exact += answer == self._given(example)
            if progress is not None:
                progress(first + len(some), len(examples))
        return Measured(len(examples), len(losses), math.fsum(losses) / len(losses), exact, tuple(answers))

    def _losses(self, examples: Sequence[Example]) -> list[float]:
        """-log p of every token that an assistant says, all chats one after the other."""
        encoded = [encode(example, self._tokenizer, self._template) for example in examples]
        found = self._run(
            [one.ids for one in encoded], [SamplingParams(max_tokens=1, prompt_logprobs=0)] * len(encoded)
        )
        losses: list[float] = []
        for one, (_, logprobs) in zip(encoded, found, strict=True):
            losses += [-value for value, trained in zip(logprobs, one.trained, strict=True) if trained]
        return losses

    def _answers(self, examples: Sequence[Example]) -> list[str]:
        prompts = [self._template.render(example.prompt, example.tools, effort=example.effort) for example in examples]
        ids = [list(prompt.encode(self._tokenizer)) for prompt in prompts]
        longest = self._engine.config.max_model_len
        wanted = [len(encode(example, self._tokenizer, self._template).ids) for example in examples]
        params = [
            SamplingParams(
                max_tokens=max(1, min(longest - len(own), (total - len(own)) * 3 // 2 + _SPARE_TOKENS)), temperature=0.0
            )
            for own, total in zip(ids, wanted, strict=True)
        ]
        found = self._run(ids, params)
        return [
            self._said(tokens, thinking=prompt.thinking) for prompt, (tokens, _) in zip(prompts, found, strict=True)
        ]

    def _given(self, example: Example) -> str:
        """The given answer as `_said` would read it."""
        one = encode(example, self._tokenizer, self._template)
        last = len(one.trained)
        while last > 0 and one.trained[last - 1]:
            last -= 1
        return self._said(one.ids[last:], thinking=example.effort != "none")

    def _said(self, ids: Sequence[int], *, thinking: bool) -> str:
        """The answer as text, tool calls in GLM's grammar, without the thinking and the token that ends the turn."""
        text = self._tokenizer.decode([token for token in ids if token not in self._engine.config.eos_token_ids])
        if thinking:
            text = text.partition("</think>")[2]
        return text.strip()

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[tuple[list[int], list[float]]]:
        """(tokens, log-probabilities of the prompt's tokens: 0 for the first, none unless asked for) of each."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for number, (ids, asked) in enumerate(zip(prompts, params, strict=True)):
            found[str(number)] = ([], [])
            self._engine.add(Request(str(number), ids, asked, adapter=self._adapter))
        while self._engine.has_work:
            for chunk in self._engine.step():
                if chunk.error is not None:
                    raise chunk.error if isinstance(chunk.error, EngineError) else EngineError(str(chunk.error))
                tokens, logprobs = found[chunk.request_id]
                tokens += chunk.token_ids
                if chunk.prompt_logprobs is not None:
                    logprobs += [0.0 if entry is None else entry.logprob for entry in chunk.prompt_logprobs]
        return list(found.values())
