"""The user's chats: what is read, and that everything else is refused with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import InvalidRequest
from freehold.model.chat.template import ChatTemplate
from freehold.train.data.example import Example
from freehold.train.jsonl import read_chats, split_held_out

ASKED = {"role": "user", "content": "Hello"}
SAID = {"role": "assistant", "content": "Hi"}
GOOD = json.dumps({"messages": [ASKED, SAID]})
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def read(tmp_path: Path, *lines: str) -> list[Example]:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_chats(path, ChatTemplate.builtin())


def chat(*messages: dict[str, Any], **more: Any) -> str:
    return json.dumps({"messages": messages, **more})


def test_chats_are_read_with_tools_and_effort_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    thought = {**SAID, "reasoning_content": "greet"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    found = read(
        tmp_path,
        GOOD,
        "",
        chat(ASKED, thought),
        chat(ASKED, thought, effort="high"),
        chat(ASKED, called, tools=[TOOL]),
        chat(ASKED, called, {"role": "tool", "content": "5", "tool_call_id": "c"}, SAID, tools=[TOOL]),
    )
    assert [example.effort for example in found] == ["none", "max", "high", "none", "none"]
    assert found[0].messages == (ASKED, SAID)
    assert found[3].tools == (TOOL,)


def test_unicode_line_separators_do_not_cut_a_line(tmp_path: Path) -> None:
    text = json.dumps({"messages": [ASKED, {"role": "assistant", "content": "a\u2028b\x85c"}]}, ensure_ascii=False)
    assert read(tmp_path, text)[0].messages[-1]["content"] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"messages": [], "messages": []}', "'messages' twice"),
        (chat(ASKED, SAID, weight=2), "unknown key 'weight'"),
        (json.dumps({"tools": []}), "messages must be a list"),
        (json.dumps({"messages": []}), "at least one"),
        (json.dumps({"messages": ["hi"]}), r"messages\[0\] must be an object"),
        (chat(ASKED), "the last message is of user"),
        (chat(ASKED, SAID, ASKED), "the last message is of user"),
        (chat(ASKED, {"role": "assistant", "content": ""}), "says nothing"),
        (chat({"role": "robot", "content": "x"}, SAID), "'robot' is not one of"),
        (chat({**ASKED, "name": "Bo"}, SAID), "'name' has no meaning here"),
        (chat(ASKED, {**SAID, "reasoning": "x"}), "'reasoning' has no meaning here"),
        (chat({"role": "user", "content": 5}, SAID), r"messages\[0\]\.content"),
        (chat(ASKED, SAID, tools="f"), "tools must be a list of objects"),
        (chat(ASKED, SAID, tools=[5]), "tools must be a list of objects"),
        (chat(ASKED, SAID, tools=[{"type": "function"}]), r"tools\[0\]"),
        (chat(ASKED, SAID, effort="low"), "effort 'low' is not one of none, high, max"),
        (chat(ASKED, {**SAID, "reasoning_content": "x"}, effort="none"), "would leave out"),
        (chat(ASKED, SAID, SAID), r"messages\[2\]\.role: assistant behind an answer"),
        (chat(ASKED, SAID, {"role": "system", "content": "x"}, ASKED, SAID), r"messages\[2\]\.role: system behind"),
        (chat(ASKED, {"role": "assistant", "content": " "}), "says nothing"),
        (chat(ASKED, SAID, tools=0), "tools must be a list of objects"),
        (chat({"role": "user", "content": "a\ud800"}, SAID), r"U\+D800 is half of a character"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"chats\.jsonl:3: .*{message}"):
        read(tmp_path, GOOD, "", line)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(GOOD + "\n", encoding="utf-8-sig")
    assert len(read_chats(tmp_path / "chats.jsonl", ChatTemplate.builtin())) == 1


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has no chats"):
        read(tmp_path, "", "")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_chats(tmp_path / "none.jsonl", ChatTemplate.builtin())
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        read_chats(tmp_path / "bytes.jsonl", ChatTemplate.builtin())


def numbered(count: int) -> list[Example]:
    return [Example("x", (ASKED, {"role": "assistant", "content": str(i)})) for i in range(count)]


def test_the_split_is_of_the_asked_size_and_does_not_depend_on_the_order() -> None:
    examples = numbered(50)
    train, held = split_held_out(examples, 0.2)
    assert (len(train), len(held)) == (40, 10)
    again_train, again_held = split_held_out(examples[::-1], 0.2)
    assert sorted(again_held, key=str) == sorted(held, key=str)
    assert sorted(again_train, key=str) == sorted(train, key=str)


def test_a_chat_that_is_there_twice_is_on_one_side() -> None:
    examples = numbered(20)
    train, held = split_held_out(examples + examples, 0.25)
    assert not {str(example) for example in train} & {str(example) for example in held}
    assert len(train) + len(held) == 40


def test_at_least_one_chat_is_on_each_side() -> None:
    assert [len(side) for side in split_held_out(numbered(2), 0.01)] == [1, 1]
    assert [len(side) for side in split_held_out(numbered(3), 0.99)] == [1, 2]
    assert [len(side) for side in split_held_out(numbered(3), 0)] == [3, 0]
    with pytest.raises(InvalidRequest, match="two different chats"):
        split_held_out(numbered(1) * 5, 0.1)
    with pytest.raises(InvalidRequest, match="below 1"):
        split_held_out(numbered(5), 1.0)
