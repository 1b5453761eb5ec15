"""From a turn's events to the OpenAI response and its stream."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis.strategies import booleans
from openai.types import responses as sdk_types
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from freehold.errors import EngineError, Unavailable
from freehold.serve.responses.reply import ReasoningSettings, ResponseBody
from freehold.serve.responses.writer import ResponseWriter
from freehold.serve.turn import (
    ContentDelta,
    Event,
    ReasoningDelta,
    TextToken,
    TurnFinished,
)
from freehold.types import TokenLogprobs
from tests.unit.serve.turn_events import EVERYTHING, USAGE, turns

STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def writer(*, logprobs: bool = False, pack_reasoning: bool = False) -> ResponseWriter:
    begun = ResponseBody(
        id="resp_1",
        created_at=1,
        model="m",
        instructions=None,
        max_output_tokens=None,
        metadata={},
        parallel_tool_calls=True,
        reasoning=ReasoningSettings(None),
        temperature=1.0,
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=1.0,
    )
    ids = itertools.count()
    return ResponseWriter(
        begun, new_id=lambda prefix: f"{prefix}_{next(ids)}", logprobs=logprobs, pack_reasoning=pack_reasoning
    )


def write(*events: Event, **options: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The response as JSON, and the events of its stream."""
    made = writer(**options)
    stream = [*made.start(), *(item for event in events for item in made.feed(event))]
    return msgspec.to_builtins(made.response), msgspec.to_builtins(stream)


def replay(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that a client adds up from deltas; fails on any order that the API does not have."""
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [event["type"] for event in stream[:2]] == ["response.created", "response.in_progress"]
    output: list[dict[str, Any]] = []
    is_open = False
    text = ""
    for event in stream[2:-1]:
        STREAM_EVENT.validate_python(event)
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open
            assert event["output_index"] == len(output)
            output.append(event["item"])
            is_open, text = True, ""
            continue
        item = output[-1]
        assert event["output_index"] == len(output) - 1
        assert is_open
        if kind == "output_item.done":
            assert {**item, "status": event["item"]["status"]} == {
                key: value for key, value in event["item"].items() if key != "encrypted_content"
            }
            output[-1], is_open = event["item"], False
            continue
        assert event["item_id"] == item["id"]
        match kind:
            case "content_part.added":
                item["content"].append(event["part"])
            case "content_part.done":
                assert item["content"][-1] == event["part"]
            case "output_text.delta" | "reasoning_text.delta":
                item["content"][-1]["text"] += event["delta"]
                item["content"][-1].get("logprobs", []).extend(event.get("logprobs", []))
            case "output_text.done" | "reasoning_text.done":
                assert item["content"][-1]["text"] == event["text"]
            case "function_call_arguments.delta":
                text += event["delta"]
            case "function_call_arguments.done":
                assert (text, item["name"]) == (event["arguments"], event["name"])
                item["arguments"] = text
            case other:
                raise AssertionError(other)
    assert not is_open
    assert stream[-1]["response"]["output"] == output
    return stream[-1]["response"]


@pytest.mark.parametrize("pack_reasoning", [False, True])
def test_the_stream_adds_up_to_the_whole_response(pack_reasoning: bool) -> None:
    response, stream = write(*EVERYTHING, pack_reasoning=pack_reasoning)
    assert stream[-1]["type"] == "response.completed"
    assert replay(stream) == response
    assert ("encrypted_content" in response["output"][0]) is pack_reasoning


def test_the_output_has_reasoning_message_and_calls_in_order() -> None:
    response, _ = write(*EVERYTHING)
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert response["output"] == [
        {
            "type": "reasoning",
            "id": "rs_0",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "think hard"}],
        },
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]},
        {
            "type": "function_call",
            "id": "fc_2",
            "call_id": "call_1",
            "name": "weather",
            "arguments": '{"city":"Zürich"}',
            "status": "completed",
        },
        {
            "type": "function_call",
            "id": "fc_3",
            "call_id": "call_2",
            "name": "now",
            "arguments": "{}",
            "status": "completed",
        },
    ]
    assert response["usage"] == {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 42,
    }
    sdk_types.Response.model_validate(response)


def test_a_cut_answer_is_incomplete() -> None:
    response, stream = write(ReasoningDelta("hm"), ContentDelta("a"), TurnFinished("length", USAGE))
    assert stream[-1]["type"] == "response.incomplete"
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert replay(stream) == response


@pytest.mark.parametrize(
    ("error", "message"),
    [(EngineError("the engine broke"), "the engine broke"), (RuntimeError("secret"), "internal error")],
)
def test_a_failure_keeps_what_was_written(error: Exception, message: str) -> None:
    made = writer()
    stream = msgspec.to_builtins([*made.start(), *made.feed(ContentDelta("half")), *made.fail(error)])
    response = replay(stream)
    assert stream[-1]["type"] == "response.failed"
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert response["error"]["message"].startswith(message)
    assert response["output"][0]["content"][0]["text"] == "half"
    assert response["output"][0]["status"] == "incomplete"


def test_an_aborted_turn_is_an_error() -> None:
    with pytest.raises(Unavailable):
        write(ContentDelta("a"), TurnFinished("abort", USAGE))


def test_an_empty_answer_has_no_items() -> None:
    response, stream = write(TurnFinished("stop", USAGE))
    assert response["output"] == []
    assert replay(stream) == response


def token(text: str) -> TextToken:
    raw = text.encode()
    return TextToken(text, raw, TokenLogprobs(1, -0.5, 1), ((text, raw, -0.5), ("é", b"\xc3\xa9", float("-inf"))))


def test_logprobs_go_with_output_text_only() -> None:
    events = (
        ReasoningDelta("hm", (token("hm"),)),
        ContentDelta("a", (token("a"),)),
        ContentDelta("b", (token("b"),)),
        TurnFinished("stop", USAGE),
    )
    response, stream = write(*events, logprobs=True)
    (part,) = response["output"][1]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b"]
    assert part["logprobs"][0]["top_logprobs"][1] == {"token": "é", "logprob": -9999.0, "bytes": [195, 169]}
    assert replay(stream) == response
    assert write(*events)[0]["output"][1]["content"][0]["logprobs"] == []


@settings(max_examples=40, deadline=None)  # the SDK's model of events is slow
@given(turns(), booleans())
def test_any_turn_streams_to_the_response_that_it_is(events: list[Event], pack_reasoning: bool) -> None:
    response, stream = write(*events, pack_reasoning=pack_reasoning)
    assert replay(stream) == response
