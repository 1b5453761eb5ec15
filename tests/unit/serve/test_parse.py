"""The stream parser: what each kind of output means. Splitting is tested in tests/property."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import count
from typing import Any

import pytest

from freehold.serve.parse import TAGS, StreamParser
from freehold.serve.turn import ContentDelta, Event, ReasoningDelta, TextToken, ToolCallArguments, ToolCallStart
from freehold.types import TokenLogprobs, ToolSpec

TOOLS = (
    ToolSpec("now", {}),
    ToolSpec(
        "get_weather",
        {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    ),
)
SPACED = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>a\nb </arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
CITY = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>北京</arg_value></tool_call>"


def split(text: str, tags: Iterable[str] = TAGS) -> list[tuple[str, bool]]:
    """Text as a tokenizer that has the tags as control tokens would cut it."""
    import re

    parts = re.split("(" + "|".join(map(re.escape, tags)) + r"|<\|\w+\|>)", text)
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


class Result:
    """Events summed up: the texts, and the calls as (name, arguments text)."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = list(events)
        self.reasoning = "".join(e.text for e in self.events if isinstance(e, ReasoningDelta))
        self.content = "".join(e.text for e in self.events if isinstance(e, ContentDelta))
        self.calls: list[tuple[str, str]] = []
        for event in self.events:
            if isinstance(event, ToolCallStart):
                assert event.index == len(self.calls)
                self.calls.append((event.name, ""))
            if isinstance(event, ToolCallArguments):
                assert event.index == len(self.calls) - 1
                self.calls[-1] = (self.calls[-1][0], self.calls[-1][1] + event.fragment)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Result) and vars(self) | {"events": 0} == vars(other) | {"events": 0}

    def __repr__(self) -> str:
        return f"Result({self.reasoning!r}, {self.content!r}, {self.calls!r})"


def parse(
    text: str,
    *,
    thinking: bool = False,
    tools: tuple[ToolSpec, ...] = TOOLS,
    cut: bool = False,
    as_text: bool,
    **options: Any,
) -> Result:
    """Parse with tags as text, one character at a time, or as control tokens."""
    ids = count()
    parser = StreamParser(
        thinking, tools, text_tags=TAGS if as_text else (), new_id=lambda: f"id{next(ids)}", **options
    )
    pieces = [(char, False) for char in text] if as_text else split(text)
    events = [event for piece, control in pieces for event in parser.feed(piece, control=control)]
    return Result([*events, *parser.finish(cut=cut)])


@pytest.fixture(params=[True, False], ids=["text", "control"])
def as_text(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content", "calls"),
    [
        ("thought</think>answer", True, "thought", "answer", []),
        ("answer", False, "", "answer", []),
        ("<think></think>answer", True, "", "answer", []),
        ("all thought", True, "all thought", "", []),
        ("a<think>b</think>c", False, "b", "ac", []),
        ("a</think>b", False, "", "ab", []),
        ("\n a \n", False, "", "\n a \n", []),
        (" \n", False, "", " \n", []),
        ("t\n</think>\n\nanswer", True, "t\n", "\n\nanswer", []),
        (CITY, False, "", "", [("get_weather", '{"city": "北京"}')]),
        ("t</think>" + CITY, True, "t", "", [("get_weather", '{"city": "北京"}')]),
        ("t" + CITY, True, "t", "", [("get_weather", '{"city": "北京"}')]),
        ("<tool_call>now</tool_call>", False, "", "", [("now", "{}")]),
        ("<tool_call>\nnow\n</tool_call>\n", False, "", "", [("now", "{}")]),
        ("x\n" + CITY + "\n" + CITY + "\n", False, "", "x", [("get_weather", '{"city": "北京"}')] * 2),
        ("a " + CITY + " b", False, "", "a b", [("get_weather", '{"city": "北京"}')]),
        (SPACED, False, "", "", [("get_weather", '{"city": "a\\nb ", "days": 3}')]),
    ],
)  # fmt: skip
def test_turns(
    text: str, thinking: bool, reasoning: str, content: str, calls: list[tuple[str, str]], as_text: bool
) -> None:
    found = parse(text, thinking=thinking, as_text=as_text)
    assert (found.reasoning, found.content, found.calls) == (reasoning, content, calls)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"a{CITY} \n", "a"),
        (f"a{CITY} b \n", "a b \n"),
        (f"a{' ' * 32}{CITY}{' ' * 32}b", f"a{' ' * 32}b"),
        (f"a{' ' * 33}{CITY}{' ' * 33}{CITY}", f"a{' ' * 66}"),
        (f" {CITY}{' ' * 40}\n\n<tool_call>rm</tool_call> {CITY}", f"{' ' * 40}\n\n<tool_call>rm</tool_call>"),
    ],
)
def test_white_space_around_calls(text: str, content: str, as_text: bool) -> None:
    assert parse(text, as_text=as_text).content == content


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>rm_rf<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>",
        "<tool_call>get_weath</tool_call>",
        "<tool_call>get_weather 2</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>rm_rf<think></tool_call>",
        "\n<tool_call>rm_rf</tool_call>",
        "<tool_call>rm_rf",
    ],
)
def test_calls_of_undeclared_tools_are_content(text: str, as_text: bool) -> None:
    found = parse(text, as_text=as_text)
    assert (found.content, found.calls) == (text, [])
    assert parse("t" + text, thinking=True, as_text=as_text).reasoning == "t" + text[: text.index("<")]


def test_a_declared_call_after_an_undeclared_one(as_text: bool) -> None:
    other = "<tool_call>rm_rf<arg_key>"
    found = parse(other + "<tool_call>now</tool_call>", as_text=as_text)
    assert (found.content, found.calls) == (other, [("now", "{}")])


def test_without_tools_nothing_is_a_call(as_text: bool) -> None:
    assert parse("a" + CITY, tools=(), as_text=as_text).content == "a" + CITY
    assert parse("a" + CITY + "</think>b", tools=(), thinking=True, as_text=as_text).reasoning == "a" + CITY


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ("<arg_key>a</arg_key><arg_value>1<tool_call>", {"a": "1<tool_call>"}),
        ("<arg_key>a</arg_key><arg_value>1", {"a": 1}),
        ("<arg_key>a<arg_value>1</arg_value>", {"a": 1}),
        ("<arg_key>a</arg_key>", {}),
        ("<arg_key>a", {}),
        ("<arg_key>a</arg_key>x<arg_key>b</arg_key>y<arg_value>1</arg_value>z", {"b": 1}),
        ("<arg_key>a</arg_key><arg_value>x<arg_key></arg_value>", {"a": "x<arg_key>"}),
    ],
)
def test_malformed_arguments(inside: str, arguments: dict[str, Any], as_text: bool) -> None:
    found = parse(f"<tool_call>now{inside}</tool_call>b", as_text=as_text)
    assert [(name, json.loads(written)) for name, written in found.calls] == [("now", arguments)]
    assert found.content == "b"


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        ("<tool_call>now<tool_call>now</tool_call>", ["{}", "{}"], ""),
        ("<tool_call>now<arg_key>a</arg_key><arg_value>1</arg_value><tool_call>now", ['{"a": 1}', "{}"], ""),
        ("</tool_call>a</arg_value>", [], "</tool_call>a</arg_value>"),
    ],
)
def test_malformed_calls(text: str, calls: list[str], content: str, as_text: bool) -> None:
    found = parse(text, as_text=as_text)
    assert (found.calls, found.content) == ([("now", arguments) for arguments in calls], content)


def test_every_cut_leaves_valid_arguments(as_text: bool) -> None:
    text = (
        't</think>a <tool_call>get_weather<arg_key>city</arg_key><arg_value>北\\"京</arg_value>'
        "<arg_key>days</arg_key><arg_value>12</arg_value></tool_call><tool_call>now</tool_call>"
    )
    pieces = list(text) if as_text else [part for part, _ in split(text)]
    seen = set()
    for end in range(len(pieces) + 1):
        found = parse("".join(pieces[:end]), thinking=True, cut=True, as_text=as_text)
        for name, arguments in found.calls:
            whole = {"city": '北\\"京', "days": 12} if name == "get_weather" else {}
            written = json.loads(arguments)
            assert all(
                (key == "city" and whole[key].startswith(value)) or whole[key] == value
                for key, value in written.items()
            )
        assert "<" not in found.reasoning + found.content
        seen.add((len(found.calls), len(json.loads(found.calls[0][1])) if found.calls else 0))
    assert seen == {(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)}


@pytest.mark.parametrize(
    ("text", "cut", "is_cut"),
    [(CITY, True, False), (CITY[:-3], True, True), (CITY[:-12], False, False), ("a", True, False)],
)
def test_whether_a_call_was_cut_is_known(text: str, cut: bool, is_cut: bool) -> None:
    parser = StreamParser(False, TOOLS)
    parser.feed(text)
    parser.finish(cut=cut)
    assert parser.is_cut == is_cut


def test_one_call_only(as_text: bool) -> None:
    found = parse("a" + CITY + "b" + CITY, parallel=False, as_text=as_text)
    assert (found.content, len(found.calls)) == ("a", 1)
    parser = StreamParser(False, TOOLS, parallel=False)
    parser.feed(CITY[:-1])
    assert not parser.done
    parser.feed(">")
    assert parser.done
    assert parser.feed("more") == parser.finish() == []


def test_names_are_whole_and_arguments_stream() -> None:
    parser = StreamParser(False, TOOLS, text_tags=(), new_id=lambda: "id")
    assert parser.feed("<tool_call>", control=True) == parser.feed("get_") == parser.feed("weather") == []
    assert parser.feed("<arg_key>", control=True) == [ToolCallStart(0, "id", "get_weather")]
    for text, control in (("city", False), ("</arg_key>", True), ("<arg_value>", True)):
        assert parser.feed(text, control=control) == []
    assert parser.feed("北") == [ToolCallArguments(0, '{"city": "北')]
    assert parser.feed("京") == [ToolCallArguments(0, "京")]


def test_text_that_looks_like_a_tag_is_text_where_tags_are_control_tokens() -> None:
    parser = StreamParser(True, TOOLS, text_tags=())
    assert Result(parser.feed(CITY + "</think>")).reasoning == CITY + "</think>"


def test_other_control_tokens_are_dropped_from_text_and_kept_in_arguments() -> None:
    text = f"<|user|>a<|box|></think>b<|user|>{CITY.replace('北京', 'x<|user|>')}<|observation|>"
    found = parse(text, thinking=True, as_text=False)
    assert (found.reasoning, found.content) == ("a", "b")
    assert found.calls == [("get_weather", '{"city": "x<|user|>"}')]


def test_ids_are_unique_and_look_like_those_of_openai() -> None:
    events = StreamParser(False, TOOLS).feed(CITY + CITY)
    ids = [event.id for event in events if isinstance(event, ToolCallStart)]
    assert len(set(ids)) == 2
    assert all(id_.startswith("call_") and len(id_) == 29 for id_ in ids)


def token(text: str) -> TextToken:
    return TextToken(text, text.encode(), TokenLogprobs(0, -1.0, 1), ())


def test_tokens_go_with_the_text_they_are_part_of() -> None:
    parser = StreamParser(True, TOOLS, text_tags=())
    pieces = split("one two</think>three \n" + CITY + "four<tool_call>nope</tool_call>")
    events: list[Event] = []
    for text, control in pieces:
        for part in [text] if control else text.split(" "):
            events += parser.feed(part, control=control, starts=1, tokens=[token(part)])
    events += parser.finish()
    given_out = [[t.text for t in e.tokens] for e in events if isinstance(e, ReasoningDelta | ContentDelta)]
    assert given_out == [["one"], ["two"], ["three"], ["four"], ["<tool_call>", "nope"], ["</tool_call>"]]
    assert parser.reasoning_tokens == 2


def test_reasoning_tokens_are_those_between_the_tags() -> None:
    parser = StreamParser(True, TOOLS, text_tags=())
    for text, control in (("a", False), ("b", False), ("<think>", True), ("</think>", True), ("c", False)):
        parser.feed(text, control=control, starts=1)
    assert parser.reasoning_tokens == 3  # a second <think> inside thinking is a thought like any other
    parser.feed("<think>", control=True, starts=1)
    parser.feed("d", starts=2)
    parser.feed("<tool_call>", control=True, starts=1)
    assert parser.reasoning_tokens == 5
