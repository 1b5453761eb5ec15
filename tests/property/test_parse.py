"""However a generated turn is cut into tokens and pieces, the same comes out; and a rendered turn parses back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from freehold.model.chat.conversation import read_tools
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.serve.detokenize import Detokenizer
from freehold.serve.parse import TAGS, StreamParser
from freehold.serve.reader import TurnReader, merge
from freehold.serve.turn import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart, TurnFinished
from freehold.types import FinishReason, TokenChunk, ToolSpec, Usage

TOY = Tokenizer.toy(512)
MANY = settings(max_examples=max(300, settings().max_examples))  # the nightly profile has more
ANYTHING = {"type": ["object", "array", "number", "boolean", "null"]}
SCHEMA = {
    "type": "object",
    "properties": {"s": {"type": "string"}, "n": {"type": ["string", "null"]}, "j": ANYTHING, "i": {"type": "integer"}},
}
TOOLS = (ToolSpec("f", SCHEMA), ToolSpec("find", {}))

# Turns that are well formed, nearly so, and not at all.
words = st.sampled_from(
    [
        "f",
        "find",
        "fin",
        "g",
        "s",
        "n",
        "j",
        "i",
        "null",
        "nul",
        "12",
        '{"a": [1]}',
        " ",
        " " * 20,
        "\n",
        "京",
        "<",
        "</",
        'é\\"',
    ]
)
runs = st.sampled_from(["<tool_call>f<arg_key>s</arg_key><arg_value>", "</arg_value></tool_call>"])
turns = st.lists(st.one_of(words, st.sampled_from(TAGS), runs), max_size=14).map("".join)


def summary(events: Iterable[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    reasoning, content, calls = "", "", list[tuple[str, str]]()
    for event in events:
        match event:
            case ReasoningDelta():
                reasoning += event.text
            case ContentDelta():
                content += event.text
            case ToolCallStart():
                calls.append((event.name, ""))
            case ToolCallArguments():
                calls[event.index] = (calls[event.index][0], calls[event.index][1] + event.fragment)
    return reasoning, content, calls


def parse_text(pieces: Iterable[str], thinking: bool, cut: bool) -> tuple[str, str, list[tuple[str, str]]]:
    parser = StreamParser(thinking, TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return summary([*events, *parser.finish(cut=cut)])


def cuts(text: str, at: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(i % (len(text) + 1) for i in at)})
    return [text[a:b] for a, b in pairwise(borders)]


@MANY
@given(turns, st.booleans(), st.booleans(), st.lists(st.integers(0, 999), max_size=8))
@example("<tool_call>xy<arg_key>", False, False, [11, 14])
@example("<tool_call>f<arg_key>n</arg_key><arg_value>nu</arg_value>", False, True, [50])
def test_splitting_text_anywhere_changes_nothing(turn: str, thinking: bool, cut: bool, at: list[int]) -> None:
    whole = parse_text([turn], thinking, cut)
    assert parse_text(cuts(turn, at), thinking, cut) == whole
    assert parse_text(turn, thinking, cut) == whole
    for name, arguments in whole[2]:
        assert name in ("f", "find")
        assert isinstance(json.loads(arguments), dict)


@MANY
@given(
    turns,
    st.booleans(),
    st.lists(st.integers(0, 999), max_size=8),
    st.sampled_from([(), ("京",), ("</tool_call>\n", "l1"), ("f</",)]),
)
def test_grouping_tokens_anyhow_changes_nothing(
    turn: str, thinking: bool, at: list[int], stop: tuple[str, ...]
) -> None:
    """One token a step, or several as with speculation."""
    ids = TOY.encode(turn)

    def run(groups: list[list[int]]) -> Any:
        reader = TurnReader(TOY, thinking=thinking, tools=TOOLS, stop=stop)
        events: list[Event] = []
        for group in groups:
            if not reader.finished:
                events += reader.read(TokenChunk("r", tuple(group), usage=Usage(3, len(ids))))
        if not reader.finished:
            events += reader.read(TokenChunk("r", finish_reason=FinishReason.STOP, usage=Usage(3, len(ids))))
        assert isinstance(events[-1], TurnFinished)
        return summary(events), events[-1]

    borders = sorted({0, len(ids), *(i % (len(ids) + 1) for i in at)})
    groups = [ids[a:b] for a, b in pairwise(borders)]
    assert run([[i] for i in ids]) == run([ids]) == run(groups)


@MANY
@given(turns, st.booleans(), st.booleans())
def test_no_part_of_a_tag_comes_out(turn: str, thinking: bool, cut: bool) -> None:
    """Whatever is given out at any time is never taken back: it is the beginning of what the whole turn gives."""
    full = parse_text([turn], thinking, False)
    parser, events = StreamParser(thinking, TOOLS), list[Event]()
    for end in range(len(turn) + 1):
        reasoning, content, calls = summary(events)
        assert full[0].startswith(reasoning)
        assert full[1].startswith(content)
        assert [name for name, _ in full[2]][: len(calls)] == [name for name, _ in calls]
        assert all(whole.startswith(part) for (_, whole), (_, part) in zip(full[2], calls, strict=False))
        events += parser.feed(turn[end : end + 1])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
prose = texts.filter(lambda text: text == text.strip())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | texts, max_size=3) | st.dictionaries(texts, inner | texts, max_size=3),
    max_leaves=6,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "s": texts,
        "n": st.none() | texts.filter(lambda text: text != "null"),
        "j": json_values,
        "i": st.integers(),
    },
)
calls = st.lists(st.tuples(st.just("f"), arguments) | st.just(("find", {})), max_size=3)
OPENAI_TOOLS = [{"type": "function", "function": {"name": t.name, "parameters": dict(t.schema)}} for t in TOOLS]


@MANY
@given(texts, prose, calls)
@example("<tool_call>", "</think>", [("f", {"s": "</arg_value></tool_call>", "j": {"<arg_key>": "<|user|>"}})])
def test_a_rendered_turn_parses_back(reasoning: str, content: str, made: list[tuple[str, dict[str, Any]]]) -> None:
    """Text that spells tags included: it is rendered as plain bytes, and read as such."""
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [{"function": {"name": name, "arguments": json.dumps(args)}} for name, args in made],
    }
    template = ChatTemplate.builtin()
    prompt = template.render([{"role": "user", "content": "?"}], OPENAI_TOOLS)
    turn = template.render([{"role": "user", "content": "?"}, message], OPENAI_TOOLS, add_generation_prompt=False)
    ids = turn.encode(TOY)[len(prompt.encode(TOY)) :]
    detokenizer, parser = Detokenizer(TOY), StreamParser(True, read_tools(OPENAI_TOOLS), text_tags=())
    pieces = [piece for id_ in ids for piece in detokenizer.feed(id_)] + detokenizer.finish()
    events = [event for piece in pieces for event in parser.feed(piece.text, control=piece.control)]
    found = summary([*events, *parser.finish()])
    assert found[:2] == (reasoning, content)
    assert [(name, json.loads(args)) for name, args in found[2]] == made


@given(turns, st.booleans())
def test_merging_events_changes_nothing(turn: str, thinking: bool) -> None:
    parser = StreamParser(thinking, TOOLS)
    events = [event for char in turn for event in parser.feed(char)]
    merged = merge(events)
    assert summary(merged) == summary(events)
    assert all(type(a) is not type(b) or isinstance(a, ToolCallStart) for a, b in pairwise(merged))


def test_the_tags_are_what_these_tests_think_they_are() -> None:
    assert all(re.fullmatch(r"</?\w+>", tag) for tag in TAGS)
    assert all(TOY.special_id(tag) is not None for tag in TAGS)
