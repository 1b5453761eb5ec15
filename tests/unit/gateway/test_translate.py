"""Chat and Messages said in one another: requests field by field, answers whole and streamed, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from freehold.errors import InvalidRequest, UnsupportedField
from freehold.gateway.door.translate.as_chat import AsChatStream, whole_as_chat
from freehold.gateway.door.translate.as_message import AsMessageStream, whole_as_message
from freehold.gateway.door.translate.to_chat import request_to_chat
from freehold.gateway.door.translate.to_messages import request_to_messages
from freehold.gateway.door.wire import wire_for

CALL = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "so", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "and?"},
    ],
    "max_tokens": 9,
    "stop": "END",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
MESSAGE: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "system": "Be brief.",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "42"},
                {"type": "text", "text": "and?"},
            ],
        },
    ],
    "stop_sequences": ["END"],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
}


def test_a_limit_of_nothing_is_not_taken_for_no_limit() -> None:
    message = {"model": "m", "max_tokens": 0, "messages": [{"role": "user", "content": "hi"}]}
    assert request_to_chat(message, "m", None, None, "vllm")["max_tokens"] == 0


def test_a_chat_becomes_messages_and_comes_back() -> None:
    assert request_to_messages(CHAT, "m", 100, None) == MESSAGE
    back = request_to_chat(MESSAGE, "m", None, "", "vllm")
    flat = CHAT | {"stop": ["END"], "messages": [*CHAT["messages"]]}
    flat["messages"][1] = {"role": "user", "content": "hi"}
    assert back == flat


def test_limits_efforts_and_formats() -> None:
    plain = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert request_to_messages(plain, "m", 100, None)["max_tokens"] == 100
    assert request_to_messages(plain | {"reasoning_effort": "high"}, "m", 1, None)["output_config"] == {
        "effort": "high"
    }
    assert request_to_messages(plain | {"reasoning_effort": "high"}, "m", 1, "none")["thinking"] == {"type": "disabled"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    blocks = request_to_messages({"messages": [{"role": "user", "content": [image]}]}, "m", 1, None)["messages"][0][
        "content"
    ]
    assert blocks == [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}]
    message = plain | {"max_tokens": 5}
    assert request_to_chat(message, "m", None, None, "vllm")["reasoning_effort"] == "none", (
        "Messages is silent: no thinking"
    )
    assert "reasoning_effort" not in request_to_chat(message, "m", None, None, "api")
    assert request_to_chat(message, "m", None, None, "api")["max_completion_tokens"] == 5
    thinking = message | {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}
    assert request_to_chat(thinking, "m", None, None, "vllm")["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_bias", {"1": 2}), ("n", 2), ("logprobs", True), ("new_field", 1), ("temperature", 1.5), ("tools", [{}])],
)
def test_a_chat_that_cannot_be_said_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedField, match=field):
        request_to_messages(CHAT | {field: value}, "m", 1, None)


def test_fields_that_change_nothing_are_no_obstacle() -> None:
    request_to_messages(CHAT | {"n": 1, "logprobs": False, "store": True, "presence_penalty": 0.0}, "m", 1, None)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        7,
        ["x"],
        [{"role": "robot", "content": ""}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "assistant", "tool_calls": [{"id": "t", "function": {"name": "f", "arguments": "[1]"}}]}],
    ],
)
def test_wrong_messages_are_wrong_requests(messages: Any) -> None:
    with pytest.raises(InvalidRequest):
        request_to_messages({"messages": messages}, "m", 1, None)


@pytest.mark.parametrize("block", [{"type": "document"}, {"type": "server_tool_use"}, {"type": "text"}, {}])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_blocks_without_a_counterpart_are_refused(block: dict[str, Any], role: str) -> None:
    with pytest.raises(InvalidRequest):
        request_to_chat({"messages": [{"role": role, "content": [block]}], "max_tokens": 1}, "m", None, None, "vllm")


def test_a_stream_of_chunks_becomes_blocks_that_do_not_overlap() -> None:
    deltas: list[Any] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm", "reasoning": "hm"},
        {"content": "yes"},
        {"tool_calls": [{"index": 0, "id": "t1", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {"tool_calls": [{"index": 1, "id": "t2", "function": {"name": "g", "arguments": "{}"}}]},
    ]
    chunks = [{"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    chunks.append(
        {
            "choices": [],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}},
        }
    )
    stream = AsMessageStream()
    out = b"".join(stream.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n") for chunk in chunks)
    out += stream.feed(b"data: [DONE]\n\n") + stream.end()
    events = [json.loads(line[6:]) for line in out.decode().splitlines() if line.startswith("data: ")]
    kinds = [event["type"].removeprefix("content_block_") for event in events]
    assert kinds == ["message_start", *["start", "delta", "stop"] * 4, "message_delta", "message_stop"]
    assert [event["content_block"]["type"] for event in events if "content_block" in event] == (
        ["thinking", "text", "tool_use", "tool_use"]
    )
    end = events[-2]
    assert end["delta"]["stop_reason"] == "tool_use"
    assert (end["usage"]["input_tokens"], end["usage"]["cache_read_input_tokens"], end["usage"]["output_tokens"]) == (
        7,
        2,
        4,
    )


def test_errors_within_a_stream_are_said_in_the_clients_words() -> None:
    error = b'data: {"error":{"message":"no blocks","type":"server_error"}}\n\n'
    assert AsMessageStream().feed(error) == (
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"no blocks"}}\n\n'
    )
    event = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n'
    assert json.loads(AsChatStream(include_usage=False).feed(event)[6:])["error"]["message"] == "busy"


def test_whole_answers_keep_their_meaning_both_ways() -> None:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 1, "output_tokens": 5}
    content = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "yes"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
    ]
    message = {"id": "i", "type": "message", "role": "assistant", "model": "m", "content": content}
    told = json.loads(whole_as_chat(json.dumps(message | {"stop_reason": "tool_use", "usage": usage}).encode()))
    said = told["choices"][0]["message"]
    assert (said["content"], said["reasoning_content"], said["reasoning"]) == ("yes", "hm", "hm")
    assert said["tool_calls"] == [CALL]
    assert (told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]) == (8, 5)
    back = json.loads(whole_as_message(json.dumps(told).encode()))
    assert back["content"] == content
    assert back["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "body", [b'{"choices":[{"message":{"tool_calls":[7]}}]}', b'{"choices":[7]}', b'{"content":[7]}']
)
@pytest.mark.parametrize(("endpoint", "speaks"), [("chat", "messages"), ("messages", "chat")])
def test_what_makes_no_sense_is_a_value_error(body: bytes, endpoint: Any, speaks: Any) -> None:
    wire = wire_for(endpoint, (speaks,))
    assert wire is not None
    if (b"content" in body) == (speaks == "messages"):
        with pytest.raises(ValueError):  # noqa: PT011  the relay acts on the class
            wire.whole(body)


def test_other_endpoints_are_not_translated() -> None:
    assert wire_for("responses", ("chat", "messages")) is None
    assert wire_for("embeddings", ("chat",)) is None
