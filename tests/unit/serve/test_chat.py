"""From chat requests to turns, and from events to bodies and chunks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from freehold.errors import InvalidRequest, Unavailable
from freehold.serve import schema
from freehold.serve.bodies import finite, prompt_logprobs_body, usage_body
from freehold.serve.chat_reply import ChunkWriter, Reply, collect
from freehold.serve.chat_turn import choose_tools, message_dicts, template_kwargs
from freehold.serve.schema import ChatRequest
from freehold.serve.stream import DONE
from freehold.serve.turn import (
    ContentDelta,
    Event,
    PromptScored,
    ReasoningDelta,
    TextToken,
    ToolCallArguments,
    ToolCallStart,
    TurnFinished,
)
from freehold.serve.wire import decode
from freehold.types import TokenLogprobs, Usage

REPLY = Reply("chatcmpl-1", 5, "glm")
USAGE = Usage(prompt_tokens=10, completion_tokens=7, cached_tokens=4, draft_proposed=5, draft_accepted=3)
END = TurnFinished("stop", USAGE, reasoning_tokens=2)


def messages(*items: dict[str, Any]) -> Any:
    return decode({"messages": list(items)}, ChatRequest, "chat").value.messages


def tool(name: str) -> schema.Tool:
    return schema.Tool(type="function", function=schema.FunctionSpec(name=name))


# ---- request → turn ----------------------------------------------------------------------------------------


def test_messages_become_plain_dicts_without_what_was_not_given() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    given = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ]
    system, assistant, result = message_dicts(messages(*given))
    assert system == given[0]
    assert assistant["content"] is None
    assert assistant["tool_calls"][0]["function"] == call["function"]
    assert "reasoning_content" not in assistant
    assert result == given[2]


def test_both_names_of_reasoning_are_one() -> None:
    for names in (["reasoning"], ["reasoning_content"], ["reasoning", "reasoning_content"]):
        (found,) = message_dicts(messages({"role": "assistant", "content": "x", **dict.fromkeys(names, "why")}))
        assert found["reasoning_content"] == "why"
        assert "reasoning" not in found
    with pytest.raises(InvalidRequest, match=r"messages\[0\].reasoning differs"):
        message_dicts(messages({"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"}))


def test_allowed_tools_are_the_only_ones_left() -> None:
    reference = schema.ToolReference(type="function", function=schema.FunctionName(name="b"))
    choice = schema.AllowedToolsChoice(allowed_tools=schema.AllowedTools(mode="required", tools=[reference]))
    tools, mode = choose_tools([tool("a"), tool("b")], choice)
    assert [t.function.name for t in tools] == ["b"]
    assert mode == "required"
    with pytest.raises(InvalidRequest, match="'b', which is not in tools"):
        choose_tools([tool("a")], choice)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("none", "none"),
        ("required", "required"),
        (schema.NamedToolChoice(function=schema.FunctionName(name="a")), ("named", "a")),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    assert choose_tools([tool("a")], choice)[1] == expected


def test_thinking_is_another_word_for_template_kwargs() -> None:
    off = schema.Thinking(type="disabled", clear_thinking=True)
    assert template_kwargs(None, off) == {"enable_thinking": False, "clear_thinking": True}
    assert template_kwargs({"enable_thinking": False, "x": 1}, off)["x"] == 1
    with pytest.raises(InvalidRequest, match="thinking contradicts"):
        template_kwargs({"enable_thinking": True}, off)


# ---- events → bodies ---------------------------------------------------------------------------------------


def token(text: str, *top: tuple[str, float]) -> TextToken:
    ids = tuple((index, logprob) for index, (_, logprob) in enumerate(top, 100))
    return TextToken(
        text,
        text.encode(),
        TokenLogprobs(7, -0.5, 2, ids),
        tuple((other, other.encode(), logprob) for other, logprob in top),
    )


EVENTS: list[Event] = [
    PromptScored((None, token("p"))),
    ReasoningDelta("Hm", (token("Hm"),)),
    ContentDelta("He", (token("He", ("He", -0.1), ("Ho", float("-inf"))),)),
    ContentDelta("y", (token("y"),)),
    ToolCallStart(0, "call_1", "f"),
    ToolCallArguments(0, '{"a":'),
    ToolCallStart(1, "call_2", "g"),
    ToolCallArguments(0, "1}"),
    ToolCallArguments(1, "{}"),
]


async def stream(*events: Event) -> Any:
    for event in events:
        yield event


async def test_a_body_has_everything() -> None:
    body = await collect(Reply("chatcmpl-1", 5, "glm", logprobs=True), [stream(*EVENTS, END)])
    (choice,) = body.choices
    message = msgspec.to_builtins(choice.message)
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("Hey", "Hm", "Hm")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"a":1}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert choice.logprobs is not None
    assert [entry.token for entry in choice.logprobs.content or ()] == ["He", "y"]
    assert body.prompt_logprobs == [None, {"7": schema.PromptLogprob(-0.5, 2, "p")}]
    assert msgspec.to_builtins(body.usage) == {
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {
            "reasoning_tokens": 2,
            "accepted_prediction_tokens": 3,
            "rejected_prediction_tokens": 2,
        },
    }


async def test_content_is_null_only_beside_calls() -> None:
    empty = await collect(REPLY, [stream(END)])
    assert empty.choices[0].message.content == ""
    calls = await collect(REPLY, [stream(ToolCallStart(0, "c", "f"), END)])
    assert calls.choices[0].message.content is None


async def test_half_an_answer_is_not_passed_off_as_a_whole_one() -> None:
    with pytest.raises(Unavailable):
        await collect(REPLY, [stream(ContentDelta("He"), TurnFinished("abort", Usage()))])
    with pytest.raises(Unavailable):
        ChunkWriter(REPLY, with_usage=False).frame(0, TurnFinished("abort", Usage()))


def test_chunks_are_what_the_document_says() -> None:
    strict = msgspec.json.Decoder(schema.ChatChunk, strict=True)
    writer = ChunkWriter(REPLY, with_usage=True)
    frames = b"".join(writer.frame(0, event) for event in [*EVENTS, END]) + writer.usage_frame() + DONE
    *data, done, rest = frames.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [strict.decode(line.removeprefix("data: ")) for line in data]
    role, *middle, finish, usage = chunks
    assert msgspec.to_builtins(role.choices[0].delta) == {"role": "assistant", "content": ""}
    deltas = [msgspec.to_builtins(chunk.choices[0].delta) for chunk in middle]
    assert deltas[0] == {"reasoning_content": "Hm", "reasoning": "Hm"}
    assert deltas[3] == {
        "tool_calls": [{"index": 0, "function": {"arguments": "", "name": "f"}, "id": "call_1", "type": "function"}]
    }
    assert deltas[4] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}
    assert finish.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None


def test_numbers_stay_json() -> None:
    assert finite(float("-inf")) == -9999.0
    assert finite(-0.25) == -0.25


def test_prompt_logprobs_have_the_prompts_own_token_first() -> None:
    (first, entry) = prompt_logprobs_body([None, token("x", ("a", -0.1), ("b", -0.2))])
    assert first is None
    assert list((entry or {}).items()) == [
        ("7", schema.PromptLogprob(-0.5, 2, "x")),
        ("100", schema.PromptLogprob(-0.1, 1, "a")),
        ("101", schema.PromptLogprob(-0.2, 2, "b")),
    ]
    assert [len(position or ()) for position in prompt_logprobs_body([token("x", ("a", -0.1))], 0)] == [1]


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    usage = Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=2, draft_proposed=4, draft_accepted=1)
    body = usage_body([usage], [(usage, 1), (usage, 2)])
    assert (body.prompt_tokens, body.completion_tokens, body.total_tokens) == (10, 6, 16)
    assert body.completion_tokens_details.reasoning_tokens == 3
    assert body.completion_tokens_details.accepted_prediction_tokens == 2
    assert body.completion_tokens_details.rejected_prediction_tokens == 6
