"""What each API says about an answer, as structs that hold only what is counted: the rest is skipped, not decoded.

A field that is null, absent or of another kind than expected never fails the answer: it goes on as it came.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct, field


class Usage(Struct):
    """OpenAI's (`prompt_`, `completion_`) and that of Responses and Messages (`input_`, `output_`) in one.

    Anthropic counts what was read from or written to its cache apart from `input_tokens`.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    prompt_cache_hit_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    @property
    def input(self) -> int | None:
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        if self.input_tokens is None:
            return None
        return self.input_tokens + (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)

    @property
    def output(self) -> int | None:
        return self.completion_tokens if self.completion_tokens is not None else self.output_tokens

    @property
    def cached(self) -> int | None:
        for details in (self.prompt_tokens_details, self.input_tokens_details):
            if details is not None and details.cached_tokens is not None:
                return details.cached_tokens
        return (
            self.cache_read_input_tokens if self.cache_read_input_tokens is not None else self.prompt_cache_hit_tokens
        )

    @property
    def reasoning(self) -> int | None:
        for details in (self.completion_tokens_details, self.output_tokens_details):
            if details is not None:
                found = details.reasoning_tokens if details.reasoning_tokens is not None else details.thinking_tokens
                if found is not None:
                    return found
        return None


class _Details(Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    thinking_tokens: int | None = None


# ---- chat and completions: whole and in chunks -------------------------------------------------------------


class Function(Struct):
    name: str | None = None
    arguments: Any = None


class ToolCall(Struct):
    index: int = 0
    function: Function | None = None


class Delta(Struct):
    """A delta of a chunk, or the message of a whole answer. Content may be a list of parts."""

    content: Any = None
    reasoning_content: str | None = None
    reasoning: Any = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(Struct):
    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Completion(Struct):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


# ---- messages: the whole, and events -----------------------------------------------------------------------


class Block(Struct):
    type: str = ""
    text: str | None = None
    thinking: str | None = None


class Message(Struct):
    content: list[Block] | None = None
    stop_reason: str | None = None
    usage: Usage | None = None
    type: str = ""
    error: Any = None


class MessageDelta(Struct):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class MessageEvent(Struct):
    type: str = ""
    index: int = 0
    message: Message | None = None
    content_block: Block | None = None
    delta: MessageDelta | None = None
    usage: Usage | None = None
    error: Any = None


# ---- responses: the whole, and events ----------------------------------------------------------------------


class Part(Struct):
    type: str = ""
    text: str | None = None
    refusal: str | None = None


class Item(Struct):
    type: str = ""
    content: list[Part] | None = None
    summary: list[Part] | None = None
    arguments: str | None = None


class Incomplete(Struct):
    reason: str | None = None


class Response(Struct):
    status: str = ""
    output: list[Item] | None = None
    incomplete_details: Incomplete | None = None
    usage: Usage | None = None
    error: Any = None


class ResponseEvent(Struct):
    type: str = ""
    output_index: int = 0
    delta: Any = None
    response: Response | None = None
    error: Any = None
    message: str | None = None


# ---- embeddings --------------------------------------------------------------------------------------------


class Embeddings(Struct):
    data: list[msgspec.Raw] = field(default_factory=list)
    usage: Usage | None = None
    error: Any = None


completion = msgspec.json.Decoder(Completion)
message = msgspec.json.Decoder(Message)
message_event = msgspec.json.Decoder(MessageEvent)
response = msgspec.json.Decoder(Response)
response_event = msgspec.json.Decoder(ResponseEvent)
embeddings = msgspec.json.Decoder(Embeddings)
