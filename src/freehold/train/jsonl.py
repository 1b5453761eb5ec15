"""The user's own chats: a JSONL file, one chat a line, read strictly. Torch-free.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […],
     "effort": "none"}

messages are in the form of the chat API; the last one is the answer to learn. Earlier turns of the assistant are learnt
too; with thinking, those since the last user message, because the template leaves out the thinking of earlier ones.
tools are the functions on offer. effort is what the answer thinks by: none, high or max; where it is not given it is
none, or max if an answer has `reasoning_content`. Every message of an error begins with FILE:LINE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from freehold.errors import FreeholdError, InvalidRequest
from freehold.model.chat.template import ChatTemplate
from freehold.train.data.example import EFFORTS, Effort, Example

_KEYS = {"messages", "tools", "effort"}
_MESSAGE_KEYS: Mapping[str, frozenset[str]] = {
    "system": frozenset(("role", "content")),
    "developer": frozenset(("role", "content")),
    "user": frozenset(("role", "content")),
    "assistant": frozenset(("role", "content", "reasoning_content", "tool_calls")),
    "tool": frozenset(("role", "content", "tool_call_id")),
}


def read_chats(path: str | Path, template: ChatTemplate, *, kind: str = "chat") -> list[Example]:
    """Every chat of a file, each rendered once to see that it can be. Empty lines are skipped.

    Raises InvalidRequest, beginning with FILE:LINE, for the first line that is not such a chat.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = [_example(line, f"{path}:{number}", template, kind) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidRequest(f"{path}: has no chats; expected one JSON object a line")
    return found


def split_held_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): about `share` of the chats are held out, chosen by what they say.

    So the order of the file does not matter, a chat that is there twice is on one side, and few change sides when the
    file grows. At least one is held out and one trained on; share 0 holds none out. Raises InvalidRequest if there are
    too few.
    """
    if not 0 <= share < 1:
        raise InvalidRequest(f"the share held out, {share}, must be at least 0 and below 1", param="held_out")
    if share == 0:
        return list(examples), []
    if len({_digest(example) for example in examples}) < 2:
        raise InvalidRequest("there must be two different chats at least, one to train on and one to hold out")
    by_digest = sorted({_digest(example) for example in examples})
    count = min(max(1, round(share * len(by_digest))), len(by_digest) - 1)
    # The smallest digests, so that the number held out is what was asked for, whatever the chats are.
    held = set(by_digest[:count])
    return (
        [example for example in examples if _digest(example) not in held],
        [example for example in examples if _digest(example) in held],
    )


def _digest(example: Example) -> str:
    said = json.dumps([example.messages, example.tools, example.effort], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", errors="surrogatepass")).hexdigest()


def _example(line: str, where: str, template: ChatTemplate, kind: str) -> Example:
    try:
        raw = json.loads(line, object_pairs_hook=lambda pairs: _object(pairs, where))
        json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: U+{ord(error.object[error.start]):X} is half of a character, not text"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        _refuse(where, "expected a JSON object with messages")
    unknown = sorted(raw.keys() - _KEYS)
    if unknown:
        _refuse(where, f"unknown key {unknown[0]!r}; a chat has {', '.join(sorted(_KEYS))}")
    messages = _messages(raw.get("messages"), where)
    tools = [] if raw.get("tools") is None else raw["tools"]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        _refuse(where, "tools must be a list of objects")
    example = Example(kind, tuple(messages), tuple(tools), _effort(raw, messages, where))
    try:
        template.render(example.messages, example.tools, effort=example.effort, add_generation_prompt=False)
    except FreeholdError as error:
        raise InvalidRequest(f"{where}: {error.message}") from None
    return example


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        _refuse(where, "messages must be a list with at least one message")
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, dict):
            _refuse(where, f"{at} must be an object")
        role = message.get("role")
        allowed = _MESSAGE_KEYS.get(role) if isinstance(role, str) else None
        if allowed is None:
            _refuse(where, f"{at}.role: {role!r} is not one of {', '.join(_MESSAGE_KEYS)}")
        unknown = sorted(message.keys() - allowed)
        if unknown:
            _refuse(
                where, f"{at}: {unknown[0]!r} has no meaning here; a message of {role} has {', '.join(sorted(allowed))}"
            )
        before = messages[i - 1]["role"] if i else ""
        if before == "assistant" and role not in ("user", "tool"):
            _refuse(
                where, f"{at}.role: {role} behind an answer; only user or tool, at which an answer ends, can be there"
            )
    last = messages[-1]
    if last["role"] != "assistant":
        _refuse(where, f"the last message is of {last['role']}; it must be the assistant's, which is what is learnt")
    content = last.get("content")
    if not last.get("tool_calls") and not (content.strip() if isinstance(content, str) else content):
        _refuse(where, "the last message, which is what is learnt, says nothing")
    return messages


def _effort(raw: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], where: str) -> Effort:
    thinks = any(message.get("reasoning_content") for message in messages)
    if raw.get("effort") is None:
        return "max" if thinks else "none"
    for effort in EFFORTS:
        if raw["effort"] == effort:
            if effort == "none" and thinks:
                _refuse(where, "effort none, but an answer has reasoning_content, which it would leave out")
            return effort
    _refuse(where, f"effort {raw['effort']!r} is not one of {', '.join(EFFORTS)}")


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        _refuse(where, f"names {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return result


def _refuse(where: str, message: str) -> NoReturn:
    raise InvalidRequest(f"{where}: {message}")
