"""A chat turn as data: the one form that every chat-like API is turned into, and the events it gives back.

`chat.py`, `responses.py` and `messages.py` translate their wire format to a `Turn`, call
`service.ChatService`, and translate `Event`s to their own streams. Nothing here knows HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from freehold.types import SamplingParams, TokenLogprobs, Usage


@dataclass(frozen=True, slots=True)
class Turn:
    """What is asked.

    messages: OpenAI chat messages as plain dicts (role system/developer/user/assistant/tool; content a string,
        null, or a list of text parts; tool_calls with JSON-string arguments; optional reasoning_content).
    tools: OpenAI function tools, `{"type": "function", "function": {...}}`.
    tool_choice: "none", "auto", "required", or the name of the one tool to call, as `("named", name)`.
    response_format: None, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {...}}`.
    effort: the request's reasoning effort as given, or None (unset).
    template_kwargs: `chat_template_kwargs` (enable_thinking, clear_thinking, reasoning_effort, ...).
    adapter: the name of the adapter that answers; None: the model as it is.
    stop: stop strings. params: sampling; `guide` is filled in by the service.
    max_tokens_given: False when the caller left max_tokens open (then: what the context has left).
    """

    messages: tuple[Mapping[str, Any], ...]
    params: SamplingParams
    max_tokens_given: bool = True
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Literal["none", "auto", "required"] | tuple[Literal["named"], str] = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    effort: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    cache_salt: str | None = None
    adapter: str | None = None
    running_usage: bool = False  # events say what has been generated so far


@dataclass(frozen=True, slots=True)
class PreparedTurn:
    """A turn rendered and checked: ready to run one or more times."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    turn: Turn
    thinking: bool  # generation starts inside <think>
    warnings: tuple[str, ...] = ()  # what was mapped or not honoured; for the warning header


@dataclass(frozen=True, slots=True)
class TextToken:
    """One generated token with its text, for logprobs: bytes_ are the token's exact bytes."""

    text: str
    bytes_: bytes
    logprobs: TokenLogprobs
    top_text: tuple[tuple[str, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The first event, and only when prompt_logprobs were asked for: every prompt token, None for the first, which
    nothing predicts."""

    tokens: tuple[TextToken | None, ...]


@dataclass(frozen=True, slots=True)
class SoFar:
    """What had been generated of a choice with an event. reasoning_tokens is a part of usage.completion_tokens."""

    usage: Usage
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """so_far, here and in other events: only with `Turn.running_usage`, of the last event of an engine's chunk."""

    text: str
    tokens: tuple[TextToken, ...] = ()  # only when logprobs were asked for
    so_far: SoFar | None = None


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str
    tokens: tuple[TextToken, ...] = ()
    so_far: SoFar | None = None


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call's name is known (emitted whole, never in parts). index counts from 0."""

    index: int
    id: str
    name: str
    so_far: SoFar | None = None


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A fragment of the call's arguments; the fragments of one index concatenate to one JSON object."""

    index: int
    fragment: str
    so_far: SoFar | None = None


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """Always the last event. reasoning_tokens is a part of usage.completion_tokens."""

    reason: Literal["stop", "length", "tool_calls", "abort"]
    usage: Usage
    reasoning_tokens: int = 0
    stop_sequence: str | None = None  # the stop string that matched, if one did


Event = PromptScored | ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | TurnFinished
