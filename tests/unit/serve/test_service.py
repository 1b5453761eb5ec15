"""Turns and completions from end to end: a real engine, scripted tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from freehold.engine.guide import GuideCompiler
from freehold.errors import (
    ContextTooLong,
    EngineError,
    InsufficientMemory,
    InvalidRequest,
    MissingExtra,
)
from freehold.model.chat.template import ChatTemplate
from freehold.serve.service import MAX_TOKENS, ChatService, CompletionService, TextDelta, TextEvent
from freehold.serve.turn import (
    ContentDelta,
    Event,
    PreparedTurn,
    PromptScored,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    Turn,
    TurnFinished,
)
from freehold.types import Guide, SamplingParams, Usage
from tests.unit.serve.scripted import END, TOY, ScriptedRunner, scripted_engine, special

HELLO = ({"role": "user", "content": "Hello"},)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>北京</arg_value></tool_call>"
GREEDY = SamplingParams(max_tokens=500, temperature=0.0)


def turn(**fields: Any) -> Turn:
    return Turn(**{"messages": HELLO, "params": GREEDY, **fields})


async def collect(events: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in events]


async def answer(runner: ScriptedRunner, asked: Turn, **sizes: int) -> tuple[list[Event], PreparedTurn]:
    async with scripted_engine(runner, **sizes) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin())
        prepared = chat.prepare(asked)
        return await collect(chat.run(prepared, request_id="r")), prepared


def told(events: list[Event]) -> tuple[str, str, list[tuple[str, Any]], str]:
    """Reasoning, content, calls with decoded arguments, and the finish reason."""
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [
        "".join(e.fragment for e in events if isinstance(e, ToolCallArguments) and e.index == i)
        for i in range(len(names))
    ]
    finished = events[-1]
    assert isinstance(finished, TurnFinished)
    assert sum(isinstance(event, TurnFinished) for event in events) == 1
    return (
        "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        "".join(event.text for event in events if isinstance(event, ContentDelta)),
        [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)],
        finished.reason,
    )


def finish(events: list[Event] | list[TextEvent]) -> TurnFinished:
    finished = events[-1]
    assert isinstance(finished, TurnFinished)
    return finished


@pytest.mark.parametrize("per_step", [1, 4])
async def test_a_turn_with_everything(per_step: int) -> None:
    script = f"I think 京</think>Let me see.\n{CALL}{CALL}"
    events, prepared = await answer(ScriptedRunner(script, per_step=per_step), turn(tools=(WEATHER,)))
    call = ("weather", {"city": "北京"})
    assert told(events) == ("I think 京", "Let me see.", [call, call], "tool_calls")
    assert TOY.decode(prepared.prompt_token_ids).endswith("<|user|>Hello<|assistant|><think>")
    assert prepared.thinking
    thought = len(TOY.encode("I think 京"))
    assert finish(events).reasoning_tokens == thought
    usage = finish(events).usage
    assert usage.prompt_tokens == len(prepared.prompt_token_ids)
    assert usage.completion_tokens == len(TOY.encode(script)) + 1, "the token that ended the turn counts"
    assert (usage.draft_proposed > 0) == (per_step > 1)


async def test_a_turn_without_thinking() -> None:
    events, prepared = await answer(ScriptedRunner("Hi <b>"), turn(effort="none"))
    assert told(events) == ("", "Hi <b>", [], "stop")
    assert finish(events).reasoning_tokens == 0
    assert (prepared.thinking, prepared.warnings) == (False, ())


async def test_end_tokens_never_show() -> None:
    for end in ("<|user|>", "<|observation|>", "<|endoftext|>"):
        events, _ = await answer(ScriptedRunner(f"t</think>a{end}b"), turn())
        assert told(events) == ("t", "a", [], "stop")
    events, _ = await answer(
        ScriptedRunner("t</think>a<|user|>b"), turn(params=replace(GREEDY, ignore_eos=True, max_tokens=9))
    )
    assert told(events) == ("t", "ab", [], "length")


async def test_a_stop_token_of_the_callers() -> None:
    stop = TOY.encode("!")[0]
    params = replace(GREEDY, stop_token_ids=(stop, special("</think>")))
    events, _ = await answer(ScriptedRunner("a!b"), turn(params=params))
    assert told(events) == ("a", "", [], "stop")
    events, _ = await answer(ScriptedRunner("a!b"), turn(params=params, include_stop=True))
    assert told(events) == ("a!", "", [], "stop")
    events, _ = await answer(ScriptedRunner("a</think>b"), turn(params=params, include_stop=True))
    assert told(events) == ("a", "", [], "stop")


@pytest.mark.parametrize("per_step", [1, 4, 5, 7])
async def test_a_stop_string_ends_the_request(per_step: int) -> None:
    script = "think</think>one two three " + "four " * 300
    events, _ = await answer(ScriptedRunner(script, per_step=per_step), turn(stop=("never", "o thr")))
    assert told(events) == ("think", "one tw", [], "stop")
    assert finish(events).stop_sequence == "o thr"
    last = next(n for n in range(99) if "o thr" in TOY.decode(TOY.encode(script)[:n]))
    assert finish(events).usage.completion_tokens == last
    events, _ = await answer(ScriptedRunner(script), turn(stop=("o thr",), include_stop=True))
    assert told(events)[1] == "one two thr"


async def test_a_stop_string_frees_the_engine_before_the_last_event() -> None:
    async with scripted_engine(ScriptedRunner("one two " + "three " * 900, seconds=0.002)) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin())
        events = chat.run(chat.prepare(turn(stop=("two",), params=replace(GREEDY, max_tokens=2000))), request_id="r")
        async for event in events:
            if isinstance(event, TurnFinished):
                break
        for _ in range(500):
            if engine.stats().running == 0:
                break
            await asyncio.sleep(0.001)
        assert engine.stats().finished.get("abort") == 1
        await events.aclose()


async def test_stop_strings_are_matched_in_reasoning_too() -> None:
    events, _ = await answer(ScriptedRunner("think</think>a"), turn(stop=("ink</thi",)))
    assert told(events) == ("th", "", [], "stop")


async def test_length() -> None:
    asked = turn(params=replace(GREEDY, max_tokens=4))
    events, _ = await answer(ScriptedRunner("a b c d e f g"), asked)
    assert told(events)[3] == "length"
    assert finish(events).usage.completion_tokens == 4


@pytest.mark.parametrize("length", range(1, len(TOY.encode(CALL)) + 2))
async def test_a_call_cut_by_length_has_valid_arguments_and_is_not_to_be_run(length: int) -> None:
    asked = turn(tools=(WEATHER,), effort="none", params=replace(GREEDY, max_tokens=length))
    reasoning, content, calls, reason = told((await answer(ScriptedRunner(CALL), asked))[0])
    assert (reasoning, content) == ("", "")
    assert reason == ("length" if length <= len(TOY.encode(CALL)) else "tool_calls")
    for name, found in calls:  # a cut character is the mark for one, as in any text
        assert (name, "北京".startswith(found.get("city", "").rstrip("\ufffd"))) == ("weather", True)


async def test_a_call_cut_by_a_stop_string_is_not_to_be_run() -> None:
    events, _ = await answer(ScriptedRunner(CALL + CALL), turn(tools=(WEATHER,), effort="none", stop=("京",)))
    assert told(events) == ("", "", [("weather", {"city": "北"})], "stop")


async def test_a_call_that_the_model_ends_with_its_turn() -> None:
    script = "<tool_call>weather<arg_key>city</arg_key><arg_value>x<|observation|>"
    events, _ = await answer(ScriptedRunner(script), turn(tools=(WEATHER,)))
    assert told(events) == ("", "", [("weather", {"city": "x"})], "tool_calls")


async def test_one_call_only() -> None:
    runner = ScriptedRunner("</think>" + CALL * 50, per_step=3)
    events, _ = await answer(runner, turn(tools=(WEATHER,), parallel_tool_calls=False))
    assert told(events) == ("", "", [("weather", {"city": "北京"})], "tool_calls")
    assert finish(events).usage.completion_tokens == len(TOY.encode("</think>" + CALL))


async def test_tool_choice_none_shows_no_tools() -> None:
    events, prepared = await answer(ScriptedRunner(CALL), turn(tools=(WEATHER,), tool_choice="none", effort="none"))
    assert "weather" not in TOY.decode(prepared.prompt_token_ids)
    assert told(events) == ("", CALL, [], "stop")


async def test_logprobs_go_with_their_text() -> None:
    runner = ScriptedRunner("a京</think>b c" + CALL, per_step=3)
    events, _ = await answer(runner, turn(tools=(WEATHER,), params=replace(GREEDY, logprobs=1)))
    for kind, text in ((ReasoningDelta, "a京"), (ContentDelta, "b c")):
        tokens = [token for event in events if isinstance(event, kind) for token in event.tokens]
        assert b"".join(token.bytes_ for token in tokens) == text.encode()
        assert all(token.top_text == ((token.text, token.bytes_, token.logprobs.logprob),) for token in tokens)
        assert [token.logprobs.token_id for token in tokens] == TOY.encode(text)
    plain, _ = await answer(runner, turn(tools=(WEATHER,)))
    assert not any(event.tokens for event in plain if isinstance(event, ReasoningDelta | ContentDelta))


async def test_prompt_logprobs_come_first() -> None:
    events, prepared = await answer(ScriptedRunner("a"), turn(params=replace(GREEDY, prompt_logprobs=0)))
    scored = events[0]
    assert isinstance(scored, PromptScored)
    assert scored.tokens[0] is None
    text = b"".join(token.bytes_ for token in scored.tokens if token)
    assert text == TOY.decode(prepared.prompt_token_ids[1:]).encode()


async def test_a_failure_is_raised_after_what_came_before() -> None:
    async with scripted_engine(ScriptedRunner("x1</think>y2", fail_after=4)) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin())
        events = chat.run(chat.prepare(turn()), request_id="r")
        seen = []

        async def read() -> None:
            async for event in events:
                seen.append(event)  # noqa: PERF401  what came is wanted, though it ends in an error

        with pytest.raises(EngineError, match="internal error"):
            await read()
        assert "".join(event.text for event in seen if isinstance(event, ReasoningDelta)) == "x1"
        assert "".join(event.text for event in seen if isinstance(event, ContentDelta)) == "y"
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_seeds_differ_between_answers() -> None:
    runner = ScriptedRunner("a")
    async with scripted_engine(runner) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin())
        for seed, offset in ((7, 0), (7, 2), (None, 2)):
            prepared = chat.prepare(turn(params=replace(GREEDY, seed=seed)))
            await collect(chat.run(prepared, request_id=f"{seed} {offset}", seed_offset=offset))
    assert {name: params.seed for name, params in runner.params.items()} == {"7 0": 7, "7 2": 9, "None 2": None}


async def test_closing_aborts() -> None:
    async with scripted_engine(ScriptedRunner("a " * 4000, seconds=0.002)) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin())
        prepared = chat.prepare(turn(params=replace(GREEDY, max_tokens=3000)))
        unread, closed, cancelled = (chat.run(prepared, request_id=name) for name in "abc")
        await unread.aclose()
        await anext(closed)
        await closed.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(closed)
        task = asyncio.create_task(collect(cancelled))
        await asyncio.sleep(0)  # it has begun; later it might have ended
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del unread
        thrown = chat.run(prepared, request_id="d")
        with pytest.raises(KeyError):
            await thrown.athrow(KeyError())
        assert engine.stats().finished.get("length", 0) == 0


async def test_an_engine_that_stops_ends_the_turn() -> None:
    async with scripted_engine(ScriptedRunner("a " * 4000, seconds=0.002)) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin())
        events = chat.run(chat.prepare(turn(params=replace(GREEDY, max_tokens=3000))), request_id="r")
        await anext(events)
        engine.abort("r")
        assert finish(await collect(events)).reason == "abort"


# -- prepare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "room"),
    [
        ({"max_model_len": 200, "num_blocks": 512}, lambda prompt: 200 - prompt),
        ({"max_model_len": 4096, "num_blocks": 10}, lambda prompt: 160 - prompt),
        ({"max_model_len": 1 << 20, "num_blocks": 1 << 17}, lambda prompt: MAX_TOKENS),
    ],
)
async def test_max_tokens_left_open(sizes: dict[str, int], room: Any) -> None:
    asked = turn(params=replace(GREEDY, max_tokens=1), max_tokens_given=False)
    events, prepared = await answer(ScriptedRunner("a"), asked, **sizes)
    assert prepared.params.max_tokens == room(len(prepared.prompt_token_ids))
    assert told(events)[3] == "stop"


async def test_no_room_for_an_answer() -> None:
    long = ({"role": "user", "content": "word " * 100},)
    with pytest.raises(ContextTooLong, match="shorten the prompt"):
        await answer(ScriptedRunner("a"), turn(messages=long, max_tokens_given=False), max_model_len=64)
    with pytest.raises(ContextTooLong):
        await answer(ScriptedRunner("a"), turn(messages=long), max_model_len=64)
    with pytest.raises(InsufficientMemory, match="bytes"):
        await answer(ScriptedRunner("a"), turn(messages=long, max_tokens_given=False), num_blocks=2)


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: object, **__: object) -> list[int]:
        raise AssertionError("tokenised")

    runner = ScriptedRunner("a")
    monkeypatch.setattr(TOY, "encode", encode)
    long = ({"role": "user", "content": "word " * 10_000},)
    with pytest.raises(ContextTooLong, match=r"has 50,\d+ bytes, which are at least [\d,]+ tokens") as caught:
        await answer(runner, turn(messages=long), max_model_len=64)
    assert caught.value.param == "messages"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("fields", "kind", "details"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", {}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "json_schema",
            {"schema": SCHEMA},
        ),
        ({"response_format": {"type": "text"}}, None, {}),
        ({"tools": (WEATHER, NOW), "tool_choice": "auto"}, None, {}),
        ({"tools": (WEATHER, NOW), "tool_choice": "required"}, "tool_call", {"parallel": True}),
        (
            {"tools": (WEATHER, NOW), "tool_choice": "required", "parallel_tool_calls": False},
            "tool_call",
            {"parallel": False},
        ),
        ({"tools": (WEATHER, NOW), "tool_choice": ("named", "now")}, "tool_call", {"parallel": False}),
        (
            {"tools": (WEATHER,), "tool_choice": "none", "response_format": {"type": "json_object"}},
            "json_object",
            {},
        ),
        (
            {"tools": (WEATHER,), "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_call",
            {},
        ),
    ],
)
@pytest.mark.parametrize("effort", [None, "none"])
async def test_structures(
    fields: dict[str, Any], kind: str | None, details: dict[str, Any], effort: str | None
) -> None:
    async with scripted_engine(ScriptedRunner("a")) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin(), GuideCompiler(TOY, (END,)))
        guide = chat.prepare(turn(**fields, effort=effort)).params.guide
        if kind is None:
            assert guide is None
            return
        assert isinstance(guide, Guide)
        assert (guide.kind, guide.thinking) == (kind, effort is None)
        assert {name: getattr(guide, name) for name in details} == details
        if kind == "tool_call":
            named = isinstance(fields["tool_choice"], tuple)
            assert [tool.name for tool in guide.tools] == (
                ["now"] if named else [t["function"]["name"] for t in fields["tools"]]
            )
        with pytest.raises(MissingExtra, match="pip install") as caught:
            ChatService(engine, TOY, ChatTemplate.builtin()).prepare(turn(**fields))
        assert caught.value.param == ("tool_choice" if kind == "tool_call" else "response_format")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tool_choice": ("named", "x"), "tools": (NOW,)}, "tool_choice", "'x'"),
        ({"tools": (NOW,), "response_format": {"type": "json_object"}}, "response_format", "tool_choice 'none'"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "'grammar'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}},
            "response_format",
            "'strange'",
        ),
        ({"effort": "extreme"}, "reasoning_effort", "extreme"),
        ({"template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "'x'"),
        ({"messages": ()}, "messages", "at least one"),
    ],
)
async def test_what_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    async with scripted_engine(ScriptedRunner("a")) as engine:
        chat = ChatService(engine, TOY, ChatTemplate.builtin(), GuideCompiler(TOY, (END,)))
        with pytest.raises(InvalidRequest, match=words) as caught:
            chat.prepare(turn(**fields))
        assert caught.value.param == param


async def test_warnings() -> None:
    strict = {"type": "function", "function": {"name": "now", "strict": True}}
    _, prepared = await answer(ScriptedRunner("a"), turn(tools=(strict,), effort="low"))
    assert [warning.split()[0] for warning in prepared.warnings] == ["reasoning_effort", "tools.function.strict"]


async def test_the_service_knows_its_model() -> None:
    async with scripted_engine(ScriptedRunner("a")) as engine:
        assert ChatService(engine, TOY, ChatTemplate.builtin()).model_name == "scripted"


# -- completions -------------------------------------------------------------------------------------------------------


async def complete(runner: ScriptedRunner, params: SamplingParams = GREEDY, **options: Any) -> list[TextEvent]:
    async with scripted_engine(runner) as engine:
        service = CompletionService(engine, TOY)
        return [event async for event in service.run(TOY.encode("Once"), params, request_id="r", **options)]


def text(events: list[TextEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_completion_text_is_as_generated() -> None:
    events = await complete(ScriptedRunner("a<think>b</think>c京" + CALL + "[gMASK]d"))
    assert text(events) == "a<think>b</think>c京" + CALL + "d"
    assert finish(events).reason == "stop"


@pytest.mark.parametrize("per_step", [1, 4])
async def test_completion_stops(per_step: int) -> None:
    runner = ScriptedRunner("one two three", per_step=per_step)
    events = await complete(runner, stop=("two",))
    assert text(events) == "one "
    assert (finish(events).reason, finish(events).stop_sequence) == ("stop", "two")
    assert text(await complete(runner, stop=("two",), include_stop=True)) == "one two"
    events = await complete(runner, replace(GREEDY, max_tokens=2))
    assert finish(events).reason == "length"
    assert finish(events).usage.completion_tokens == 2


async def test_echo_and_prompt_logprobs_come_first() -> None:
    assert await complete(ScriptedRunner(""), echo=True) == [
        TextDelta("Once"),
        TurnFinished("stop", Usage(len(TOY.encode("Once")), 1)),
    ]
    params = replace(GREEDY, logprobs=0, prompt_logprobs=1)
    for echo in (True, False):
        events = await complete(ScriptedRunner("a b"), params, echo=echo)
        first = events[0]
        assert isinstance(first, TextDelta)
        assert first.text == ("Once" if echo else "")
        assert first.prompt is not None
        assert first.prompt[0] is None
        ids = TOY.encode("Once")
        assert [token and (token.bytes_, token.logprobs.logprob) for token in first.prompt[1:]] == [
            (TOY.token_bytes(id_), -float(n)) for n, id_ in enumerate(ids[1:], 1)
        ]
        assert all(event.prompt is None for event in events[1:] if isinstance(event, TextDelta))
        tokens = [token for event in events if isinstance(event, TextDelta) for token in event.tokens]
        assert b"".join(token.bytes_ for token in tokens) == b"a b"


async def test_scoring_generates_nothing() -> None:
    events = await complete(ScriptedRunner("a"), replace(GREEDY, max_tokens=0, prompt_logprobs=0), echo=True)
    assert text(events) == "Once"
    assert (finish(events).reason, finish(events).usage.completion_tokens) == ("length", 0)


async def test_completion_guides_need_a_compiler() -> None:
    with pytest.raises(MissingExtra):
        await complete(ScriptedRunner("a"), replace(GREEDY, guide=Guide("json_object")))
