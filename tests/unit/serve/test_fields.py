"""Every field that the SDKs can send is honoured or in the table, and never both."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params as completion_params
from openai.types import shared_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params

from freehold.serve import schema
from freehold.serve.fields import FIELDS, Action


def fields_of(typed_dict: Any) -> set[str]:
    return set(typed_dict.__required_keys__ | typed_dict.__optional_keys__)


def fields_in(struct: type[msgspec.Struct]) -> set[str]:
    config = struct.__struct_config__
    tag = {config.tag_field} if config.tag_field else set()
    return set(struct.__struct_encode_fields__) | tag


def table(endpoint: str, prefix: str) -> set[str]:
    """Names of the table's fields directly under a path."""
    return {
        path.removeprefix(prefix)
        for path in FIELDS[endpoint]
        if path.startswith(prefix) and "." not in path.removeprefix(prefix)
    }


CASES = [
    ("chat", "", chat_params.CompletionCreateParamsStreaming, schema.ChatRequest),
    ("chat", "stream_options.", ChatCompletionStreamOptionsParam, schema.StreamOptions),
    ("chat", "messages[].", ChatCompletionSystemMessageParam, schema.SystemMessage),
    ("chat", "messages[].", ChatCompletionDeveloperMessageParam, schema.DeveloperMessage),
    ("chat", "messages[].", ChatCompletionUserMessageParam, schema.UserMessage),
    ("chat", "messages[].", ChatCompletionAssistantMessageParam, schema.AssistantMessage),
    ("chat", "messages[].", ChatCompletionToolMessageParam, schema.ToolMessage),
    ("chat", "messages[].content[].", ChatCompletionContentPartTextParam, schema.TextPart),
    ("chat", "messages[].tool_calls[].", ChatCompletionMessageFunctionToolCallParam, schema.ToolCall),
    ("chat", "tools[].", ChatCompletionFunctionToolParam, schema.Tool),
    ("chat", "tools[].function.", shared_params.FunctionDefinition, schema.FunctionSpec),
    ("completions", "", completion_params.CompletionCreateParamsStreaming, schema.CompletionRequest),
    ("completions", "stream_options.", ChatCompletionStreamOptionsParam, schema.StreamOptions),
]


@pytest.mark.parametrize(
    ("endpoint", "prefix", "sdk", "struct"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_field_of_the_sdk_is_honoured_or_in_the_table(
    endpoint: str, prefix: str, sdk: Any, struct: type[msgspec.Struct]
) -> None:
    unknown = fields_of(sdk) - fields_in(struct) - table(endpoint, prefix)
    assert not unknown, f"neither honoured nor in fields.py: {sorted(unknown)}"


@pytest.mark.parametrize(
    ("endpoint", "prefix", "sdk", "struct"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_no_field_is_both_honoured_and_in_the_table(
    endpoint: str, prefix: str, sdk: Any, struct: type[msgspec.Struct]
) -> None:
    assert not fields_in(struct) & table(endpoint, prefix)


def test_what_the_sdk_returns_can_be_sent_back() -> None:
    """Clients append `response.choices[0].message` to the conversation as it is."""
    sent_back = fields_in(schema.AssistantMessage) | table("chat", "messages[].")
    assert set(schema.AssistantOut.__struct_fields__) <= sent_back


def rules() -> Iterable[Any]:
    return ((endpoint, path, rule) for endpoint, table in FIELDS.items() for path, rule in table.items())


def test_reasons_complete_a_sentence() -> None:
    for endpoint, path, rule in rules():
        assert rule.why, (endpoint, path)
        assert rule.why[0].islower(), (endpoint, path)
        assert not rule.why.endswith("."), (endpoint, path)


def test_null_always_means_not_given() -> None:
    assert all(rule.allows(None) for _, _, rule in rules())


def test_both_actions_are_used_and_there_are_no_others() -> None:
    assert {rule.action for _, _, rule in rules()} == set(Action)
    assert typing.get_type_hints(type(next(iter(rules()))[2]))["action"] is Action
