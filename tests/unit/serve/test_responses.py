"""The Responses API without a server: what a request means, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from openai.types import responses as sdk_types
from openai.types import shared_params
from openai.types.responses import response_create_params

from freehold.errors import InvalidRequest, UnknownField
from freehold.serve.carried import pack
from freehold.serve.fields import FIELDS
from freehold.serve.responses import schema
from freehold.serve.responses.schema import ResponsesRequest, prepare_raw
from freehold.serve.responses.translate import Translated, translate
from freehold.serve.state import SamplingDefaults
from freehold.serve.wire import decode

WEATHER = {"type": "function", "name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"北京"}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "18C"}
USER = {"role": "user", "content": "hello"}


def ask(**fields: Any) -> tuple[Translated, tuple[str, ...]]:
    """The turn of a request, and the warnings of decoding and translating it."""
    raw = msgspec.json.decode(msgspec.json.encode({"model": "m", "input": "hello", **fields}))
    prepare_raw(raw)
    decoded = decode(raw, ResponsesRequest, "responses")
    translated = translate(decoded.value, SamplingDefaults(temperature=0.7, top_p=0.9, top_k=3))
    return translated, (*decoded.warnings, *translated.warnings)


def turn(**fields: Any) -> Any:
    return ask(**fields)[0].turn


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    return [dict(message) for message in turn(input=list(items), **fields).messages]


def said(text: str, **more: Any) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [part], **more}


def thought(text: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
        **more,
    }


# ---- conversations -----------------------------------------------------------------------------------------


def test_a_string_is_one_user_message_after_the_instructions() -> None:
    found = turn(input="hello", instructions="be brief").messages
    assert list(found) == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize("kind", [{}, {"type": "message"}])
@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_messages_are_strings_or_parts(kind: dict[str, str], role: str) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages({**kind, "role": role, "content": "ab"}) == [{"role": role, "content": "ab"}]
    assert messages({**kind, "role": role, "content": parts}) == [{"role": role, "content": "ab"}]


def test_a_tool_round_trip_keeps_reasoning_text_and_calls_together() -> None:
    assert messages(USER, thought("look"), said("One moment."), CALL, OUTPUT) == [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "One moment.",
            "reasoning_content": "look",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"北京"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "18C"},
    ]


def test_each_round_of_calls_is_a_message_of_its_own() -> None:
    second = {**CALL, "call_id": "c2"}
    found = messages(USER, thought("one"), CALL, OUTPUT, thought("two"), second, {**OUTPUT, "call_id": "c2"})
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "assistant", "tool"]
    assert [m.get("reasoning_content") for m in found if m["role"] == "assistant"] == ["one", "two"]


def test_two_answers_in_a_row_stay_two_messages() -> None:
    found = messages(USER, thought("one"), said("a"), thought("two"), said("b"), said("c"))
    assert [(m.get("reasoning_content"), m["content"]) for m in found[1:]] == [("one", "a"), ("two", "b"), (None, "c")]


def test_outputs_come_in_the_order_of_their_calls() -> None:
    found = messages(USER, CALL, {**CALL, "call_id": "c2"}, {**OUTPUT, "call_id": "c2", "output": "second"}, OUTPUT)
    assert [m["content"] for m in found[2:]] == ["18C", "second"]


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([USER, CALL], "input"),
        ([USER, CALL, USER], "input[2]"),
        ([USER, CALL, {**CALL, "call_id": "c2"}, OUTPUT], "input"),
        ([USER, OUTPUT], "input[1].call_id"),
        ([USER, CALL, OUTPUT, OUTPUT], "input[3].call_id"),
        ([USER, CALL, CALL], "input[2].call_id"),
        ([USER, {**CALL, "arguments": "{"}], "input[1].arguments"),
        ([USER, {**CALL, "arguments": "[1]"}], "input[1].arguments"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0]"),
        ([{"id": "msg_1"}], "input[0]"),
        ([{"type": "web_search_call", "id": "ws_1"}], "input[0].type"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0].type"),
        ([USER, CALL, {**OUTPUT, "output": [{"type": "input_file"}]}], "input[2].output[0].type"),
        ([], "input"),
    ],
)
def test_what_is_not_a_conversation_is_refused(items: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(input=items)
    assert caught.value.param == param


def test_reasoning_comes_back_from_encrypted_content_when_its_text_was_left_out() -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": pack("步骤 1")}
    assert messages(USER, item, CALL, OUTPUT)[1]["reasoning_content"] == "步骤 1"


@pytest.mark.parametrize("more", [{"encrypted_content": "gAAAA"}, {"summary": [{"type": "summary_text", "text": "s"}]}])
def test_reasoning_of_another_provider_is_dropped_with_a_warning(more: dict[str, Any]) -> None:
    found, warnings = ask(input=[USER, {"type": "reasoning", "id": "r", "summary": [], **more}, said("hi"), USER])
    assert not found.turn.messages[1].get("reasoning_content")
    assert any("dropped" in warning for warning in warnings)


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, "auto", ["weather", "now"]),
        ("none", "none", ["weather", "now"]),
        ("required", "required", ["weather", "now"]),
        ({"type": "function", "name": "now"}, ("named", "now"), ["weather", "now"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]},
            "required",
            ["now"],
        ),
    ],
)
def test_tool_choice(choice: Any, expected: Any, names: list[str]) -> None:
    found = turn(tools=[WEATHER, {"type": "function", "name": "now"}], tool_choice=choice, parallel_tool_calls=False)
    assert (found.tool_choice, found.parallel_tool_calls) == (expected, False)
    assert [tool["function"]["name"] for tool in found.tools] == names


def test_tools_become_functions() -> None:
    found = turn(tools=[WEATHER, {"type": "function", "name": "now", "parameters": None, "strict": None}]).tools
    assert [tool["function"] for tool in found] == [
        {"name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": True},
        {"name": "now", "parameters": {"type": "object", "properties": {}}},
    ]


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}},
        ),
    ],
)
def test_text_format(format_: Any, expected: Any) -> None:
    assert turn(text={"format": format_}).response_format == expected


def test_reasoning_becomes_effort_and_history_rule() -> None:
    assert turn().effort is None
    assert turn(reasoning={"effort": "low"}).effort == "low"
    assert turn(reasoning={"context": "auto"}).template_kwargs == {}
    assert turn(reasoning={"context": "all_turns"}).template_kwargs == {"clear_thinking": False}
    assert turn(reasoning={"context": "current_turn"}).template_kwargs == {"clear_thinking": True}
    with pytest.raises(InvalidRequest, match="contradict"):
        ask(reasoning={"context": "all_turns"}, chat_template_kwargs={"clear_thinking": True})


def test_sampling_is_as_given_or_the_server_default() -> None:
    found = turn()
    assert not found.max_tokens_given
    assert (found.params.temperature, found.params.top_p, found.params.top_k) == (0.7, 0.9, 3)
    found = turn(max_output_tokens=5, temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=7, cache_salt="s")
    params = found.params
    assert (found.max_tokens_given, params.max_tokens, found.cache_salt) == (True, 5, "s")
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0, 0.5, 0, 0.1, 7)


def test_logprobs_need_include() -> None:
    assert turn(include=["message.output_text.logprobs"]).params.logprobs == 0
    assert turn(include=["message.output_text.logprobs"], top_logprobs=4).params.logprobs == 4
    found, warnings = ask(top_logprobs=4)
    assert found.turn.params.logprobs is None
    assert any("top_logprobs" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["everything"]}, "include[0]"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 1}, "max_tokens"),
        ({"input": [{**USER, "name": "x"}]}, "input[0].name"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}]}]},
            "input[0].content[0].x",
        ),
        ({"tools": [{**WEATHER, "function": {}}]}, "tools[0].function"),
        ({"text": {"style": "x"}}, "text.style"),
    ],
)
def test_unknown_fields_are_refused_by_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnknownField) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_what_is_ignored_is_said() -> None:
    _, warnings = ask(
        store=True, user="u", reasoning={"summary": "auto"}, text={"verbosity": "low"}, prompt_cache_key="k"
    )
    named = {warning.split(" is ignored")[0] for warning in warnings}
    assert named == {"store", "user", "reasoning.summary", "text.verbosity", "prompt_cache_key"}


def test_the_defaults_of_the_api_are_accepted_in_silence() -> None:
    _, warnings = ask(
        store=False,
        background=False,
        truncation="disabled",
        service_tier="auto",
        previous_response_id=None,
        text={"format": {"type": "text"}, "verbosity": "medium"},
        stream_options={"include_obfuscation": False},
        metadata={"a": "b"},
    )
    assert warnings == ()


# ---- every field of the SDK is accounted for ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("sdk", "struct", "prefix"),
    [
        (response_create_params.ResponseCreateParamsStreaming, ResponsesRequest, ""),
        (response_create_params.StreamOptions, schema.StreamOptions, "stream_options."),
        (shared_params.Reasoning, schema.ReasoningConfig, "reasoning."),
        (sdk_types.ResponseTextConfigParam, schema.TextConfig, "text."),
        (sdk_types.ResponseFormatTextJSONSchemaConfigParam, schema.JsonSchema, "text.format."),
        (sdk_types.FunctionToolParam, schema.FunctionTool, "tools[]."),
        (sdk_types.EasyInputMessageParam, schema.MessageItem, "input[]."),
        (sdk_types.ResponseOutputMessageParam, schema.MessageItem, "input[]."),
        (sdk_types.ResponseReasoningItemParam, schema.ReasoningItem, "input[]."),
        (sdk_types.ResponseFunctionToolCallParam, schema.FunctionCall, "input[]."),
        (sdk_types.response_input_param.FunctionCallOutput, schema.FunctionCallOutput, "input[]."),
        (sdk_types.ResponseInputTextParam, schema.InputText, "input[].content[]."),
        (sdk_types.ResponseInputTextContentParam, schema.InputText, "input[].output[]."),
        (sdk_types.ResponseOutputTextParam, schema.OutputText, "input[].content[]."),
    ],
)
def test_every_field_is_honoured_or_in_the_table(sdk: Any, struct: type[msgspec.Struct], prefix: str) -> None:
    honoured = set(struct.__struct_encode_fields__) | {"type"}
    listed = {path.removeprefix(prefix) for path in FIELDS["responses"] if path.startswith(prefix)}
    assert sdk.__required_keys__ | sdk.__optional_keys__ <= honoured | listed
    assert not honoured & listed
