"""Whole answers put together from events: what `LLM` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from freehold.errors import FreeholdError
from freehold.serve.reader import TextDelta, TextEvent
from freehold.serve.turn import (
    ContentDelta,
    Event,
    PromptScored,
    ReasoningDelta,
    TextToken,
    ToolCallArguments,
    ToolCallStart,
    TurnFinished,
)
from freehold.types import Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """One continued text. finish_reason: "stop", "length", "abort", or "error" (then `error` says what, and the text
    is empty). scored and prompt_scored: the tokens, only when logprobs and prompt_logprobs were asked for; the first
    prompt token has none."""

    text: str
    finish_reason: str
    usage: Usage
    stop_sequence: str | None = None
    scored: tuple[TextToken, ...] = ()
    prompt_scored: tuple[TextToken | None, ...] | None = None
    error: FreeholdError | None = None

    @classmethod
    def failed(cls, error: FreeholdError) -> Completion:
        return cls("", "error", Usage(), error=error)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model asks for. arguments is JSON text, as in the API."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatResult:
    """One answer. finish_reason: as of a completion, or "tool_calls".

    warnings: what was mapped to something else, such as an effort that the model's template does not know.
    content_scored and reasoning_scored: only when logprobs were asked for. prompt_scored: only with prompt_logprobs.
    """

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    reasoning_tokens: int = 0
    stop_sequence: str | None = None
    content_scored: tuple[TextToken, ...] = ()
    reasoning_scored: tuple[TextToken, ...] = ()
    prompt_scored: tuple[TextToken | None, ...] | None = None
    warnings: tuple[str, ...] = ()
    error: FreeholdError | None = None

    @classmethod
    def failed(cls, error: FreeholdError) -> ChatResult:
        return cls("", "", (), "error", Usage(), error=error)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to be appended to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


class CompletionWriter:
    """Collects the events of one completion."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[TextToken] = []
        self._prompt: tuple[TextToken | None, ...] | None = None
        self._finished: TurnFinished | None = None

    def add(self, event: TextEvent) -> None:
        match event:
            case TextDelta():
                self._text.append(event.text)
                self._tokens += event.tokens
                self._prompt = event.prompt if self._prompt is None else self._prompt
            case TurnFinished():
                self._finished = event

    def result(self) -> Completion:
        end = _ended(self._finished)
        return Completion(
            "".join(self._text), end.reason, end.usage, end.stop_sequence, tuple(self._tokens), self._prompt
        )


class ChatWriter:
    """Collects the events of one chat turn. May be read before the end, for an answer that was stopped."""

    def __init__(self, warnings: tuple[str, ...] = ()) -> None:
        self._warnings = warnings
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._tokens: list[TextToken] = []
        self._reasoning_tokens: list[TextToken] = []
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        self._prompt: tuple[TextToken | None, ...] | None = None
        self._finished: TurnFinished | None = None

    def add(self, event: Event) -> None:
        match event:
            case ContentDelta():
                self._content.append(event.text)
                self._tokens += event.tokens
            case ReasoningDelta():
                self._reasoning.append(event.text)
                self._reasoning_tokens += event.tokens
            case ToolCallStart():
                self._calls.append((event, []))
            case ToolCallArguments():
                self._calls[event.index][1].append(event.fragment)
            case PromptScored():
                self._prompt = event.tokens
            case TurnFinished():
                self._finished = event

    def result(self) -> ChatResult:
        end = _ended(self._finished)
        return ChatResult(
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(ToolCall(call.id, call.name, "".join(arguments)) for call, arguments in self._calls),
            finish_reason=end.reason,
            usage=end.usage,
            reasoning_tokens=end.reasoning_tokens,
            stop_sequence=end.stop_sequence,
            content_scored=tuple(self._tokens),
            reasoning_scored=tuple(self._reasoning_tokens),
            prompt_scored=self._prompt,
            warnings=self._warnings,
        )


def _ended(finished: TurnFinished | None) -> TurnFinished:
    return TurnFinished("abort", Usage()) if finished is None else finished
