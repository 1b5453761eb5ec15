"""The `openai` SDK against a live server: tools and structured output."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.contract.openai_chat import MODEL, collect, function, user

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
