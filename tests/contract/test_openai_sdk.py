"""The `openai` SDK against a live server: chat, completions, models, tools, structure, logprobs and errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.contract.conftest import LiveServer

MODEL = "sim"


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def function(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"{name}.", "parameters": schema}}


# ---- chat --------------------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("Grüße an alle 🌍"))
    (choice,) = answer.choices
    assert choice.message.content == "You said: Grüße an alle 🌍"
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    assert choice.message.model_extra is not None
    assert "Grüße" in choice.message.model_extra["reasoning_content"]
    assert choice.message.model_extra["reasoning"] == choice.message.model_extra["reasoning_content"]
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")


def test_usage_counts_reasoning_and_cached_tokens(client: openai.OpenAI) -> None:
    messages = user("count me " * 100)
    first, second = (client.chat.completions.create(model=MODEL, messages=messages).usage for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens
    assert first.completion_tokens_details is not None
    assert 0 < (first.completion_tokens_details.reasoning_tokens or 0) < first.completion_tokens
    assert second.prompt_tokens_details is not None
    assert 0 < (second.prompt_tokens_details.cached_tokens or 0) < second.prompt_tokens


def test_a_cache_salt_keeps_callers_apart(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int | None:
        answer = client.chat.completions.create(
            model=MODEL, messages=user("salted " * 100), extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("ann") == 0
    assert cached("bob") == 0
    assert cached("ann")


def test_an_alias_answers_under_its_own_name(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="alias", messages=user("hi")).model == "alias"


def test_a_conversation_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    weather = function("get_weather", city={"type": "string"})
    messages: list[Any] = user("weather please")
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[weather])
    (call,) = first.choices[0].message.tool_calls or ()
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "21 °C"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[weather])
    assert second.choices[0].message.content == "The tool says: 21 °C"


def collect(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> dict[str, Any]:
    """What a client puts together from a stream."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None, "roles": 0}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            delta, extra = choice.delta, choice.delta.model_extra or {}
            message["roles"] += delta.role is not None
            message["content"] += delta.content or ""
            message["reasoning"] += extra.get("reasoning_content", "")
            assert extra.get("reasoning_content") == extra.get("reasoning")
            for part in delta.tool_calls or ():
                assert part.function is not None
                if part.id is not None:
                    message["calls"][part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
                message["calls"][part.index]["arguments"] += part.function.arguments or ""
            assert message["finish"] is None, "nothing comes after the finish reason"
            message["finish"] = choice.finish_reason
    return message


def test_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=user("Grüße an alle 🌍")).choices[0].message
    chunks = list(client.chat.completions.create(model=MODEL, messages=user("Grüße an alle 🌍"), stream=True))
    message = collect(chunks)
    assert message["content"] == whole.content
    assert message["reasoning"] == (whole.model_extra or {})["reasoning"]
    assert message["finish"] == "stop"
    assert message["roles"] == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert all(len(chunk.choices) == 1 for chunk in chunks)


def test_stream_usage_is_the_last_chunk_and_only_that(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=user("hi"), extra_body={"cache_salt": "s1"}).usage
    *chunks, last = client.chat.completions.create(
        model=MODEL,
        messages=user("hi"),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"cache_salt": "s2"},
    )
    assert last.choices == []
    assert last.usage == whole
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert all("usage" in chunk.model_fields_set for chunk in chunks)


def test_the_sdks_own_stream_reader_understands_it(client: openai.OpenAI) -> None:
    tools = [function("get_weather", city={"type": "string"})]
    with client.chat.completions.stream(model=MODEL, messages=user("weather"), tools=tools) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert (final.choices[0].message.tool_calls or ())[0].function.name == "get_weather"


def test_n_gives_that_many_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), n=2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1]
    first, second = (choice.message.content for choice in answer.choices)
    assert first != second, "each choice has a seed of its own"
    one = client.chat.completions.create(model=MODEL, messages=user("hi"), seed=7)
    assert one.choices[0].message.content == first
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens, "the prompt counts once"
    assert answer.usage.completion_tokens > one.usage.completion_tokens


def test_n_streams_interleave(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=user("hi"), n=3, seed=7)
    chunks = list(client.chat.completions.create(model=MODEL, messages=user("hi"), n=3, seed=7, stream=True))
    for choice in whole.choices:
        assert collect(chunks, choice.index)["content"] == choice.message.content
    order = [chunk.choices[0].index for chunk in chunks]
    assert order != sorted(order), "they come as they are made, not one after the other"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_it(client: openai.OpenAI, name: str) -> None:
    limit: Any = {name: 5}
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), **limit)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("stop", "content"), [("two", "You said: one "), (["x", " two"], "You said: one"), (None, None)]
)
def test_stop_strings(client: openai.OpenAI, stop: Any, content: str | None) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("one two three"), stop=stop, reasoning_effort="none"
    )
    assert answer.choices[0].message.content == (content or "You said: one two three")
    assert answer.choices[0].finish_reason == "stop"


def test_a_stop_string_can_be_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=user("one two three"),
        stop="two",
        reasoning_effort="none",
        extra_body={"include_stop_str_in_output": True},
    )
    assert answer.choices[0].message.content == "You said: one two"
    assert (answer.choices[0].model_extra or {})["stop_reason"] == "two"


@pytest.mark.parametrize(
    "off",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"thinking": {"type": "disabled"}}},
    ],
)
def test_thinking_can_be_switched_off(client: openai.OpenAI, off: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), **off)
    assert (answer.choices[0].message.model_extra or {})["reasoning_content"] is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_an_effort_that_the_model_maps_is_said_in_a_header(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("hi"), reasoning_effort="low", user="ann"
    )
    warning = raw.headers["x-freehold-warning"]
    assert "low" in warning
    assert "user is ignored" in warning
    assert raw.headers["x-request-id"].startswith("req-")


# ---- tools -------------------------------------------------------------------------------------------------

WEATHER = function("get_weather", city={"type": "string", "enum": ["Zürich", "東京"]})
NOW = function("get_time")
BOOKING = function(
    "make_booking",
    guests={"type": "integer"},
    room={
        "type": "object",
        "properties": {"beds": {"type": "array", "items": {"type": "number"}}, "view": {"type": "boolean"}},
        "required": ["beds", "view"],
    },
)

CALLS = {
    "one": ("weather", [WEATHER], ["get_weather"]),
    "one of several": ("the time please", [WEATHER, NOW], ["get_time"]),
    "parallel": ("weather and time, both", [WEATHER, NOW], ["get_weather", "get_time"]),
    "one tool twice": ("weather in both", [WEATHER], ["get_weather", "get_weather"]),
    "zero arguments": ("what time", [NOW], ["get_time"]),
    "nested": ("booking", [BOOKING], ["make_booking"]),
}


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    if name == "get_weather":
        assert arguments["city"] in ("Zürich", "東京")
    elif name == "get_time":
        assert arguments == {}
    else:
        assert type(arguments["guests"]) is int
        assert type(arguments["room"]["view"]) is bool
        assert isinstance(arguments["room"]["beds"], list)


@pytest.mark.parametrize("case", CALLS)
def test_tool_calls(client: openai.OpenAI, case: str) -> None:
    text, tools, names = CALLS[case]
    answer = client.chat.completions.create(model=MODEL, messages=user(text), tools=tools)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls: Any = choice.message.tool_calls or ()
    assert [call.function.name for call in calls] == names
    assert len({call.id for call in calls}) == len(names)
    for call in calls:
        check_arguments(call.function.name, json.loads(call.function.arguments))


@pytest.mark.parametrize("case", CALLS)
def test_tool_calls_stream(client: openai.OpenAI, case: str) -> None:
    text, tools, names = CALLS[case]
    chunks = list(client.chat.completions.create(model=MODEL, messages=user(text), tools=tools, stream=True))
    message = collect(chunks)
    assert message["finish"] == "tool_calls"
    assert message["content"] == ""
    assert "<" not in message["reasoning"], "no half tags"
    assert sorted(message["calls"]) == list(range(len(names)))
    assert [message["calls"][index]["name"] for index in range(len(names))] == names
    for call in message["calls"].values():
        check_arguments(call["name"], json.loads(call["arguments"]))


def test_parallel_calls_can_be_refused(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("weather and time, both"), tools=[WEATHER, NOW], parallel_tool_calls=False
    )
    assert len(answer.choices[0].message.tool_calls or ()) == 1


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", []),
        ("required", ["get_weather"]),
        ({"type": "function", "function": {"name": "get_time"}}, ["get_time"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_time"}}],
                },
            },
            ["get_time"],
        ),
    ],
    ids=["none", "required", "named", "allowed"],
)
def test_tool_choice(client: openai.OpenAI, choice: Any, names: list[str]) -> None:
    text = "weather" if choice == "none" else "hello"
    answer = client.chat.completions.create(model=MODEL, messages=user(text), tools=[WEATHER, NOW], tool_choice=choice)
    calls: Any = answer.choices[0].message.tool_calls or ()
    assert [call.function.name for call in calls] == names
    assert answer.choices[0].finish_reason == ("tool_calls" if names else "stop")


# ---- structure ---------------------------------------------------------------------------------------------


class Step(pydantic.BaseModel):
    what: str
    minutes: int


class Recipe(pydantic.BaseModel):
    name: str
    kind: Literal["soup", "salad"]
    steps: list[Step]
    vegan: bool


def test_parse_with_pydantic(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=user("a recipe"), response_format=Recipe)
    assert isinstance(answer.choices[0].message.parsed, Recipe)


def test_tools_parse_with_pydantic(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Recipe, name="save_recipe")
    answer = client.chat.completions.parse(model=MODEL, messages=user("save the recipe"), tools=[tool])
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Recipe)


def test_json_schema_streams(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=user("hi"),
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert type(json.loads(collect(chunks)["content"])["a"]) is int


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


# ---- logprobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": MODEL, "messages": user("Grüße 🌍"), "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        tokens = [token for logprobs in found for token in logprobs.content or ()]
        thoughts = [token for logprobs in found for token in (logprobs.model_extra or {}).get("reasoning", ())]
    else:
        (choice,) = client.chat.completions.create(**options).choices
        assert choice.logprobs is not None
        content, tokens = choice.message.content or "", choice.logprobs.content or []
        thoughts = (choice.logprobs.model_extra or {})["reasoning"]
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == content
    assert b"Gr\xc3\xbc\xc3\x9fe" in b"".join(bytes(token["bytes"]) for token in thoughts)
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= max(top.logprob for top in token.top_logprobs) < 0


def test_no_logprobs_unless_asked(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model=MODEL, messages=user("hi")).choices[0].logprobs is None
    answer = client.chat.completions.create(model=MODEL, messages=user("hi"), logprobs=True)
    assert answer.choices[0].logprobs is not None
    assert all(token.top_logprobs == [] for token in answer.choices[0].logprobs.content or ())


def test_chat_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("hi"), max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    assert answer.usage is not None
    first, *rest = (answer.model_extra or {})["prompt_logprobs"]
    assert first is None
    assert len(rest) == answer.usage.prompt_tokens - 1
    for position in rest:
        assert 2 <= len(position) <= 3
        own = next(iter(position.values()))
        assert set(own) == {"logprob", "rank", "decoded_token"}
        assert own["rank"] >= 1


# ---- completions -------------------------------------------------------------------------------------------


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8)
    (choice,) = answer.choices
    assert choice.text.startswith(" and so it goes")
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"


def test_completion_is_16_tokens_long_unless_asked(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_completions_of_texts_and_token_ids_are_the_same(server: LiveServer, client: openai.OpenAI) -> None:
    texts = ["Once upon", "a time there"]
    ids = [server.state.chat.tokenizer.encode(text) for text in texts]
    by_text = client.completions.create(model=MODEL, prompt=texts, n=2, echo=True)
    by_ids = client.completions.create(model=MODEL, prompt=ids, n=2, echo=True)
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert [choice.text.startswith(texts[i // 2]) for i, choice in enumerate(by_text.choices)] == [True] * 4
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model=MODEL, prompt=ids[0])
    assert by_text.choices[0].text == texts[0] + one.choices[0].text


@pytest.mark.parametrize("echo", [False, True])
def test_completion_stream(client: openai.OpenAI, echo: bool) -> None:
    options: Any = {"model": MODEL, "prompt": ["Once upon", "a time"], "echo": echo, "logprobs": 1, "seed": 3}
    whole = client.completions.create(**options)
    *chunks, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    for index, expected in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == expected.text
        assert [choice.finish_reason for choice in mine][-1] == expected.finish_reason
        assert expected.logprobs is not None
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [item for choice in mine if choice.logprobs for item in getattr(choice.logprobs, name)]
            assert joined == getattr(expected.logprobs, name)


def test_completion_logprobs_align(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Grüße 🌍 an", echo=True, logprobs=2, max_tokens=4)
    (choice,) = answer.choices
    lists: Any = choice.logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset) == len(lists.top_logprobs)
    assert b"".join(map(bytes, lists.bytes)).decode() == choice.text
    assert lists.token_logprobs[0] is None
    assert lists.top_logprobs[0] is None
    assert all(logprob < 0 for logprob in lists.token_logprobs[1:])
    for token, offset in zip(lists.tokens, lists.text_offset, strict=True):
        if "\ufffd" not in token:  # a whole character, or several
            assert choice.text[offset : offset + len(token)] == token


def test_scoring_only(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Score this", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "Score this"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or ()) == answer.usage.prompt_tokens


def test_completion_prompt_logprobs(server: LiveServer, client: openai.OpenAI) -> None:
    ids = server.state.chat.tokenizer.encode("Score this text")
    answer = client.completions.create(model=MODEL, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 0})
    first, *rest = (answer.choices[0].model_extra or {})["prompt_logprobs"]
    assert first is None
    assert [next(iter(position)) for position in rest] == [str(token_id) for token_id in ids[1:]]


# ---- models ------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sim", "alias"]
    model = client.models.retrieve("alias")
    assert (model.object, model.owned_by) == ("model", "freehold")
    assert (model.model_extra or {})["root"] == "sim"


# ---- errors ------------------------------------------------------------------------------------------------


def bad(client: openai.OpenAI, **options: Any) -> openai.APIStatusError:
    given: Any = {"model": MODEL, "messages": user("hi"), **options}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**given)
    return caught.value


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 131_073}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [999_999]}}, "stop_token_ids"),
        ({"max_tokens": 5, "extra_body": {"min_tokens": 6}}, "min_tokens"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_a_bad_request_error_that_names_the_field(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    error = bad(client, **options)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert param in error.message


def test_a_prompt_over_the_context_is_a_bad_request_with_openais_code(start: Callable[..., LiveServer]) -> None:
    live = start(max_model_len=64)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    error = bad(client, messages=user("long " * 200))
    assert isinstance(error, openai.BadRequestError)
    assert error.code == "context_length_exceeded"


def test_another_model_is_a_not_found_error(client: openai.OpenAI) -> None:
    error = bad(client, model="gpt-4")
    assert isinstance(error, openai.NotFoundError)
    assert "sim, alias" in error.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_no_or_another_key_is_an_authentication_error(start: Callable[..., LiveServer]) -> None:
    live = start(api_keys=("right",))
    for key, fine in (("right", True), ("wrong", False)):
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
        if fine:
            assert client.models.list().data
        else:
            assert isinstance(bad(client), openai.AuthenticationError)
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.get(f"{live.url}/v1/models").status_code == 401


def test_a_full_queue_is_a_rate_limit_error_with_a_time(start: Callable[..., LiveServer]) -> None:
    live = start(max_num_seqs=1, max_queue=1)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    slow: Any = {"model": MODEL, "messages": user("[[sim slow seconds=0.02]]"), "max_tokens": 20}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(client.chat.completions.create, **slow) for _ in range(2)]
        live.wait(lambda: live.stats().running + live.stats().waiting == 2)
        error = bad(client)
        assert isinstance(error, openai.RateLimitError)
        assert int(error.response.headers["retry-after"]) >= 1
        assert all(answer.result().choices for answer in running), "those that were accepted are not disturbed"
    # All of n or none: what was submitted for the first choices is taken back.
    live.wait(live.is_idle)
    error = bad(client, n=5)
    assert isinstance(error, openai.RateLimitError)
    live.wait(live.is_idle)


def test_a_failure_before_the_first_byte_is_an_internal_server_error(client: openai.OpenAI) -> None:
    for stream in (False, True):
        error = bad(client, messages=user("[[sim error]]"), stream=stream)
        assert isinstance(error, openai.InternalServerError)
        assert error.code == "engine_error"


def test_a_failure_after_it_is_raised_from_the_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=user("[[sim error after=5]]"), stream=True)
    received: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError, match="simulated failure") as caught:
        received.extend(stream)
    assert len(received) >= 5
    assert not isinstance(caught.value, openai.APIStatusError), "the status line was already out"
    assert client.chat.completions.create(model=MODEL, messages=user("hi")).choices, "others go on"


def test_a_dead_engine_is_a_503_everywhere_and_not_healthy(start: Callable[..., LiveServer]) -> None:
    live = start()
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    assert isinstance(bad(client, messages=user("[[sim crash]]")), openai.InternalServerError)
    error = bad(client)
    assert error.status_code == 503
    assert int(error.response.headers["retry-after"]) >= 1
    assert httpx.get(f"{live.url}/health").status_code == 503
    assert httpx.get(f"{live.url}/ready").status_code == 503
