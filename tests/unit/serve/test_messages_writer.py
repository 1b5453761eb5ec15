"""From a turn's events to the Anthropic message, its stream and its errors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis.strategies import booleans

from freehold.errors import InvalidRequest, Overloaded, Unavailable
from freehold.serve.carried import pack
from freehold.serve.messages import errors
from freehold.serve.messages.writer import MessageWriter
from freehold.serve.turn import (
    ContentDelta,
    Event,
    ReasoningDelta,
    TurnFinished,
)
from tests.unit.serve.turn_events import EVERYTHING, USAGE, turns


def write(*events: Event, omit: bool = False, max_tokens: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message as JSON, and the events of its stream."""
    writer = MessageWriter(message_id="msg_1", model="m", prompt_tokens=30, max_tokens=max_tokens, omit_thinking=omit)
    stream = [*writer.start(), *(item for event in events for item in writer.feed(event))]
    return msgspec.to_builtins(writer.message), msgspec.to_builtins(stream)


def replay(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client adds up from a stream; fails on any order that the API does not have."""
    assert [event["type"] for event in stream[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in stream[-2:]] == ["message_delta", "message_stop"]
    message, delta = stream[0]["message"], stream[-2]
    is_open, inputs = False, ""
    for event in stream[2:-2]:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                is_open, inputs = True, ""
            case "content_block_delta":
                assert is_open
                kind = event["delta"].pop("type")
                block = message["content"][event["index"]]
                if kind == "input_json_delta":
                    inputs += event["delta"]["partial_json"]
                else:
                    ((key, value),) = event["delta"].items()
                    block[key] += value
            case "content_block_stop":
                is_open = False
                if inputs:
                    message["content"][-1]["input"] = msgspec.json.decode(inputs)
            case other:
                raise AssertionError(other)
    assert not is_open
    return {**message, **delta["delta"], "usage": delta["usage"]}


@pytest.mark.parametrize("omit", [False, True])
def test_the_stream_adds_up_to_the_whole_message(omit: bool) -> None:
    message, stream = write(*EVERYTHING, omit=omit)
    assert replay(stream) == message


def test_the_message_has_thinking_text_and_calls_in_order() -> None:
    message, _ = write(*EVERYTHING)
    assert message["content"] == [
        {"type": "thinking", "thinking": "think hard", "signature": "unsigned"},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Zürich"}},
        {"type": "tool_use", "id": "call_2", "name": "now", "input": {}},
    ]
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)


def test_the_prompt_is_split_into_cached_and_not() -> None:
    message, stream = write(*EVERYTHING)
    assert stream[0]["message"]["usage"]["input_tokens"] == 30
    assert message["usage"] == {
        "input_tokens": 10,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 0,
        "output_tokens": 12,
        "output_tokens_details": {"thinking_tokens": 2},
    }


def test_omitted_thinking_is_nowhere_but_in_the_signature() -> None:
    message, stream = write(*EVERYTHING, omit=True)
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": pack("think hard")}
    assert not [e for e in stream if e.get("delta", {}).get("type") == "thinking_delta"]


@pytest.mark.parametrize(
    ("finished", "max_tokens", "reason"),
    [
        (TurnFinished("stop", USAGE), 12, "end_turn"),
        (TurnFinished("tool_calls", USAGE), 12, "tool_use"),
        (TurnFinished("length", USAGE), 12, "max_tokens"),
        (TurnFinished("length", USAGE), 13, "model_context_window_exceeded"),
        (TurnFinished("stop", USAGE, stop_sequence="END"), 12, "stop_sequence"),
    ],
)
def test_stop_reasons(finished: TurnFinished, max_tokens: int, reason: str) -> None:
    message, stream = write(ContentDelta("a"), finished, max_tokens=max_tokens)
    assert message["stop_reason"] == stream[-2]["delta"]["stop_reason"] == reason
    assert message["stop_sequence"] == finished.stop_sequence


def test_an_empty_answer_has_no_blocks() -> None:
    message, stream = write(ReasoningDelta(""), ContentDelta(""), TurnFinished("stop", USAGE))
    assert message["content"] == []
    assert replay(stream) == message


def test_an_aborted_turn_is_an_error_and_not_a_stop_reason() -> None:
    with pytest.raises(Unavailable):
        write(ContentDelta("a"), TurnFinished("abort", USAGE))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("bad", param="x"), "invalid_request_error"),
        (Overloaded("full"), "rate_limit_error"),
        (Unavailable("draining"), "overloaded_error"),
        (RuntimeError("secret"), "api_error"),
    ],
)
def test_errors_have_anthropics_shape(error: Exception, kind: str) -> None:
    body = msgspec.to_builtins(errors.error_body(error))
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert "secret" not in body["error"]["message"]
    frame = errors.error_frame(error)
    assert frame.startswith(b"event: error\ndata: {")
    assert msgspec.json.decode(frame.split(b"data: ")[1]) == body


@given(turns(), booleans())
def test_any_turn_streams_to_the_message_that_it_is(events: list[Event], omit: bool) -> None:
    message, stream = write(*events, omit=omit)
    assert replay(stream) == message
    said = [event.text for event in events if isinstance(event, ContentDelta)]
    assert "".join(block["text"] for block in message["content"] if block["type"] == "text") == "".join(said)
