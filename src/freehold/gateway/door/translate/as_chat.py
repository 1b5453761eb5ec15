"""A message told as a chat completion: whole, and event by event. Reasoning is said in both of its spellings."""

from __future__ import annotations

import time
from typing import Any

from freehold.gateway.door.translate.words import TO_FINISH_REASON, decode, encode
from freehold.gateway.http.sse import data_of


def whole_as_chat(body: bytes) -> bytes:
    """Raises ValueError: it is no message."""
    message = decode(body)
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.get("content") or ():
        match block.get("type"):
            case "text":
                texts.append(block.get("text") or "")
            case "thinking":
                thinking.append(block.get("thinking") or "")
            case "tool_use":
                function = {"name": block.get("name"), "arguments": encode(block.get("input") or {}).decode()}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
    said: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    said["refusal"] = None
    if thinking:
        said["reasoning_content"] = said["reasoning"] = "".join(thinking)
    if calls:
        said["tool_calls"] = calls
    choice = {"index": 0, "message": said, "finish_reason": _finish(message.get("stop_reason")), "logprobs": None}
    head = _head(message, "chat.completion")
    return encode(head | {"choices": [choice], "usage": _usage(message.get("usage") or {})})


class AsChatStream:
    """include_usage: the client asked for a last chunk with the usage."""

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._out: list[bytes] = []
        self._head: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._calls = -1

    def feed(self, events: bytes) -> bytes:
        """Raises ValueError: not events of a message."""
        for event in events.split(b"\n\n"):
            if data := data_of(event):
                self._event(decode(data))
        out = b"".join(self._out)
        self._out.clear()
        return out

    def end(self) -> bytes:
        return b""  # `message_stop` said all

    def _event(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "message_start":
                message = event.get("message") or {}
                self._head = _head(message, "chat.completion.chunk")
                self._usage |= message.get("usage") or {}
                self._say({"role": "assistant", "content": ""})
            case "content_block_start":
                block = event.get("content_block") or {}
                if block.get("type") == "tool_use":
                    self._calls += 1
                    function = {"name": block.get("name"), "arguments": ""}
                    call = {"index": self._calls, "id": block.get("id"), "type": "function", "function": function}
                    self._say({"tool_calls": [call]})
            case "content_block_delta":
                self._delta(event.get("delta") or {})
            case "message_delta":
                self._usage |= {key: val for key, val in (event.get("usage") or {}).items() if val is not None}
                if reason := (event.get("delta") or {}).get("stop_reason"):
                    self._say({}, _finish(reason))
            case "message_stop":
                if self._include_usage:
                    self._chunk({"choices": [], "usage": _usage(self._usage)})
                self._out.append(b"data: [DONE]\n\n")
            case "error":
                error = event.get("error") or {}
                words = {
                    "message": error.get("message"),
                    "type": "server_error",
                    "param": None,
                    "code": error.get("type"),
                }
                self._out.append(b"data: " + encode({"error": words}) + b"\n\n")

    def _delta(self, delta: dict[str, Any]) -> None:
        match delta.get("type"):
            case "text_delta":
                self._say({"content": delta.get("text")})
            case "thinking_delta":
                self._say({"reasoning_content": delta.get("thinking"), "reasoning": delta.get("thinking")})
            case "input_json_delta":
                if delta.get("partial_json"):
                    function = {"arguments": delta["partial_json"]}
                    self._say({"tool_calls": [{"index": max(self._calls, 0), "function": function}]})

    def _say(self, delta: dict[str, Any], finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        self._chunk({"choices": [choice]})

    def _chunk(self, fields: dict[str, Any]) -> None:
        self._out.append(b"data: " + encode(self._head | fields) + b"\n\n")


def _head(message: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": message.get("id", ""), "object": kind, "created": int(time.time()), "model": message.get("model", "")}


def _finish(reason: str | None) -> str:
    return TO_FINISH_REASON.get(reason or "", "stop")


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Anthropic's input does not count what came from its cache, or went into it; OpenAI's does."""
    cached = usage.get("cache_read_input_tokens") or 0
    prompt = (usage.get("input_tokens") or 0) + cached + (usage.get("cache_creation_input_tokens") or 0)
    output = usage.get("output_tokens") or 0
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    counts["prompt_tokens_details"] = {"cached_tokens": cached}
    thinking = (usage.get("output_tokens_details") or {}).get("thinking_tokens")
    if thinking is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": thinking}
    return counts
