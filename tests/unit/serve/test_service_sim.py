"""The services in front of the simulated engine: whole conversations in GLM's grammar, with faults and speculation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from freehold.engine.async_engine import AsyncEngine
from freehold.engine.guide import GuideCompiler
from freehold.engine.sim import SimConfig, build_sim_engine
from freehold.errors import EngineError
from freehold.model.chat.template import ChatTemplate
from freehold.serve.service import ChatService
from freehold.serve.turn import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    Turn,
    TurnFinished,
)
from freehold.types import SamplingParams

PARAMS = SamplingParams(max_tokens=2000)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "deep": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
    "required": ["city", "days", "deep"],
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@asynccontextmanager
async def sim_chat(profile: str = "glm-5.2", **config: Any) -> AsyncIterator[ChatService]:
    """A chat service on a running simulation, which must have nothing left over in the end."""
    engine, tokenizer = build_sim_engine(SimConfig(**config))
    front = AsyncEngine(engine)
    await front.start()
    try:
        guides = GuideCompiler(tokenizer, engine.config.eos_token_ids)
        yield ChatService(front, tokenizer, ChatTemplate.builtin(profile), guides)
        await front.drain(5)
        stats = front.stats()
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
    finally:
        await front.close()


class Answer:
    """The events of a turn summed up, as a message that can be sent back."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
        self.content = "".join(e.text for e in events if isinstance(e, ContentDelta))
        self.calls = [
            {
                "id": start.id,
                "type": "function",
                "function": {
                    "name": start.name,
                    "arguments": "".join(
                        e.fragment for e in events if isinstance(e, ToolCallArguments) and e.index == start.index
                    ),
                },
            }
            for start in events
            if isinstance(start, ToolCallStart)
        ]
        assert isinstance(events[-1], TurnFinished)
        self.finish = events[-1]

    @property
    def message(self) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": self.content or None,
            "reasoning_content": self.reasoning,
            "tool_calls": self.calls,
        }


async def drain(events: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in events]


async def ask(chat: ChatService, *messages: dict[str, Any], request_id: str = "r", **fields: Any) -> Answer:
    prepared = chat.prepare(Turn(**{"messages": messages, "params": PARAMS, **fields}))
    return Answer(await drain(chat.run(prepared, request_id=request_id)))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def test_reasoning_then_content() -> None:
    async with sim_chat() as chat:
        for index, effort in enumerate(("none", "high", "max")):
            answer = await ask(chat, user("Tell me a story"), effort=effort, request_id=effort)
            assert bool(answer.reasoning) == (index > 0)
            assert (answer.finish.reasoning_tokens > 0) == (index > 0)
            assert answer.finish.reasoning_tokens < answer.finish.usage.completion_tokens
            assert answer.content
            assert "<" not in answer.reasoning + answer.content
            assert answer.finish.reason == "stop"


@pytest.mark.parametrize("profile", ["glm-5.2", "glm-5.3"])
async def test_an_agent_loop(profile: str) -> None:
    async with sim_chat(profile) as chat:
        first = await ask(chat, user("What is the weather in 北京?"), tools=(TOOL, NOW))
        assert first.finish.reason == "tool_calls"
        for call in first.calls:
            assert set(json.loads(call["function"]["arguments"])) in ({"city", "days", "deep"}, set())
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "21C"} for call in first.calls]
        history = (user("What is the weather in 北京?"), first.message, *reversed(results))
        second = await ask(chat, *history, tools=(TOOL, NOW), request_id="r2")
        assert second.content
        assert second.finish.reason == "stop"


async def test_a_call_inside_thinking_ends_it() -> None:
    async with sim_chat() as chat:
        answer = await ask(chat, user("weather [[sim unclosed]]"), tools=(TOOL,))
        assert answer.reasoning
        assert answer.content == ""
        assert answer.calls
        assert answer.finish.reason == "tool_calls"


async def test_speculation_changes_no_text() -> None:
    found = []
    for drafts in (0, 4):
        async with sim_chat(num_draft_tokens=drafts) as chat:
            answer = await ask(chat, user("What is the weather in 北京?"), tools=(TOOL, NOW))
            calls = [call["function"] for call in answer.calls]
            found.append((answer.reasoning, answer.content, calls, answer.finish.usage.completion_tokens))
            assert (answer.finish.usage.draft_proposed > 0) == (drafts > 0)
    assert found[0] == found[1]


async def test_structures_are_kept() -> None:
    async with sim_chat() as chat:
        answer = await ask(
            chat,
            user("json"),
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        )
        assert set(json.loads(answer.content)) == {"city", "days", "deep"}
        named = await ask(chat, user("hi"), tools=(TOOL, NOW), tool_choice=("named", "now"), request_id="r2")
        assert [call["function"] for call in named.calls] == [{"name": "now", "arguments": "{}"}]
        assert named.finish.reason == "tool_calls"


async def test_a_failure_comes_after_the_text_before_it() -> None:
    async with sim_chat() as chat:
        prepared = chat.prepare(Turn(messages=(user("hi [[sim error after=3]]"),), params=PARAMS))
        events = chat.run(prepared, request_id="r")
        assert isinstance(await anext(events), ReasoningDelta)
        with pytest.raises(EngineError, match="simulated failure"):
            await drain(events)


async def test_many_at_once_and_some_leave() -> None:
    async with sim_chat(num_draft_tokens=2) as chat:
        alone = await ask(chat, user("Tell me a story"))
        prepared = chat.prepare(Turn(messages=(user("Tell me a story"),), params=PARAMS))

        async def one(index: int) -> list[Event]:
            events = chat.run(prepared, request_id=f"{index}")
            if index % 4 == 0:
                await anext(events)
                await events.aclose()
                return []
            return await drain(events)

        for events in await asyncio.gather(*map(one, range(64))):
            if events:
                assert (Answer(events).reasoning, Answer(events).content) == (alone.reasoning, alone.content)
