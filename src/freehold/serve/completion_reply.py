"""From text events to text completions: one body, or a stream of chunks, with logprobs in the old aligned lists."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from freehold.serve.bodies import FINGERPRINT, finish_reason, finite, prompt_logprobs_body, usage_body
from freehold.serve.reader import TextDelta, TextEvent
from freehold.serve.schema import Completion, CompletionChoice, CompletionLogprobs, PromptLogprobs, UsageBody
from freehold.serve.stream import merge, sse
from freehold.serve.turn import TextToken, TurnFinished
from freehold.serve.wire import encode_json
from freehold.types import Usage

if TYPE_CHECKING:
    from freehold.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for, as far as the answer shows it. Choice i is the (i % n)-th of prompt i // n.

    generated: False when only the prompt is scored (max_tokens 0): then nothing after the prompt is shown or counted.
    logprobs, prompt_logprobs: how many alternatives, or None.
    """

    id: str
    created: int
    model: str
    n: int
    prompts: tuple[tuple[int, ...], ...]
    tokenizer: Tokenizer
    echo: bool
    generated: bool
    logprobs: int | None
    prompt_logprobs: int | None

    @property
    def count(self) -> int:
        return len(self.prompts) * self.n

    def prompt_ids(self, index: int) -> tuple[int, ...]:
        return self.prompts[index // self.n]

    def completion(self, choices: list[CompletionChoice], usage: UsageBody | UnsetType | None) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )


class _Lists:
    """Grows the aligned lists of one choice. Text offsets are in characters of the whole choice."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._offset = 0

    def of(self, tokens: Sequence[tuple[int, TextToken | None]]) -> CompletionLogprobs:
        """The lists of the next tokens; None stands for the prompt's first, which nothing predicts."""
        lists = CompletionLogprobs([], [], [], [], [])
        for token_id, token in tokens:
            raw = self._asked.tokenizer.token_bytes(token_id) if token is None else token.bytes_
            lists.tokens.append(raw.decode("utf-8", "replace") if token is None else token.text)
            lists.token_logprobs.append(None if token is None else finite(token.logprobs.logprob))
            lists.top_logprobs.append(None if token is None else self._top(token))
            lists.text_offset.append(self._offset)
            lists.bytes.append(list(raw))
            # Bytes that begin a character; a token may be a part of one.
            self._offset += sum(byte & 0xC0 != 0x80 for byte in raw)
        return lists

    def _top(self, token: TextToken) -> dict[str, float]:
        best = {token.text: finite(token.logprobs.logprob)}
        for text, _, logprob in token.top_text[: self._asked.logprobs]:
            best.setdefault(text, finite(logprob))
        return best


@dataclass(frozen=True, slots=True)
class _Shown:
    """What one event adds to the answer."""

    text: str = ""
    logprobs: CompletionLogprobs | None = None


class _Choice:
    """One choice as it grows: the prompt first if it is echoed, then what was generated."""

    def __init__(self, asked: Asked, index: int) -> None:
        self._asked = asked
        self._ids = asked.prompt_ids(index)
        self._lists = _Lists(asked)
        self._begun = False
        self.prompt: tuple[TextToken | None, ...] | None = None
        self.finished: TurnFinished | None = None

    def read(self, event: TextEvent) -> _Shown:
        asked = self._asked
        text, tokens = [], list[tuple[int, TextToken | None]]()
        if isinstance(event, TextDelta) and event.prompt is not None:
            self.prompt = event.prompt
            if asked.echo:
                tokens += zip(self._ids, event.prompt, strict=True)
        if asked.echo and not self._begun:
            text.append(asked.tokenizer.decode(self._ids))
        self._begun = True
        if isinstance(event, TurnFinished):
            self.finished = event if asked.generated else _scored(event)
        elif asked.generated:
            text.append(event.text)
            tokens += ((token.logprobs.token_id, token) for token in event.tokens)
        return _Shown("".join(text), None if asked.logprobs is None or not tokens else self._lists.of(tokens))

    def end(self) -> TurnFinished:
        assert self.finished is not None  # it is always the last event
        return self.finished

    def prompt_body(self) -> PromptLogprobs | UnsetType:
        if self.prompt is None or self._asked.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs_body(self.prompt, self._asked.prompt_logprobs)


def _scored(event: TurnFinished) -> TurnFinished:
    """The end of a choice that only scores its prompt: the engine had to generate a token, but nobody asked for it."""
    return replace(event, usage=replace(event.usage, completion_tokens=0), stop_sequence=None)


def _usage(asked: Asked, ends: Sequence[TurnFinished]) -> UsageBody:
    firsts = ends[:: asked.n]
    return usage_body([end.usage for end in firsts], [(end.usage, end.reasoning_tokens) for end in ends])


async def collect(asked: Asked, streams: Sequence[AsyncGenerator[TextEvent, None]]) -> Completion:
    """Wait for every choice and put the body together. Closes the streams."""
    choices = [_Choice(asked, index) for index in range(asked.count)]
    shown: list[list[_Shown]] = [[] for _ in choices]
    merged = merge(streams)
    try:
        async for index, event in merged:
            shown[index].append(choices[index].read(event))
    finally:
        await merged.aclose()
    ends = [choice.end() for choice in choices]
    bodies = [
        CompletionChoice(
            index,
            "".join(piece.text for piece in shown[index]),
            _joined([piece.logprobs for piece in shown[index] if piece.logprobs is not None], asked),
            finish_reason(ends[index]),
            ends[index].stop_sequence,
            choice.prompt_body(),
        )
        for index, choice in enumerate(choices)
    ]
    return asked.completion(bodies, _usage(asked, ends))


def _joined(pieces: Sequence[CompletionLogprobs], asked: Asked) -> CompletionLogprobs | None:
    if asked.logprobs is None:
        return None
    joined = CompletionLogprobs([], [], [], [], [])
    for piece in pieces:
        for name in CompletionLogprobs.__struct_fields__:
            getattr(joined, name).extend(getattr(piece, name))
    return joined


class CompletionWriter:
    """Turns events into SSE frames. One per response."""

    def __init__(self, asked: Asked, *, with_usage: bool, running: bool = False) -> None:
        """with_usage: at the end; running: and in every chunk, of all choices so far."""
        self._asked = asked
        self._with_usage = with_usage
        self._running: dict[int, Usage] | None = {} if running else None
        self._choices = [_Choice(asked, index) for index in range(asked.count)]

    def frame(self, index: int, event: TextEvent) -> bytes:
        """The frame of one event of one choice; b"" if it adds nothing."""
        choice = self._choices[index]
        shown = choice.read(event)
        usage = self._usage_with(index, event)
        if choice.finished is None:
            if not shown.text and shown.logprobs is None:
                return b""
            return self._chunk([CompletionChoice(index, shown.text, shown.logprobs)], usage)
        reason, stopped = finish_reason(choice.finished), choice.finished.stop_sequence
        return self._chunk([CompletionChoice(index, shown.text, shown.logprobs, reason, stopped)], usage)

    def _usage_with(self, index: int, event: TextEvent) -> UsageBody | None:
        """What has been generated so far, if every chunk shall say it. Prompts of choices that have begun count."""
        if self._running is None:
            return None
        end = self._choices[index].finished
        if end is not None:
            self._running[index] = end.usage
        elif isinstance(event, TextDelta) and event.so_far is not None and self._asked.generated:
            self._running[index] = event.so_far.usage
        prompts = {at // self._asked.n: usage for at, usage in self._running.items()}
        return usage_body(prompts.values(), [(usage, 0) for usage in self._running.values()])

    def usage_frame(self) -> bytes:
        """The last chunk, if usage was asked for: no choices, the sum of all of them."""
        if not self._with_usage:
            return b""
        return self._chunk([], _usage(self._asked, [choice.end() for choice in self._choices]))

    def _chunk(self, choices: list[CompletionChoice], usage: UsageBody | None = None) -> bytes:
        return sse(encode_json(self._asked.completion(choices, usage if self._with_usage else UNSET)))
