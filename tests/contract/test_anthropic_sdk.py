"""The anthropic SDK against the server: Messages, streams, tools, thinking, schemas, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pydantic
import pytest
from anthropic.types import Message, MessageParam, ToolParam

from freehold.engine.sim import SimConfig
from tests.contract.conftest import LiveServer

MODEL = "sim"
Start = Callable[..., LiveServer]

WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "Weather now",
    "input_schema": {
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
ENDLESS = "go on [[sim words=9000]] [[sim slow seconds=0.002]]"
CLOCK: ToolParam = {"name": "read_clock", "input_schema": {"type": "object", "properties": {}}}


def connect(server: LiveServer, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(**{"base_url": server.url, "api_key": "none", "max_retries": 0, **options})


@pytest.fixture
def client(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with connect(server) as made:
        yield made


def say(text: str) -> list[MessageParam]:
    return [{"role": "user", "content": text}]


def create(client: anthropic.Anthropic, text: str = "hello there", **fields: Any) -> Message:
    return client.messages.create(**{"model": MODEL, "max_tokens": 1000, "messages": say(text), **fields})


def stream(client: anthropic.Anthropic, text: str = "hello there", **fields: Any) -> tuple[Message, list[str]]:
    """The message that the SDK adds up, and the types of the raw events."""
    given = {"model": MODEL, "max_tokens": 1000, "messages": say(text), **fields}
    with client.messages.stream(**given) as events:
        kinds = [event.type for event in events]
        return events.get_final_message(), kinds


def same(one: Message, other: Message) -> bool:
    """Equal but for ids, and for what the first of two equal requests left in the prefix cache."""

    def plain(message: Message) -> Any:
        content = [block.to_dict() for block in message.content]
        for block in content:
            block.pop("id", None)
            block.pop("citations", None)
            block.pop("parsed_output", None)
        return content, message.stop_reason, message.stop_sequence, message.usage.output_tokens

    return bool(plain(one) == plain(other))


# ---- text and thinking -------------------------------------------------------------------------------------


def test_text_comes_first_when_thinking_was_not_asked_for(client: anthropic.Anthropic) -> None:
    message = create(client)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == "You said: hello there"
    assert (message.role, message.model, message.stop_reason) == ("assistant", MODEL, "end_turn")
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0


def test_a_stream_adds_up_to_the_same_message(client: anthropic.Anthropic) -> None:
    fields = {"thinking": {"type": "adaptive"}, "tools": [WEATHER, CLOCK]}
    message, kinds = stream(client, "weather and clock, both", **fields)
    assert same(message, create(client, "weather and clock, both", **fields))
    assert [block.type for block in message.content] == ["thinking", "tool_use", "tool_use"]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]


def test_the_wire_has_named_events_with_their_type_inside(client: anthropic.Anthropic) -> None:
    body = {"model": MODEL, "max_tokens": 50, "messages": say("hi"), "stream": True}
    raw = client.post("/v1/messages", cast_to=str, body=body)
    frames = [frame.split("\n") for frame in raw.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in frames]
    assert names == [json.loads(data.removeprefix("data: "))["type"] for _, data in frames]
    assert names[:3] == ["message_start", "ping", "content_block_start"]


def test_thinking_is_a_block_before_the_text(client: anthropic.Anthropic) -> None:
    message = create(client, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    thinking, text = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking
    assert thinking.signature
    assert text.type == "text"
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens > 0


def test_effort_reaches_the_prompt(client: anthropic.Anthropic) -> None:
    high, low = (create(client, output_config={"effort": effort}).content[0] for effort in ("high", "max"))
    assert high.type == low.type == "thinking"
    assert "Effort is High" in high.thinking
    assert "Effort is Max" in low.thinking


def test_omitted_thinking_survives_a_tool_round(client: anthropic.Anthropic, server: LiveServer) -> None:
    fields: dict[str, Any] = {"thinking": {"type": "adaptive", "display": "omitted"}, "tools": [CLOCK]}
    first, kinds = stream(client, "read the clock", **fields)
    thinking, call = first.content
    assert thinking.type == "thinking"
    assert thinking.thinking == ""
    assert "thinking" not in kinds
    assert call.type == "tool_use"
    shown = create(client, "read the clock", **{**fields, "thinking": {"type": "adaptive"}})
    result: MessageParam = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "12:00"}],
    }
    counts = {
        client.messages.count_tokens(
            model=MODEL,
            thinking={"type": "adaptive"},
            tools=[CLOCK],
            messages=[*say("read the clock"), {"role": "assistant", "content": [block, call]}, result],
        ).input_tokens
        for block in (thinking, shown.content[0])
    }
    assert len(counts) == 1  # the prompt is the same, whether the text or only the signature came back


def test_a_model_that_always_thinks_says_so(start: Start) -> None:
    with connect(start(profile="glm-5.3")) as client:
        raw = client.messages.with_raw_response.create(model=MODEL, max_tokens=1000, messages=say("hi"))
    assert [block.type for block in raw.parse().content] == ["thinking", "text"]
    assert "thinking disabled is not honoured" in raw.headers["x-freehold-warning"]


def test_tokens_that_come_several_at_a_time_make_the_same_message(start: Start, client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"thinking": {"type": "adaptive"}, "tools": [WEATHER, CLOCK]}
    with connect(start(SimConfig(num_draft_tokens=5))) as drafting:
        message, _ = stream(drafting, "weather and clock, both", **fields)
    assert same(message, create(client, "weather and clock, both", **fields))


# ---- tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_nested_and_unicode_arguments(client: anthropic.Anthropic, streamed: bool) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK]}
    message = stream(client, "weather", **fields)[0] if streamed else create(client, "weather", **fields)
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.name == "get_weather"
    assert call.input["unit"] == "°C"
    place: Any = call.input["place"]
    assert place["city"] in ("北京", "Zürich")
    assert isinstance(place["at"], list)
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_without_arguments_has_an_empty_object(client: anthropic.Anthropic, streamed: bool) -> None:
    fields: dict[str, Any] = {"tools": [CLOCK]}
    message = stream(client, "clock", **fields)[0] if streamed else create(client, "clock", **fields)
    assert [(block.name, block.input) for block in message.content if block.type == "tool_use"] == [("read_clock", {})]


@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        ({"type": "auto"}, ["get_weather", "read_clock"], "tool_use"),
        ({"type": "auto", "disable_parallel_tool_use": True}, ["get_weather"], "tool_use"),
        ({"type": "any"}, ["get_weather", "read_clock"], "tool_use"),
        ({"type": "tool", "name": "read_clock", "disable_parallel_tool_use": True}, ["read_clock"], "tool_use"),
        ({"type": "none"}, [], "end_turn"),
    ],
)
def test_tool_choice(client: anthropic.Anthropic, choice: Any, names: list[str], reason: str) -> None:
    message = create(client, "weather and clock, both", tools=[WEATHER, CLOCK], tool_choice=choice)
    assert [block.name for block in message.content if block.type == "tool_use"] == names
    assert message.stop_reason == reason


def test_a_tool_is_called_even_if_nobody_asked_for_it(client: anthropic.Anthropic) -> None:
    message = create(client, "hello", tools=[WEATHER, CLOCK], tool_choice={"type": "any"})
    assert message.stop_reason == "tool_use"


def test_a_tool_round_trip(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK], "thinking": {"type": "adaptive"}}
    first = create(client, "weather and clock, both", **fields)
    calls = [block for block in first.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": f"{call.name} is fine"}]}
        for call in calls
    ]
    turns = [*say("weather and clock, both"), first.to_param(), {"role": "user", "content": results}]
    second = create(client, messages=turns, **fields)
    assert second.content[-1].type == "text"
    assert "get_weather is fine; read_clock is fine" in second.content[-1].text
    assert second.stop_reason == "end_turn"


def test_the_sdks_own_tool_runner_loops_until_it_has_an_answer(client: anthropic.Anthropic) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def read_clock() -> str:
        """The time."""
        asked.append("clock")
        return "12:00"

    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=1000, tools=[read_clock], messages=[{"role": "user", "content": "read the clock"}]
    )
    final = runner.until_done()
    assert asked == ["clock"]
    assert final.content[-1].type == "text"
    assert "12:00" in final.content[-1].text


# ---- structure ---------------------------------------------------------------------------------------------


class Trip(pydantic.BaseModel):
    city: str
    days: int
    tags: list[str]


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "adaptive"}])
def test_parse_gives_the_schema(client: anthropic.Anthropic, thinking: Any) -> None:
    message = client.messages.parse(
        model=MODEL, max_tokens=1000, messages=say("a trip"), output_format=Trip, thinking=thinking
    )
    assert isinstance(message.parsed_output, Trip)
    again: list[MessageParam] = [*say("a trip"), {"role": "assistant", "content": message.content}, *say("thanks")]
    assert create(client, messages=again).content[0].type == "text"


# ---- ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_max_tokens(client: anthropic.Anthropic, streamed: bool) -> None:
    message = stream(client, max_tokens=3)[0] if streamed else create(client, max_tokens=3)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_sequences(client: anthropic.Anthropic, streamed: bool) -> None:
    fields: dict[str, Any] = {"stop_sequences": ["nowhere", " the"]}
    message = stream(client, **fields)[0] if streamed else create(client, **fields)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " the")
    assert message.content[0].type == "text"
    assert message.content[0].text == "You said: hello"


def test_running_out_of_context_has_its_own_stop_reason(start: Start) -> None:
    with connect(start(max_model_len=128)) as client:
        message = create(client, "go on [[sim words=500]]", max_tokens=8_000)
        assert message.stop_reason == "model_context_window_exceeded"
        assert message.usage.input_tokens + message.usage.output_tokens == 128
        with pytest.raises(anthropic.BadRequestError, match="128"):
            create(client, "word " * 500)
        counted = client.messages.count_tokens(model=MODEL, messages=say("word " * 500))
        assert counted.input_tokens > 128


# ---- counting ----------------------------------------------------------------------------------------------


def test_the_count_is_what_the_message_says(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"system": "be brief", "tools": [WEATHER], "thinking": {"type": "adaptive"}}
    counted = client.messages.count_tokens(model=MODEL, messages=say("hello"), **fields)
    usage = create(client, "hello", **fields).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_repeated_prompt_is_read_from_the_cache(client: anthropic.Anthropic) -> None:
    text = "once upon a time " * 60
    first, second = create(client, text, max_tokens=4).usage, stream(client, text, max_tokens=4)[0].usage
    assert second.cache_read_input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == first.input_tokens
    assert second.input_tokens > 0


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": 3}}, "temperature"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
        ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, "tools[0].type"),
        ({"container": "c"}, "container"),
        ({"tools": [{**CLOCK, "name": "{x}"}]}, "tools[0].name"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}, "output_config.format"),
    ],
)
def test_a_bad_request_names_the_field(client: anthropic.Anthropic, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(client, **fields)
    error = caught.value
    assert error.type == "invalid_request_error"
    assert isinstance(error.body, dict)
    assert error.body["type"] == "error"
    assert error.body["error"]["details"]["param"] == param
    assert param in error.body["error"]["message"]
    assert error.request_id


def test_an_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        create(client, model="claude-nowhere")
    assert caught.value.type == "not_found_error"
    assert create(client, model="alias").model == "alias"


def test_what_is_not_json_or_not_a_post_has_the_same_shape(client: anthropic.Anthropic) -> None:
    json_type = {"headers": {"content-type": "application/json"}}
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.post("/v1/messages", cast_to=object, content=b"{", options=json_type)
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(anthropic.APIStatusError) as refused:
        client.get("/v1/messages", cast_to=object)
    assert refused.value.status_code == 405
    assert refused.value.type == "invalid_request_error"


def test_keys_are_asked_for_in_this_apis_header(start: Start) -> None:
    guarded = start(api_keys=("right",))
    with connect(guarded, api_key="right") as client:
        assert create(client).content
    with connect(guarded, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError) as caught:
        create(client)
    assert caught.value.type == "authentication_error"


def test_a_full_queue_is_a_429_with_a_time_to_wait(start: Start) -> None:
    with (
        connect(start(max_num_seqs=1, max_queue=0)) as client,
        client.messages.stream(model=MODEL, max_tokens=8_000, messages=say(ENDLESS)) as running,
    ):
        next(iter(running))
        with pytest.raises(anthropic.RateLimitError) as caught:
            create(client)
        assert caught.value.type == "rate_limit_error"
        assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_failure_before_the_first_token_is_an_http_error(client: anthropic.Anthropic) -> None:
    for streamed in (False, True):
        with pytest.raises(anthropic.InternalServerError) as caught:
            create(client, "fail [[sim error after=0]]", stream=streamed)
        assert caught.value.type == "api_error"


def test_a_failure_in_a_stream_is_an_error_event(client: anthropic.Anthropic) -> None:
    texts: list[str] = []
    with (
        client.messages.stream(model=MODEL, max_tokens=100, messages=say("fail [[sim error after=4]]")) as events,
        pytest.raises(anthropic.APIStatusError, match="simulated failure") as caught,
    ):
        texts.extend(events.text_stream)
    assert texts
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "api_error"


def test_a_silent_stream_is_kept_alive_with_pings(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freehold.serve.stream.KEEP_ALIVE_SECONDS", 0.05)
    silent = "wait [[sim stall seconds=0.4]]"
    body = {"model": MODEL, "max_tokens": 50, "messages": say(silent), "stream": True}
    with connect(server) as client:
        raw = client.post("/v1/messages", cast_to=str, body=body)
        assert raw.startswith('event: ping\ndata: {"type":"ping"}\n\n')
        assert stream(client, silent)[0].content


def test_leaving_a_stream_stops_the_generation(server: LiveServer, client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=8_000, messages=say(ENDLESS)) as events:
        for event in events:
            if event.type == "text":
                break
        assert server.stats().running
    server.wait(server.is_idle)


def test_leaving_before_the_answer_stops_the_generation(server: LiveServer) -> None:
    with connect(server, timeout=0.3) as hasty, pytest.raises(anthropic.APITimeoutError):
        create(hasty, ENDLESS, max_tokens=8_000)
    server.wait(server.is_idle)


async def test_many_streams_at_once_leave_nothing_behind(server: LiveServer) -> None:
    async def one(number: int, client: anthropic.AsyncAnthropic) -> int:
        text = f"stream {number} [[sim words=40]]"
        async with client.messages.stream(model=MODEL, max_tokens=400, messages=say(text)) as events:
            async for event in events:
                if number % 2 and event.type == "text":
                    return 0
            return (await events.get_final_message()).usage.output_tokens

    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="x", max_retries=0) as client:
        lengths = await asyncio.gather(*(one(number, client) for number in range(16)))
    assert all((length > 0) is (number % 2 == 0) for number, length in enumerate(lengths))
    await asyncio.to_thread(server.wait, server.is_idle)
