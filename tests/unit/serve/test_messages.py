"""The Messages API without a server: what a request means, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from anthropic.types import beta, message_count_tokens_params, message_create_params

from freehold.errors import FreeholdError, InvalidRequest, UnknownField, UnsupportedField
from freehold.serve.carried import pack
from freehold.serve.fields import FIELDS, Action
from freehold.serve.messages import schema
from freehold.serve.messages.schema import Conversation, MessagesRequest, refuse_unsupported
from freehold.serve.messages.translate import Translated, translate
from freehold.serve.state import SamplingDefaults
from freehold.serve.wire import decode

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "北京"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "18C"}


def ask(**fields: Any) -> tuple[Translated, tuple[str, ...]]:
    """The turn of a request, and the warnings of decoding and translating it."""
    raw = {"model": "m", "max_tokens": 4096, "messages": HELLO, **fields}
    raw = msgspec.json.decode(msgspec.json.encode(raw))
    refuse_unsupported(raw)
    decoded = decode(raw, MessagesRequest, "messages")
    translated = translate(decoded.value, SamplingDefaults(temperature=0.7, top_p=0.9, top_k=3))
    return translated, (*decoded.warnings, *translated.warnings)


def turn(**fields: Any) -> Any:
    return ask(**fields)[0].turn


def messages(*given: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [dict(message) for message in turn(messages=list(given), **fields).messages]


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


# ---- conversations -----------------------------------------------------------------------------------------


def test_system_comes_first_as_a_string_or_as_blocks() -> None:
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert messages(*HELLO, system="be brief") == expected
    assert messages(*HELLO, system=[text("be "), text("brief", cache_control={"type": "ephemeral"})]) == expected
    assert messages(*HELLO, system="")[0]["role"] == "user"


def test_a_tool_round_trip_keeps_thinking_text_and_calls_together() -> None:
    found = messages(
        user(text("weather?")),
        assistant({"type": "thinking", "thinking": "look", "signature": "s"}, text("One moment."), USE),
        user(RESULT, text("be quick")),
    )
    assert found == [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "One moment.",
            "reasoning_content": "look",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"北京"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "18C"},
        {"role": "user", "content": "be quick"},
    ]


def test_consecutive_assistant_messages_are_one_turn() -> None:
    found = messages(*HELLO, assistant(text("a")), assistant(text("b"), USE), user(RESULT))
    assert [m["role"] for m in found] == ["user", "assistant", "tool"]
    assert found[1]["content"] == "ab"


def test_results_come_in_the_order_of_their_calls() -> None:
    calls = assistant(USE, {**USE, "id": "t2"})
    found = messages(*HELLO, calls, user({**RESULT, "tool_use_id": "t2", "content": "second"}, RESULT))
    assert [m["content"] for m in found[2:]] == ["18C", "second"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("plain", "plain"),
        ([text("a"), text("b")], "ab"),
        ([], ""),
        (None, ""),
        ([{"type": "tool_reference", "tool_name": "weather"}], [{"type": "tool_reference", "name": "weather"}]),
    ],
)
def test_tool_results_are_text_or_references(content: Any, expected: Any) -> None:
    found = messages(*HELLO, assistant(USE), user({**RESULT, "content": content}))
    assert found[-1]["content"] == expected


def test_an_error_result_says_so_in_its_text() -> None:
    found = messages(*HELLO, assistant(USE), user({**RESULT, "is_error": True}))
    assert found[-1]["content"] == "Error: 18C"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([*HELLO, assistant(USE), user(text("no result"))], "messages[2].content"),
        ([*HELLO, assistant(USE), user(RESULT, RESULT)], "messages[2].content[0].tool_use_id"),
        ([*HELLO, assistant(USE), user({**RESULT, "tool_use_id": "x"})], "messages[2].content[0].tool_use_id"),
        ([user(RESULT)], "messages[0].content[0].tool_use_id"),
        ([*HELLO, assistant(USE), user(text("first"), RESULT)], "messages[2].content"),
        ([*HELLO, assistant(USE, USE), user(RESULT)], "messages[1].content[1].id"),
        ([*HELLO, assistant(text("The answer is ("))], "messages"),
        ([], "messages"),
    ],
)
def test_what_is_not_a_conversation_is_refused(given: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(messages=given)
    assert caught.value.param == param


def test_thinking_that_was_omitted_comes_back_from_its_signature() -> None:
    block = {"type": "thinking", "thinking": "", "signature": pack("步骤 1")}
    found = messages(*HELLO, assistant(block, USE), user(RESULT))
    assert found[1]["reasoning_content"] == "步骤 1"


@pytest.mark.parametrize(
    "block",
    [{"type": "redacted_thinking", "data": "xyz"}, {"type": "thinking", "thinking": "", "signature": "EqQBCgIYAhIM"}],
)
def test_thinking_of_another_provider_is_dropped_with_a_warning(block: dict[str, Any]) -> None:
    found, warnings = ask(messages=[*HELLO, assistant(block, text("hi")), *HELLO])
    assert not found.turn.messages[1].get("reasoning_content")
    assert any("dropped" in warning for warning in warnings)


def test_a_changed_signature_of_ours_is_refused() -> None:
    block = {"type": "thinking", "thinking": "", "signature": pack("text")[:-6]}
    with pytest.raises(InvalidRequest, match="altered") as caught:
        ask(messages=[*HELLO, assistant(block), *HELLO])
    assert caught.value.param == "messages[1].content[0].signature"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (user({"type": "image", "source": {}}), "messages[0].content[0].type"),
        (user(text("a"), {"type": "document", "source": {}}), "messages[0].content[1].type"),
        (assistant({"type": "server_tool_use"}), "messages[0].content[0].type"),
        (user({**RESULT, "content": [{"type": "image"}]}), "messages[0].content[0].content[0].type"),
        (user({"type": "thinking"}), "messages[0].content[0].type"),
    ],
)
def test_blocks_that_the_model_cannot_read_are_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedField, match="blocks are not supported") as caught:
        ask(messages=[message])
    assert caught.value.param == param


# ---- settings ----------------------------------------------------------------------------------------------

OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("fields", "effort", "kwargs", "warns"),
    [
        ({}, None, OFF, False),
        ({"output_config": {"effort": "high"}}, "high", {}, False),
        ({"thinking": {"type": "adaptive"}}, None, {}, False),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low", {}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "high", {}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 32_768}, "max_tokens": 40_000}, None, {}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "max"}}, "max", {}, True),
        ({"thinking": {"type": "disabled"}}, None, OFF, False),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, "low", OFF, False),
    ],
)
def test_thinking_becomes_effort_and_a_switch(fields: Any, effort: str | None, kwargs: Any, warns: bool) -> None:
    found, warnings = ask(**fields)
    assert (found.turn.effort, found.turn.template_kwargs) == (effort, kwargs)
    assert any("budget_tokens" in warning for warning in warnings) is warns


@pytest.mark.parametrize(
    ("keep", "clear", "warns"),
    [
        ("all", False, False),
        ({"type": "all"}, False, False),
        ({"type": "thinking_turns", "value": 1}, True, False),
        ({"type": "thinking_turns", "value": 3}, False, True),
        (None, True, False),
    ],
)
def test_clear_thinking_edits_reach_the_template(keep: Any, clear: bool, warns: bool) -> None:
    edit = {"type": "clear_thinking_20251015", "keep": keep}
    found, warnings = ask(context_management={"edits": [edit]}, thinking={"type": "adaptive"})
    assert found.turn.template_kwargs == {"clear_thinking": clear}
    assert bool(warnings) is warns


def test_other_edits_are_refused() -> None:
    with pytest.raises(UnsupportedField, match="clear_tool_uses") as caught:
        ask(context_management={"edits": [{"type": "clear_tool_uses_20250919"}]})
    assert caught.value.param == "context_management.edits[0].type"


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "weather"}, ("named", "weather"), True),
        ({"type": "none"}, "none", True),
    ],
)
def test_tool_choice(choice: Any, expected: Any, parallel: bool) -> None:
    found = turn(tools=[WEATHER], tool_choice=choice)
    assert (found.tool_choice, found.parallel_tool_calls) == (expected, parallel)


def test_tools_become_functions() -> None:
    plain = {"name": "now", "input_schema": {"type": "object"}, "type": "custom", "strict": True, "defer_loading": True}
    assert [tool["function"] for tool in turn(tools=[WEATHER, plain]).tools] == [
        {"name": "weather", "description": "d", "parameters": WEATHER["input_schema"]},
        {"name": "now", "parameters": {"type": "object"}, "strict": True, "defer_loading": True},
    ]


def test_output_format_is_a_json_schema() -> None:
    wanted = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = turn(output_config={"format": {"type": "json_schema", "schema": wanted}})
    assert found.response_format["json_schema"]["schema"] == wanted


def test_sampling_is_as_given_or_the_server_default() -> None:
    params = turn().params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (4096, 0.7, 0.9, 3)
    found = turn(temperature=0, top_p=0.5, top_k=40, stop_sequences=["END"])
    assert (found.params.temperature, found.params.top_p, found.params.top_k, found.stop) == (0, 0.5, 40, ("END",))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"stop_sequences": ["ok", "  "]}, "stop_sequences[1]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 512}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 4096}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{**WEATHER, "allowed_callers": ["code_execution_20260521"]}]}, "tools[0].allowed_callers"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("thread", "status", "code"),
    [
        ({"type": "create"}, 400, "thread_unsupported_request"),
        ({"type": "continue", "previous_message_id": "msg_1"}, 404, "thread_not_found"),
    ],
)
def test_threads_are_refused_with_the_codes_that_make_the_sdk_go_on_without(
    thread: Any, status: int, code: str
) -> None:
    with pytest.raises(FreeholdError) as caught:
        ask(thread=thread)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert ask(thread=None)[1] == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"maxTokens": 1}, "maxTokens"),
        ({"messages": [{**HELLO[0], "name": "x"}]}, "messages[0].name"),
        ({"messages": [user(text("a", colour="red"))]}, "messages[0].content[0].colour"),
        ({"tools": [{**WEATHER, "parameters": {}}]}, "tools[0].parameters"),
        ({"thinking": {"type": "adaptive", "budget": 1}}, "thinking.budget"),
    ],
)
def test_unknown_fields_are_refused_by_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnknownField) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_cache_control_anywhere_is_ignored_with_one_warning_a_place() -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    _, warnings = ask(
        **mark,
        system=[text("s", **mark), text("t", **mark)],
        tools=[{**WEATHER, **mark}],
        messages=[
            user(text("a", **mark)),
            assistant({**USE, **mark}),
            user({**RESULT, "content": [text("b", **mark)]}),
        ],
    )
    assert sorted(warning.split(" is ignored")[0] for warning in warnings) == [
        "cache_control",
        "messages[].content[].cache_control",
        "messages[].content[].content[].cache_control",
        "system[].cache_control",
        "tools[].cache_control",
    ]


# ---- every field of the SDK is accounted for ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("sdk", "struct"),
    [
        (message_create_params.MessageCreateParamsStreaming, MessagesRequest),
        (beta.message_create_params.MessageCreateParamsStreaming, MessagesRequest),
        (message_count_tokens_params.MessageCountTokensParams, Conversation),
    ],
)
def test_every_top_level_field_is_honoured_or_in_the_table(sdk: Any, struct: type[msgspec.Struct]) -> None:
    honoured, listed = set(struct.__struct_encode_fields__), set(FIELDS["messages"])
    assert sdk.__required_keys__ | sdk.__optional_keys__ <= honoured | listed
    assert not honoured & listed


@pytest.mark.parametrize(
    ("sdk", "struct", "prefixes"),
    [
        (beta.BetaTextBlockParam, schema.TextBlock, ["messages[].content[].", "system[]."]),
        (beta.BetaTextBlockParam, schema.TextBlock, ["messages[].content[].content[]."]),
        (beta.BetaToolUseBlockParam, schema.ToolUse, ["messages[].content[]."]),
        (beta.BetaToolResultBlockParam, schema.ToolResult, ["messages[].content[]."]),
        (beta.BetaThinkingBlockParam, schema.Thinking, ["messages[].content[]."]),
        (beta.BetaToolParam, schema.Tool, ["tools[]."]),
        (beta.BetaOutputConfigParam, schema.OutputConfig, ["output_config."]),
        (beta.BetaThinkingConfigEnabledParam, schema.ThinkingEnabled, ["thinking."]),
        (beta.BetaToolChoiceToolParam, schema.ToolChoiceTool, ["tool_choice."]),
    ],
)
def test_every_nested_field_is_honoured_or_in_the_table(sdk: Any, struct: Any, prefixes: list[str]) -> None:
    honoured = set(struct.__struct_encode_fields__) | {"type"}
    for prefix in prefixes:
        listed = {path.removeprefix(prefix) for path in FIELDS["messages"] if path.startswith(prefix)}
        assert sdk.__required_keys__ | sdk.__optional_keys__ <= honoured | listed
        assert not honoured & listed


def test_nothing_in_the_table_is_ignored_where_it_would_change_the_answer() -> None:
    refused = {path for path, rule in FIELDS["messages"].items() if rule.action is Action.REFUSE}
    assert {"container", "mcp_servers", "thread", "compaction", "tools[].allowed_callers"} <= refused
