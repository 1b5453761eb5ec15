"""The reasoning path and the efficiency path, rule by rule."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from freehold.gateway.config import Paths
from freehold.gateway.routing.paths import PathRules, features
from tests.routing import chat, request

RULES = PathRules(Paths())


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": "user" if number % 2 == 0 else "assistant", "content": "Yes."} for number in range(count)]


@pytest.mark.parametrize(
    ("facts", "way", "why"),
    [
        ({}, "efficiency", "short"),
        ({"effort": "high"}, "reasoning", "effort high"),
        ({"effort": "max", "task": "classify"}, "reasoning", "effort max"),  # who asks for it gets it
        ({"task": "classify", "effort": "medium"}, "efficiency", "task classify"),
        ({"task": "code", "effort": "low"}, "reasoning", "task code"),
        ({"effort": "low"}, "efficiency", "effort low"),
        ({"effort": "none", "body": chat("Prove it.")}, "efficiency", "effort none"),
        ({"task": "unheard-of"}, "efficiency", "short"),
        ({"body": chat(tools=[{"type": "function"}])}, "reasoning", "tools"),
        ({"body": chat(tools=[])}, "efficiency", "short"),
        ({"body": chat(tools=None)}, "efficiency", "short"),
        ({"body": chat("x" * 24_001)}, "reasoning", "long"),
        ({"body": chat(messages=turns(13))}, "reasoning", "many turns"),
        ({"body": chat(messages=turns(12))}, "efficiency", "short"),
        ({"body": chat("Fix it:\n```\nx = 1\n```")}, "reasoning", "code"),
        ({"body": chat("PROVE that it halts.")}, "reasoning", "word prove"),
        ({"body": chat("Think step\nby step.")}, "reasoning", "word step\nby step"),
        ({"body": chat("An approved planet, unsolved.")}, "efficiency", "short"),  # whole words only
        ({"body": chat("y" * 2_500)}, "reasoning", "nothing speaks for less"),
        ({"body": chat("z " * 5_000 + " prove it")}, "reasoning", "word prove"),
        ({"body": b"[1, 2]"}, "reasoning", "unknown shape"),
        ({"body": b"\xff"}, "reasoning", "unknown shape"),
    ],
)
def test_the_first_rule_that_has_something_to_say_decides(facts: dict[str, Any], way: str, why: str) -> None:
    assert RULES(request(**facts)) == (way, why)


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("raw", "asked", "count"),
    [
        (body(prompt="Derive it."), "Derive it.", 1),
        (body(prompt=["One", "Two"]), "One\nTwo", 1),
        (body(prompt=[1, 2, 3]), "", 1),
        (body(input="Derive it."), "Derive it.", 1),
        (body(input=[{"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}]), "Why?", 1),
        (body(input=[{"type": "function_call_output", "output": "x"}, {"role": "user", "content": "Go"}]), "Go", 1),
        (chat(messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is"}]}]), "Is", 1),
        (body(messages=[{"role": "user", "content": "First"}, {"role": "assistant", "content": "Prove"}]), "First", 2),
        (body(messages=[{"role": "assistant", "content": None}]), "", 1),
        (body(messages=[]), "", 1),
    ],
)  # fmt: skip
def test_the_last_user_message_is_found_in_every_format(raw: bytes, asked: str, count: int) -> None:
    found = features(raw)
    assert found is not None
    assert (found.asked.strip(), found.turns) == (asked, count)


def test_tools_inside_a_text_are_no_tools() -> None:
    found = features(chat('{"tools": [1]}'))
    assert found is not None
    assert not found.tools


def test_only_the_edges_of_a_long_message_are_searched() -> None:
    middle = "a" * 6_000 + " prove " + "a" * 6_000
    assert RULES(request(body=chat(middle)))[1] == "nothing speaks for less"


def test_deep_nesting_is_an_unknown_shape() -> None:
    assert features(b'{"messages": ' + b"[" * 100_000) is None
    assert features(b'{"messages": [{"role": "user", "content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}") is None


def test_the_lists_are_settings() -> None:
    rules = PathRules(Paths(reasoning_words=("c++", "dose"), short_bytes=50, efficiency_tasks=("quick",)))
    assert rules(request(body=chat("Write C++ now")))[1] == "word c++"
    assert rules(request(body=chat("x" * 100)))[0] == "reasoning"
    assert rules(request(task="quick"))[0] == "efficiency"
    assert PathRules(Paths(reasoning_words=()))(request(body=chat("prove")))[0] == "efficiency"


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValidationError, match="'code' is in reasoning_tasks and in efficiency_tasks"):
        Paths(efficiency_tasks=("code",))
    with pytest.raises(ValidationError, match="short_bytes is more than long_bytes"):
        Paths(short_bytes=2, long_bytes=1)
