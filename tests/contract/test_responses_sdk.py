"""The openai SDK against the server's Responses API: text, streams, reasoning, tools, schemas, logprobs, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import (
    FunctionToolParam,
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseReasoningItem,
)

from tests.contract.conftest import LiveServer

MODEL = "sim"

WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather now",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "place": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["北京", "Zürich"]},
                    "at": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["city", "at"],
            },
            "unit": {"enum": ["°C"]},
        },
        "required": ["place", "unit"],
    },
}
CLOCK: FunctionToolParam = {"type": "function", "name": "read_clock", "parameters": None, "strict": None}
ENDLESS = "go on [[sim words=9000]] [[sim slow seconds=0.002]]"


def create(client: openai.OpenAI, said: Any = "hello there", **fields: Any) -> Response:
    return client.responses.create(**{"model": MODEL, "input": said, **fields})


def stream(client: openai.OpenAI, said: Any = "hello there", **fields: Any) -> tuple[Response, list[Any]]:
    """The response in the last event, and all events."""
    with client.responses.stream(**{"model": MODEL, "input": said, **fields}) as events:
        seen = list(events)
    return seen[-1].response, seen


def calls_of(response: Response) -> list[ResponseFunctionToolCall]:
    return [item for item in response.output if item.type == "function_call"]


def plain(response: Response) -> Any:
    """What two equal requests have in common: all but ids, times and what the prefix cache gave."""
    found = response.to_dict()
    for key in ("id", "created_at", "completed_at"):
        found.pop(key)
    usage: Any = found["usage"]
    usage.pop("input_tokens_details")
    output: Any = found["output"]
    for item in output:
        for key in ("id", "call_id", "parsed_arguments"):
            item.pop(key, None)
        for part in item.get("content", ()):
            part.pop("parsed", None)
    return found


# ---- text and reasoning ------------------------------------------------------------------------------------


def test_reasoning_comes_before_the_message(client: openai.OpenAI) -> None:
    response = create(client)
    reasoning, message = response.output
    assert isinstance(reasoning, ResponseReasoningItem)
    assert isinstance(message, ResponseOutputMessage)
    assert reasoning.content
    assert reasoning.content[0].text
    assert response.output_text == "You said: hello there"
    assert (response.status, response.model, response.error) == ("completed", MODEL, None)
    assert response.usage is not None
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_stream_adds_up_to_the_same_response(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK], "instructions": "be brief"}
    response, events = stream(client, "weather and clock, both", **fields)
    assert plain(response) == plain(create(client, "weather and clock, both", **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [item.type for item in response.output] == ["reasoning", "function_call", "function_call"]


def test_the_events_of_a_short_answer(client: openai.OpenAI) -> None:
    _, events = stream(client, "hi", reasoning={"effort": "none"}, max_output_tokens=50)
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert deltas >= 1


def test_the_wire_has_named_events_and_no_done_marker(client: openai.OpenAI) -> None:
    raw = client.post("/responses", cast_to=str, body={"model": MODEL, "input": "hi", "stream": True})
    frames = [frame.split("\n") for frame in raw.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in frames]
    assert names == [json.loads(data.removeprefix("data: "))["type"] for _, data in frames]
    assert names[-1] == "response.completed"


def test_effort_reaches_the_prompt(client: openai.OpenAI) -> None:
    texts = []
    for effort in ("high", "max"):
        item = create(client, reasoning={"effort": effort}).output[0]
        assert isinstance(item, ResponseReasoningItem)
        assert item.content
        texts.append(item.content[0].text)
    assert "Effort is High" in texts[0]
    assert "Effort is Max" in texts[1]
    assert [item.type for item in create(client, reasoning={"effort": "none"}).output] == ["message"]


def test_settings_in_force_are_echoed(client: openai.OpenAI) -> None:
    response = create(
        client, metadata={"a": "b"}, temperature=0.5, top_p=0.9, max_output_tokens=400, instructions="i", tools=[CLOCK]
    )
    assert (response.metadata, response.temperature, response.top_p) == ({"a": "b"}, 0.5, 0.9)
    assert (response.max_output_tokens, response.instructions, response.truncation) == (400, "i", "disabled")
    assert response.tools[0].type == "function"
    assert response.to_dict()["store"] is False


# ---- tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_nested_and_unicode_arguments(client: openai.OpenAI, streamed: bool) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK]}
    response = stream(client, "weather", **fields)[0] if streamed else create(client, "weather", **fields)
    (call,) = calls_of(response)
    arguments = json.loads(call.arguments)
    assert call.name == "get_weather"
    assert arguments["unit"] == "°C"
    assert arguments["place"]["city"] in ("北京", "Zürich")
    assert isinstance(arguments["place"]["at"], list)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_without_arguments_has_an_empty_object(client: openai.OpenAI, streamed: bool) -> None:
    fields: dict[str, Any] = {"tools": [CLOCK]}
    response = stream(client, "clock", **fields)[0] if streamed else create(client, "clock", **fields)
    assert [(call.name, call.arguments) for call in calls_of(response)] == [("read_clock", "{}")]


@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [
        ("auto", True, ["get_weather", "read_clock"]),
        ("auto", False, ["get_weather"]),
        ("required", True, ["get_weather", "read_clock"]),
        ({"type": "function", "name": "read_clock"}, False, ["read_clock"]),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "read_clock"}]},
            False,
            ["read_clock"],
        ),
        ("none", True, []),
    ],
)
def test_tool_choice(client: openai.OpenAI, choice: Any, parallel: bool, names: list[str]) -> None:
    response = create(
        client,
        "weather and clock, both",
        tools=[WEATHER, CLOCK],
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    assert [call.name for call in calls_of(response)] == names


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_round_trip_with_the_output_handed_back(client: openai.OpenAI, streamed: bool) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK]}
    turns: list[Any] = [{"role": "user", "content": "weather and clock, both"}]
    first = stream(client, turns, **fields)[0] if streamed else create(client, turns, **fields)
    turns += first.output
    for call in calls_of(first):
        turns.append({"type": "function_call_output", "call_id": call.call_id, "output": f"{call.name} is fine"})
    second = create(client, turns, **fields)
    assert "get_weather is fine; read_clock is fine" in second.output_text
    turns += [*second.output, {"role": "user", "content": "thanks"}]
    assert create(client, turns, **fields).output_text == "You said: thanks"


def test_reasoning_that_only_comes_back_packed_is_the_same_prompt(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "read the clock"}]
    first = create(client, turns, tools=[CLOCK], include=["reasoning.encrypted_content"], store=False)
    reasoning, call = (item.to_dict() for item in first.output)
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "12:00"}
    packed = {key: value for key, value in reasoning.items() if key != "content"}
    shown = {key: value for key, value in reasoning.items() if key != "encrypted_content"}
    bare = {"type": "reasoning", "id": "rs_1", "summary": []}
    sizes = []
    for item in (packed, shown, bare):
        usage = create(client, [*turns, item, call, output], tools=[CLOCK], max_output_tokens=1).usage
        assert usage is not None
        sizes.append(usage.input_tokens)
    assert sizes[0] == sizes[1] > sizes[2]


# ---- structure ---------------------------------------------------------------------------------------------


class Trip(pydantic.BaseModel):
    city: str
    days: int
    tags: list[str]


@pytest.mark.parametrize("effort", ["none", "high"])
def test_parse_gives_the_schema(client: openai.OpenAI, effort: Any) -> None:
    response = client.responses.parse(model=MODEL, input="a trip", text_format=Trip, reasoning={"effort": effort})
    assert isinstance(response.output_parsed, Trip)
    again: list[Any] = [{"role": "user", "content": "a trip"}, *response.output, {"role": "user", "content": "thanks"}]
    assert create(client, again).output_text == "You said: thanks"


def test_parse_gives_tool_arguments(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Trip, name="plan_trip")["function"]
    response = client.responses.parse(
        model=MODEL,
        input="plan a trip",
        tools=[{"type": "function", "name": "plan_trip", "strict": True, "parameters": tool["parameters"]}],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = calls_of(response)
    assert Trip.model_validate_json(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    assert "done" in create(client, [{"role": "user", "content": "plan"}, *response.output, output]).output_text


def test_json_object(client: openai.OpenAI) -> None:
    assert isinstance(json.loads(create(client, text={"format": {"type": "json_object"}}).output_text), dict)


# ---- logprobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_cover_the_text(client: openai.OpenAI, streamed: bool) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response, events = stream(client, **fields) if streamed else (create(client, **fields), [])
    message = response.output[-1]
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs).decode() == part.text
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in part.logprobs)
    sent = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert len(sent) == (len(part.logprobs) if streamed else 0)


# ---- ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_max_output_tokens_makes_it_incomplete(client: openai.OpenAI, streamed: bool) -> None:
    response = stream(client, max_output_tokens=3)[0] if streamed else create(client, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 3
    assert response.output[0].status == "incomplete"


def test_a_repeated_prompt_is_read_from_the_cache(client: openai.OpenAI) -> None:
    text = "once upon a time " * 60
    first, second = create(client, text).usage, create(client, text).usage
    assert first is not None
    assert second is not None
    assert 0 < second.input_tokens_details.cached_tokens < second.input_tokens == first.input_tokens


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"input": [{"role": "user", "content": "a", "x": 1}]}, "input[0].x"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "no"}}}}, "text.format"),
        ({"tools": [{**CLOCK, "name": "{x}"}]}, "tools[0].name"),
        ({"max_output_tokens": 131_072}, "max_output_tokens"),
    ],
)
def test_a_bad_request_names_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **fields)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert param in caught.value.message
    assert caught.value.request_id


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        create(client, model="gpt-nowhere")


def test_what_is_not_stored_cannot_be_fetched(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(create(client).id)


def test_what_was_not_honoured_is_in_a_header(client: openai.OpenAI) -> None:
    raw = client.responses.with_raw_response.create(model=MODEL, input="hi", store=True, reasoning={"summary": "auto"})
    assert "store" in raw.headers["x-freehold-warning"]
    assert "reasoning.summary" in raw.headers["x-freehold-warning"]
    quiet = client.responses.with_raw_response.create(model=MODEL, input="hi", reasoning={"effort": "high"})
    assert "x-freehold-warning" not in quiet.headers


def test_a_failure_before_the_first_token_is_an_http_error(client: openai.OpenAI) -> None:
    for streamed in (False, True):
        with pytest.raises(openai.InternalServerError, match="simulated failure"):
            create(client, "fail [[sim error after=0]]", stream=streamed)


def test_a_failure_in_a_stream_ends_it_as_failed(client: openai.OpenAI) -> None:
    response, events = stream(client, "fail [[sim error after=9]]")
    assert events[-1].type == "response.failed"
    assert response.status == "failed"
    assert response.error is not None
    assert "simulated failure" in response.error.message
    assert response.output[0].status == "incomplete"


def test_leaving_a_stream_stops_the_generation(server: LiveServer, client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=ENDLESS) as events:
        for event in events:
            if event.type == "response.reasoning_text.delta":
                break
        assert server.stats().running
    server.wait(server.is_idle)


def test_leaving_before_the_answer_stops_the_generation(server: LiveServer) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=0.3) as hasty,
        pytest.raises(openai.APITimeoutError),
    ):
        create(hasty, ENDLESS)
    server.wait(server.is_idle)


async def test_many_streams_at_once_leave_nothing_behind(server: LiveServer) -> None:
    async def one(number: int, client: openai.AsyncOpenAI) -> bool:
        """Whether the stream was read to its end."""
        async with client.responses.stream(model=MODEL, input=f"stream {number} [[sim words=40]]") as events:
            async for event in events:
                if number % 2 and event.type == "response.reasoning_text.delta":
                    return False
            return (await events.get_final_response()).status == "completed"

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        read = await asyncio.gather(*(one(number, client) for number in range(16)))
    assert read == [number % 2 == 0 for number in range(16)]
    await asyncio.to_thread(server.wait, server.is_idle)
