"""Every check refuses wrong answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from freehold.train.data.checks import CHECKS, judge, judge_answer, same_value
from freehold.train.data.example import Example, assistant, user

ROWS = [["Velkan", "12"], ["Tor", "7"]]
TABLE = "| name | code |\n|---|---|\n| Velkan | 12 |\n| Tor | 7 |"
CASES: list[tuple[Mapping[str, Any], str, list[str]]] = [
    (
        {"type": "equals", "value": "The code is 4812."},
        " The code is 4812.\n",
        ["The code is 4813.", "4812", "", "the code is 4812."],
    ),
    (
        {"type": "number", "value": 15},
        "12 + 3 = 15",
        ["12 + 3 = 16", "12 + 3", "fifteen", "12 + 3 = 15 or 16", "115", "-15"],
    ),
    ({"type": "contains", "values": ["fox", "red"]}, "A red fox.", ["A fox.", "A redder fox.", "", "foxes red"]),
    ({"type": "contains", "values": []}, "Something.", ["", " "]),
    (
        {"type": "refusal"},
        "I can't help with that. It could hurt someone.",
        ["Sure.", "", "No. I can't help with that."],
    ),
    (
        {"type": "numbered_list", "count": 2, "items": ["a", "b"]},
        "1. a\n2. b",
        ["1. a", "1. a\n3. b", "1. b\n2. a", "- a\n- b", "a, b", "1. a\n2. b\n3. c", "Here:\n1. a\n2. b"],
    ),
    (
        {"type": "numbered_list", "count": 2, "among": ["a", "b", "c"]},
        "1. c\n2. A",
        ["1. a\n2. a", "1. a\n2. x", "1. a", "1. a\n2. "],
    ),
    ({"type": "bullet_list", "count": 2, "items": ["a", "b"]}, "- a\n- b", ["1. a\n2. b", "- a", "- a\nb", "- a\n- c"]),
    ({"type": "comma_list", "count": 2, "items": ["a", "b"]}, "a, b", ["a b", "a,b", "a, b, c", "a,\nb", "b, a"]),
    (
        {"type": "json", "keys": ["a", "b"], "value": {"a": 1, "b": "x"}},
        '{"b": "x", "a": 1}',
        [
            '{"a": 1}',
            '{"a": "1", "b": "x"}',
            '{"a": 1, "b": "x", "c": 2}',
            "{a: 1}",
            "[1]",
            'JSON: {"a": 1, "b": "x"}',
            '{"a": true, "b": "x"}',
        ],
    ),
    ({"type": "words", "count": 3, "word": "tor"}, "tor tor tor", ["tor tor", "tor tor tor tor", "tor tor Tor", ""]),
    (
        {"type": "table", "columns": 2, "rows": ROWS},
        TABLE,
        [
            TABLE.replace("12", "13"),
            TABLE.replace("|---|---|\n", ""),
            TABLE.replace("| 7 |", "|"),
            "name code",
            TABLE + "\nok",
            TABLE.replace("| Tor | 7 |", "| Tor | 7 | 8 |"),
        ],
    ),
    (
        {"type": "starts", "value": "Tor", "sentences": 1},
        "Tor went home.",
        ["Torben went home.", "Then Tor went.", "Tor went. He came.", "Tor went"],
    ),
    (
        {"type": "ends", "value": "Tor.", "sentences": 1},
        "I saw Tor.",
        ["I saw Victor.", "I saw Tor", "Tor saw me.", "Yes. I saw Tor."],
    ),
]
CALL = {"type": "tool_call", "name": "pay", "arguments": {"to": "Tor", "sum": 2.5, "soon": True}}


@pytest.mark.parametrize(("check", "right", "wrong"), CASES)
def test_texts(check: Mapping[str, Any], right: str, wrong: list[str]) -> None:
    assert judge_answer(check, right).right
    for answer in wrong:
        verdict = judge_answer(check, answer)
        assert (verdict.right, bool(verdict.why)) == (False, True), answer
    assert not judge_answer(check, right, [("pay", {})]).right


def test_every_check_has_cases() -> None:
    assert {str(check["type"]) for check, _, _ in CASES} | {"tool_call", "tool_calls"} == set(CHECKS)


@pytest.mark.parametrize(
    "calls",
    [
        [],
        [("send", {"to": "Tor", "sum": 2.5, "soon": True})],
        [("pay", {"to": "tor", "sum": 2.5, "soon": True})],
        [("pay", {"to": "Tor", "sum": "2.5", "soon": True})],
        [("pay", {"to": "Tor", "sum": 2.5, "soon": 1})],
        [("pay", {"to": "Tor", "sum": 2.5})],
        [("pay", {"to": "Tor", "sum": 2.5, "soon": True, "x": 1})],
        [("pay", {"to": "Tor", "sum": 2.5, "soon": True})] * 2,
    ],
)
def test_wrong_calls(calls: list[tuple[str, dict[str, Any]]]) -> None:
    assert not judge_answer(CALL, "", calls).right


def test_right_calls() -> None:
    assert judge_answer(CALL, "", [("pay", {"soon": True, "to": "Tor", "sum": 2.5})]).right
    both = {"type": "tool_calls", "calls": [CALL, {"name": "stop", "arguments": {}}]}
    right = [("stop", {}), ("pay", CALL["arguments"])]
    assert judge_answer(both, "", right).right  # type: ignore[arg-type]
    assert not judge_answer(both, "", right[:1]).right  # type: ignore[arg-type]
    assert not judge_answer(both, "", [right[0], right[0]]).right  # type: ignore[arg-type]


def test_thinking_must_be_as_asked() -> None:
    check = {"type": "equals", "value": "yes"}
    for effort, thought, right in (
        ("none", "", True),
        ("none", "hm", False),
        ("high", "hm", True),
        ("max", " ", False),
    ):
        example = Example("x", (user("?"), assistant("yes")), effort=effort, check=check)  # type: ignore[arg-type]
        assert judge(example, "yes", (), thought).right is right


def test_unknown_checks_are_errors() -> None:
    with pytest.raises(ValueError, match="'nonsense' is not a check"):
        judge_answer({"type": "nonsense"}, "")
    with pytest.raises(ValueError, match="has no check"):
        judge(Example("text", text="x"), "")


@pytest.mark.parametrize(("a", "b"), [(1, "1"), (True, 1), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (None, False)])
def test_values_of_other_types_differ(a: object, b: object) -> None:
    assert same_value(a, a)
    assert not same_value(a, b)
