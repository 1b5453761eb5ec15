"""The answers of the faulty upstream as bytes: JSON bodies and server-sent events of each endpoint.

An answer is `Said`: how many tokens, of which the first ones are reasoning, and what else it holds. Each token is one
word. With `stamp`, a token's word is the time at which it was sent (monotonic nanoseconds), for clients on the same
machine that measure how long chunks take on their way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Said:
    """One answer. kind: how it fails as an answer though it is valid HTTP; see `upstream.CONTENT_FAULTS`."""

    id: str
    model: str
    prompt_tokens: int
    tokens: int
    reasoning: int = 0
    cached: int = 0
    reasoning_field: str = "reasoning_content"
    stamp: bool = False
    kind: str = ""
    include_usage: bool = False
    continuous: bool = False
    per_chunk: int = 1

    def word(self, index: int) -> str:
        if self.stamp:
            return f"{time.monotonic_ns()} "
        return "again and again " if self.kind == "looping" else f"w{index} "

    @property
    def usage(self) -> dict[str, Any]:
        return self.usage_at(self.tokens)

    def usage_at(self, tokens: int) -> dict[str, Any]:
        """After so many tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": min(tokens, self.reasoning)},
        }

    def words(self) -> Iterator[tuple[str, int, int]]:
        """Text, tokens in it, and tokens up to it, of each chunk; none has reasoning and content."""
        at = 0
        while at < self.tokens:
            last = self.reasoning if at < self.reasoning else self.tokens
            end = min(at + self.per_chunk, last)
            yield "".join(self.word(index) for index in range(at, end)), end - at, end
            at = end

    @property
    def finish(self) -> str:
        return {
            "thinking_cut": "length",
            "looping": "length",
            "refusal": "content_filter",
            "tool_json": "tool_calls",
        }.get(self.kind, "stop")


REASONS = {200: "OK", 307: "Temporary Redirect", 404: "Not Found", 429: "Too Many Requests", 500: "Server Error"}


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}",
        *(f"{key}: {value}" for key, value in headers.items()),
    ]
    return "\r\n".join((*lines, "", "")).encode()


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
TOOL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "gla'}}


def body(said: Said, endpoint: str) -> bytes:
    """The whole answer of a request that is not streamed."""
    if endpoint == "embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5, 0.125]}]
        usage = {"prompt_tokens": said.prompt_tokens, "total_tokens": said.prompt_tokens}
        return dumps({"object": "list", "model": said.model, "data": data, "usage": usage})
    words = [said.word(index) for index in range(said.tokens)]
    thought, text = "".join(words[: said.reasoning]), "".join(words[said.reasoning :])
    if endpoint == "messages":
        usage = {"input_tokens": said.prompt_tokens, "output_tokens": said.tokens}
        head = {"id": said.id, "type": "message", "role": "assistant", "model": said.model}
        return dumps(head | {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "usage": usage})
    if endpoint == "responses":
        return dumps(response(said, text))
    head = {"id": said.id, "created": int(time.time()), "model": said.model}
    if endpoint == "completions":
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": said.finish, "logprobs": None}
        return dumps(head | {"object": "text_completion", "choices": [choice], "usage": said.usage})
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message[said.reasoning_field] = thought
    if said.kind == "tool_json":
        message["tool_calls"] = [TOOL]
    if said.kind == "refusal":
        message["refusal"] = "no"
    choice = {"index": 0, "message": message, "finish_reason": said.finish, "logprobs": None}
    return dumps(head | {"object": "chat.completion", "choices": [choice], "usage": said.usage})


def response(said: Said, text: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": status, "content": [part]}
    usage = {
        "input_tokens": said.prompt_tokens,
        "output_tokens": said.tokens,
        "total_tokens": said.prompt_tokens + said.tokens,
        "input_tokens_details": {"cached_tokens": said.cached},
        "output_tokens_details": {"reasoning_tokens": said.reasoning},
    }
    head = {"id": said.id, "object": "response", "created_at": int(time.time()), "model": said.model}
    rest = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return head | rest | {"status": status, "output": [item], "usage": usage}


def events(said: Said, endpoint: str) -> Iterator[tuple[bytes, int]]:
    """(bytes, tokens in them) of a stream, to its end."""
    yield from {"chat": _chat, "completions": _completions, "messages": _messages, "responses": _responses}[endpoint](
        said
    )


def _chat(said: Said) -> Iterator[tuple[bytes, int]]:
    head: dict[str, Any] = {"id": said.id, "object": "chat.completion.chunk", "created": int(time.time())}
    head |= {"model": said.model, "usage": None} if said.include_usage else {"model": said.model}

    def chunk(at: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        usage = {"usage": said.usage_at(at)} if said.continuous else {}
        return event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | usage)

    yield chunk(0, {"role": "assistant", "content": ""}), 0
    for text, count, end in said.words():
        if end == said.tokens and said.kind == "tool_json":
            yield chunk(end, {"tool_calls": [TOOL]}), count
        else:
            yield chunk(end, {said.reasoning_field if end <= said.reasoning else "content": text}), count
    yield chunk(said.tokens, {"refusal": "no"} if said.kind == "refusal" else {}, said.finish), 0
    if said.include_usage:
        yield event(head | {"choices": [], "usage": said.usage}), 0
    yield DONE, 0


def _completions(said: Said) -> Iterator[tuple[bytes, int]]:
    head = {"id": said.id, "object": "text_completion", "created": int(time.time()), "model": said.model}
    for text, count, end in said.words():
        usage = {"usage": said.usage_at(end)} if said.continuous else {}
        yield event(head | {"choices": [{"index": 0, "text": text, "finish_reason": None}]} | usage), count
    yield event(head | {"choices": [{"index": 0, "text": "", "finish_reason": said.finish}]}), 0
    if said.include_usage:
        yield event(head | {"choices": [], "usage": said.usage}), 0
    yield DONE, 0


def named(kind: str, value: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\n" + event({"type": kind} | value)


def _messages(said: Said) -> Iterator[tuple[bytes, int]]:
    usage = {"input_tokens": said.prompt_tokens, "output_tokens": 0}
    message = {"id": said.id, "type": "message", "role": "assistant", "model": said.model, "content": []}
    yield named("message_start", {"message": message | {"stop_reason": None, "usage": usage}}), 0
    yield named("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}), 0
    for index in range(said.tokens):
        delta = {"type": "text_delta", "text": said.word(index)}
        yield named("content_block_delta", {"index": 0, "delta": delta}), 1
    yield named("content_block_stop", {"index": 0}), 0
    end = {"delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": said.tokens}}
    yield named("message_delta", end), 0
    yield named("message_stop", {}), 0


def _responses(said: Said) -> Iterator[tuple[bytes, int]]:
    started = response(said, "", "in_progress") | {"output": [], "usage": None}
    yield named("response.created", {"response": started, "sequence_number": 0}), 0
    words = []
    for index in range(said.tokens):
        words.append(said.word(index))
        where = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "sequence_number": index + 1}
        yield named("response.output_text.delta", where | {"delta": words[-1], "logprobs": []}), 1
    done = {"response": response(said, "".join(words)), "sequence_number": said.tokens + 1}
    yield named("response.completed", done), 0
