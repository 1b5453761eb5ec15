"""Requests as coding agents send them: many tools, long cached prompts, reasoning handed back, round after round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseReasoningItem

from tests.contract.conftest import LiveServer

MODEL = "sim"
ARGUMENTS = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"file_path": {"type": "string", "description": "absolute"}, "limit": {"type": "number"}},
    "required": ["file_path"],
    "additionalProperties": False,
}


@pytest.fixture
def messages(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def agent_request(number_of_tools: int) -> dict[str, Any]:
    """A request as coding agents send it: many tools, long cached system blocks, metadata, reminders."""
    mark = {"cache_control": {"type": "ephemeral"}}
    tools = [
        {
            "name": f"Tool{n}",
            "description": f"Does thing {n}. " * 20,
            "input_schema": ARGUMENTS,
        }
        for n in range(number_of_tools)
    ]
    return {
        "model": MODEL,
        "max_tokens": 32_000,
        "system": [{"type": "text", "text": "You are an agent."}, {"type": "text", "text": "Rules. " * 200, **mark}],
        "tools": tools,
        "metadata": {"user_id": "user_1_account__session_2"},
        "thinking": {"type": "enabled", "budget_tokens": 31_999},
        "betas": ["interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>\nNotes.\n</system-reminder>\n"},
                    {"type": "text", "text": "please run Tool7", **mark},
                ],
            }
        ],
    }


def test_messages_work_round_after_round(messages: anthropic.Anthropic) -> None:
    ask = agent_request(24)
    for _ in range(2):
        with messages.beta.messages.stream(**ask) as events:
            message = events.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "tool_use"]
        call = message.content[-1]
        assert call.type == "tool_use"
        assert call.name == "Tool7"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "file not found", "is_error": True}
        ask["messages"] += [
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result, {"type": "text", "text": "again with Tool7"}]},
        ]
    assert message.usage.cache_read_input_tokens


def test_what_was_not_honoured_is_in_a_header(messages: anthropic.Anthropic) -> None:
    with messages.beta.messages.with_streaming_response.create(**agent_request(2), stream=True) as response:
        warning = response.headers["x-freehold-warning"]
        response.read()
    for name in ("system[].cache_control", "messages[].content[].cache_control", "metadata", "budget_tokens"):
        assert name in warning


def test_responses_work_round_after_round(client: openai.OpenAI) -> None:
    """As agents send it: many tools, nothing stored, reasoning asked for packed and handed back without its text."""
    tools: list[Any] = [
        {"type": "function", "name": f"tool{n}", "strict": False, "parameters": ARGUMENTS} for n in range(24)
    ]
    turns: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rules. " * 200}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "please run tool7"}]},
    ]
    for number in range(2):
        with client.responses.stream(
            model=MODEL,
            input=turns,
            instructions="You are an agent.",
            tools=tools,
            tool_choice="auto",
            parallel_tool_calls=False,
            reasoning={"effort": "high", "summary": "auto"},
            include=["reasoning.encrypted_content"],
            store=False,
            prompt_cache_key="session-1",
            text={"verbosity": "low"},
        ) as events:
            response = events.get_final_response()
        reasoning, call = response.output
        assert isinstance(reasoning, ResponseReasoningItem)
        assert isinstance(call, ResponseFunctionToolCall)
        assert call.name == "tool7"
        packed = {key: value for key, value in reasoning.to_dict().items() if key != "content"}
        turns += [packed, call, {"type": "function_call_output", "call_id": call.call_id, "output": "ok"}]
        turns.append({"role": "user", "content": f"again with tool7, {number}"})
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens
