"""From a turn's events to chat completions: one body, or a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET

from freehold.serve import schema
from freehold.serve.bodies import (
    FINGERPRINT,
    finish_reason,
    prompt_logprobs_body,
    token_logprob,
    usage_body,
    usage_so_far,
)
from freehold.serve.schema import ChatChunk, ChatLogprobs, ChunkChoice, Delta, FunctionDelta, ToolCallDelta
from freehold.serve.stream import merge, sse
from freehold.serve.turn import (
    ContentDelta,
    Event,
    PromptScored,
    ReasoningDelta,
    SoFar,
    TextToken,
    ToolCallArguments,
    ToolCallStart,
    TurnFinished,
)
from freehold.serve.wire import encode_json


@dataclass(frozen=True, slots=True)
class Reply:
    """What every chunk and body of one answer repeats. created: unix seconds."""

    id: str
    created: int
    model: str
    logprobs: bool = False


# ---- whole -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Collector:
    """Gathers one choice's events."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    content_tokens: list[TextToken] = field(default_factory=list)
    reasoning_tokens: list[TextToken] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    prompt: tuple[TextToken | None, ...] | None = None
    finished: TurnFinished | None = None

    def add(self, event: Event) -> None:
        match event:
            case ContentDelta():
                self.content.append(event.text)
                self.content_tokens += event.tokens
            case ReasoningDelta():
                self.reasoning.append(event.text)
                self.reasoning_tokens += event.tokens
            case ToolCallStart():
                self.calls.append(_Call(event.id, event.name))
            case ToolCallArguments():
                self.calls[event.index].arguments.append(event.fragment)
            case PromptScored():
                self.prompt = event.tokens
            case TurnFinished():
                self.finished = event

    def choice(self, index: int, *, logprobs: bool) -> schema.ChatChoice:
        assert self.finished is not None  # it is always the last event
        content, reasoning = "".join(self.content), "".join(self.reasoning) or None
        calls = [
            schema.ToolCallOut(call.id, "function", schema.FunctionCallOut(call.name, "".join(call.arguments)))
            for call in self.calls
        ]
        message = schema.AssistantOut(
            content=None if calls and not content else content,
            reasoning_content=reasoning,
            reasoning=reasoning,
            tool_calls=calls or UNSET,
        )
        scores = _logprobs(self.content_tokens, self.reasoning_tokens) if logprobs else None
        return schema.ChatChoice(index, message, finish_reason(self.finished), scores, self.finished.stop_sequence)


def _logprobs(content: Sequence[TextToken], reasoning: Sequence[TextToken]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[token_logprob(token) for token in content],
        reasoning=[token_logprob(token) for token in reasoning] if reasoning else UNSET,
    )


async def collect(reply: Reply, streams: Sequence[AsyncGenerator[Event, None]]) -> schema.ChatCompletion:
    """Wait for every choice and put the body together. Closes the streams."""
    choices = [_Collector() for _ in streams]
    merged = merge(streams)
    try:
        async for index, event in merged:
            choices[index].add(event)
    finally:
        await merged.aclose()
    ends = [choice.finished for choice in choices if choice.finished is not None]
    prompt = choices[0].prompt
    return schema.ChatCompletion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=[choice.choice(index, logprobs=reply.logprobs) for index, choice in enumerate(choices)],
        usage=usage_body([ends[0].usage], [(end.usage, end.reasoning_tokens) for end in ends]),
        system_fingerprint=FINGERPRINT,
        prompt_logprobs=UNSET if prompt is None else prompt_logprobs_body(prompt),
    )


# ---- streamed ----------------------------------------------------------------------------------------------


class ChunkWriter:
    """Turns events into SSE frames. One per response; it knows which choices have begun and how they ended."""

    def __init__(self, reply: Reply, *, with_usage: bool, running: bool = False) -> None:
        """with_usage: at the end; running: and in every chunk, of all choices so far."""
        self._reply = reply
        self._with_usage = with_usage
        self._running: dict[int, SoFar] | None = {} if running else None
        self._begun: set[int] = set()
        self._ends: dict[int, TurnFinished] = {}

    def frame(self, index: int, event: Event) -> bytes:
        """The frames of one event of one choice; b"" if it has none. The first is preceded by the role."""
        self._count(index, event)
        finish: schema.FinishReasonWord | None = None
        tokens: ChatLogprobs | None = None
        match event:
            case ContentDelta():
                delta = Delta(content=event.text)
                if self._reply.logprobs:
                    tokens = _logprobs(event.tokens, ())
            case ReasoningDelta():
                delta = Delta(reasoning_content=event.text, reasoning=event.text)
                if self._reply.logprobs:
                    tokens = ChatLogprobs(content=None, reasoning=[token_logprob(token) for token in event.tokens])
            case ToolCallStart():
                delta = _call_delta(event.index, FunctionDelta("", event.name), event.id)
            case ToolCallArguments():
                delta = _call_delta(event.index, FunctionDelta(event.fragment))
            case TurnFinished():
                delta, finish = Delta(), finish_reason(event)
                self._ends[index] = event
            case PromptScored():
                return b""
        frame = self._chunk([ChunkChoice(index, delta, tokens, finish)], self._usage_so_far())
        if index in self._begun:
            return frame
        self._begun.add(index)
        # Without a usage: what has been generated comes with the frame after it.
        return self._chunk([ChunkChoice(index, Delta(role="assistant", content=""))]) + frame

    def _count(self, index: int, event: Event) -> None:
        if self._running is None or isinstance(event, PromptScored):
            return
        if isinstance(event, TurnFinished):
            self._running[index] = SoFar(event.usage, event.reasoning_tokens)
        elif event.so_far is not None:
            self._running[index] = event.so_far

    def _usage_so_far(self) -> schema.UsageBody | None:
        return usage_so_far(list(self._running.values())) if self._running else None

    def usage_frame(self) -> bytes:
        """The last chunk, if usage was asked for: no choices, the sum of all of them."""
        if not self._with_usage:
            return b""
        ends = list(self._ends.values())
        usage = usage_body([self._ends[0].usage], [(end.usage, end.reasoning_tokens) for end in ends])
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChunkChoice], usage: schema.UsageBody | None = None) -> bytes:
        reply = self._reply
        chunk = ChatChunk(
            id=reply.id,
            created=reply.created,
            model=reply.model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage if self._with_usage else UNSET,
        )
        return sse(encode_json(chunk))


def _call_delta(index: int, function: FunctionDelta, call_id: str | None = None) -> Delta:
    if call_id is None:
        return Delta(tool_calls=[ToolCallDelta(index, function)])
    return Delta(tool_calls=[ToolCallDelta(index, function, call_id, "function")])
