"""Whether an answer is right, by the check that its example carries. Torch-free.

Every check looks at the final answer alone, never at the thinking, and compares exactly: white space at the ends is
all that is forgiven.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freehold.train.data.example import Example

Calls = Sequence[tuple[str, Mapping[str, Any]]]  # (function name, decoded arguments)


@dataclass(frozen=True, slots=True)
class Verdict:
    """right, and if not, why in a few words."""

    right: bool
    why: str = ""


def judge(example: Example, answer: str, calls: Calls = (), reasoning: str = "") -> Verdict:
    """Judge an answer by the example's check. reasoning: what was thought; it must be there if, and only if, asked for.

    Raises ValueError for an example without a check, or with one that is not known.
    """
    if example.check is None:
        raise ValueError(f"an example of kind {example.kind!r} has no check")
    if bool(reasoning.strip()) != (example.effort != "none"):
        return Verdict(False, f"effort is {example.effort}, but it thought {len(reasoning)} characters")
    return judge_answer(example.check, answer, calls)


def judge_answer(check: Mapping[str, Any], answer: str, calls: Calls = ()) -> Verdict:
    """Judge an answer by a check, whatever was thought. Raises ValueError for a check that is not known."""
    kind = check["type"]
    if kind in _CALL_CHECKS:
        return _CALL_CHECKS[kind](check, calls)
    if kind not in _TEXT_CHECKS:
        raise ValueError(f"{kind!r} is not a check; there are {', '.join(sorted([*_TEXT_CHECKS, *_CALL_CHECKS]))}")
    if calls:
        return Verdict(False, f"it called {calls[0][0]}, and no tool was needed")
    why = _TEXT_CHECKS[kind](check, answer.strip())
    return Verdict(not why, why)


def same_value(found: Any, wanted: Any) -> bool:
    """Equal and of the same JSON type: 1 is not "1", true is not 1; 2 and 2.0 are both numbers."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return found == wanted
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(same_value(found[key], wanted[key]) for key in wanted)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same_value, found, wanted))
    return type(found) is type(wanted) and bool(found == wanted)


def _same_call(found: tuple[str, Mapping[str, Any]], name: str, arguments: Mapping[str, Any]) -> str:
    if found[0] != name:
        return f"it called {found[0]}, not {name}"
    if not same_value(dict(found[1]), dict(arguments)):
        return f"arguments {dict(found[1])!r}, wanted {dict(arguments)!r}"
    return ""


def _tool_call(check: Mapping[str, Any], calls: Calls) -> Verdict:
    return _tool_calls({"calls": [check]}, calls)


def _tool_calls(check: Mapping[str, Any], calls: Calls) -> Verdict:
    """The calls asked for and no others, in any order."""
    wanted = list(check["calls"])
    if len(calls) != len(wanted):
        return Verdict(False, f"{len(calls)} calls, wanted {len(wanted)}")
    why = ""
    for found in calls:
        reasons = [_same_call(found, each["name"], each["arguments"]) for each in wanted]
        if "" not in reasons:
            why = reasons[0]
            break
        wanted.pop(reasons.index(""))
    return Verdict(not why, why)


def _equals(check: Mapping[str, Any], answer: str) -> str:
    return "" if answer == check["value"].strip() else f"wanted {check['value']!r}"


def _number(check: Mapping[str, Any], answer: str) -> str:
    """The one number wanted: of "12 + 3 = 15", what follows the last equals sign."""
    found = re.findall(r"-?\d+(?:\.\d+)?", answer.rpartition("=")[2])
    return "" if len(found) == 1 and float(found[0]) == check["value"] else f"wanted the number {check['value']}"


def _contains(check: Mapping[str, Any], answer: str) -> str:
    if not answer:
        return "the answer is empty"
    missing = [value for value in check["values"] if not re.search(rf"\b{re.escape(value)}\b", answer)]
    return f"it lacks {', '.join(missing)}" if missing else ""


def _refusal(check: Mapping[str, Any], answer: str) -> str:
    return "" if answer.startswith("I can't help with that.") else "it does not refuse"


def _items(check: Mapping[str, Any], found: Sequence[str]) -> str:
    """The items of a list: as many as wanted; those wanted, or different ones among those allowed."""
    if len(found) != check["count"]:
        return f"{len(found)} items, wanted {check['count']}"
    if "items" in check and list(found) != list(check["items"]):
        return f"the items are not {', '.join(check['items'])}"
    if "among" in check:
        other = [item for item in found if item.lower() not in check["among"]]
        if other:
            return f"{other[0]!r} is not one of those asked for"
        if len({item.lower() for item in found}) != len(found):
            return "an item comes twice"
    return "an item is empty" if not all(found) else ""


def _numbered_list(check: Mapping[str, Any], answer: str) -> str:
    items = []
    for i, line in enumerate(answer.splitlines(), 1):
        number, _, item = line.partition(". ")
        if number != str(i):
            return f"line {i} is {line!r}, not number {i}"
        items.append(item)
    return _items(check, items)


def _bullet_list(check: Mapping[str, Any], answer: str) -> str:
    lines = answer.splitlines()
    for i, line in enumerate(lines, 1):
        if not line.startswith(("- ", "* ")):
            return f"line {i} is {line!r}, not a bullet"
    return _items(check, [line[2:] for line in lines])


def _comma_list(check: Mapping[str, Any], answer: str) -> str:
    return "it has several lines" if "\n" in answer else _items(check, answer.split(", "))


def _json(check: Mapping[str, Any], answer: str) -> str:
    try:
        found = json.loads(answer)
    except ValueError:
        return "it is not JSON"
    if not isinstance(found, dict) or set(found) != set(check["keys"]):
        return f"it is not an object with the keys {', '.join(check['keys'])}"
    if "value" in check and not same_value(found, check["value"]):
        return f"wanted {check['value']!r}"
    return ""


def _words(check: Mapping[str, Any], answer: str) -> str:
    found = answer.split()
    if len(found) != check["count"]:
        return f"{len(found)} words, wanted {check['count']}"
    if "word" in check and any(word != check["word"] for word in found):
        return f"a word is not {check['word']!r}"
    return ""


def _table(check: Mapping[str, Any], answer: str) -> str:
    lines = answer.splitlines()
    if len(lines) < 3 or any(not (line.startswith("|") and line.endswith("|")) for line in lines):
        return "it is not a table with a head and rows"
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    if any(len(row) != check["columns"] for row in cells):
        return f"a row has not {check['columns']} cells"
    if any(set(cell) - set("-:") or not cell for cell in cells[1]):
        return "the second line does not part the head from the rows"
    return "" if cells[2:] == [list(row) for row in check["rows"]] else "the rows are not those given"


def _sentences(check: Mapping[str, Any], answer: str) -> str:
    found = len(re.findall(r"[.!?](?:\s|$)", answer))
    return "" if found == check["sentences"] else f"{found} sentences, wanted {check['sentences']}"


def _starts(check: Mapping[str, Any], answer: str) -> str:
    if not re.match(rf"{re.escape(check['value'])}\b", answer):
        return f"it does not begin with {check['value']!r}"
    return _sentences(check, answer)


def _ends(check: Mapping[str, Any], answer: str) -> str:
    if not re.search(rf"\b{re.escape(check['value'])}$", answer):
        return f"it does not end with {check['value']!r}"
    return _sentences(check, answer)


_CALL_CHECKS: Mapping[str, Callable[[Mapping[str, Any], Calls], Verdict]] = {
    "tool_call": _tool_call,
    "tool_calls": _tool_calls,
}
_TEXT_CHECKS: Mapping[str, Callable[[Mapping[str, Any], str], str]] = {
    "equals": _equals,
    "number": _number,
    "contains": _contains,
    "refusal": _refusal,
    "numbered_list": _numbered_list,
    "bullet_list": _bullet_list,
    "comma_list": _comma_list,
    "json": _json,
    "words": _words,
    "table": _table,
    "starts": _starts,
    "ends": _ends,
}
CHECKS = (*_TEXT_CHECKS, *_CALL_CHECKS)
