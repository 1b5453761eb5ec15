"""The reasoning path and the efficiency path: does this request need a model that thinks? Cheap rules, no model.

The first rule that has something to say decides:

 1. the request asks for effort high or max             reasoning: who asks for it gets it
 2. its task (`x-task`) is one of efficiency_tasks      efficiency
    or of reasoning_tasks                               reasoning
 3. it asks for effort none or low                      efficiency
 4. it offers tools                                     reasoning: choosing and chaining calls is planning
 5. it is longer than long_bytes                        reasoning
 6. the conversation has more than many_turns messages  reasoning
 7. the last user message has code in a fence, or one   reasoning
    of reasoning_words in its first or last 4,000 characters
 8. it is no longer than short_bytes                    efficiency
 9. otherwise, also where the body has another shape    reasoning: a wrong guess should cost money, not quality

The lists and sizes are `[paths]` of the settings. The answer is what `path = "..."` of a `[[routes]]` rule asks for,
and `mode = "shadow"` counts what the rule would save before it is trusted. It costs a partial decode of the body, once
for a request and only where a rule asks. Torch-free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec

from freehold.gateway.call import Request
from freehold.gateway.config import Paths

Way: TypeAlias = Literal["reasoning", "efficiency"]

_EDGE = 4000  # characters of a message that are searched from each end: what is asked for stands there
_EMPTY = (b"", b"null", b"[]", b"{}")


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b"null")
    type: str = "message"  # the Responses API has items of other types between messages


class _Body(msgspec.Struct):
    """What is looked at in a body of any endpoint; everything else is skipped without building it."""

    messages: list[_Message] = []
    input: msgspec.Raw = msgspec.Raw(b"null")
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    tools: msgspec.Raw = msgspec.Raw(b"null")
    functions: msgspec.Raw = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Features:
    """Of a prompt. turns: messages in it; asked: text of the last user message, its middle left out if it is long."""

    tools: bool = False
    turns: int = 1
    asked: str = ""
    fenced: bool = False


_body = msgspec.json.Decoder(_Body)
_items = msgspec.json.Decoder(list[_Message])


def features(body: bytes) -> Features | None:
    """What the rules look at; None: no body that they understand."""
    try:
        read = _body.decode(body)
        messages, bare = read.messages, b""
        if not messages:
            bare = bytes(read.input if bytes(read.prompt) == b"null" else read.prompt)
            if bare.startswith(b"[") and bytes(read.prompt) == b"null":
                messages = [item for item in _items.decode(bare) if item.type == "message"]
        last = next((bytes(each.content) for each in reversed(messages) if each.role == "user"), bare)
        text = _text(msgspec.json.decode(last)) if last else ""
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    tools = _holds_something(bytes(read.tools)) or _holds_something(bytes(read.functions))
    asked = text if len(text) <= 2 * _EDGE else f"{text[:_EDGE]}\n{text[-_EDGE:]}"
    return Features(tools=tools, turns=max(len(messages), 1), asked=asked, fenced="```" in text)


class PathRules:
    """The rules with the settings' lists."""

    def __init__(self, settings: Paths) -> None:
        self._settings = settings
        self._tasks: dict[str, Way] = dict.fromkeys(settings.reasoning_tasks, "reasoning")
        self._tasks |= dict.fromkeys(settings.efficiency_tasks, "efficiency")
        words = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in settings.reasoning_words)
        self._words = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None

    def __call__(self, request: Request) -> tuple[Way, str]:
        """The path of a request, and which rule said so."""
        settings = self._settings
        if request.effort in ("high", "max"):
            return "reasoning", f"effort {request.effort}"
        by_task = self._tasks.get(request.task)
        if by_task is not None:
            return by_task, f"task {request.task}"
        if request.effort in ("none", "low"):
            return "efficiency", f"effort {request.effort}"
        found = features(request.body)
        if found is None:
            return "reasoning", "unknown shape"
        if found.tools:
            return "reasoning", "tools"
        if len(request.body) > settings.long_bytes:
            return "reasoning", "long"
        if found.turns > settings.many_turns:
            return "reasoning", "many turns"
        if found.fenced:
            return "reasoning", "code"
        word = self._words.search(found.asked) if self._words is not None else None
        if word is not None:
            return "reasoning", f"word {word[0].lower()}"
        if len(request.body) <= settings.short_bytes:
            return "efficiency", "short"
        return "reasoning", "nothing speaks for less"


def _holds_something(raw: bytes) -> bool:
    return len(raw) > 16 or b"".join(raw.split()) not in _EMPTY


def _text(content: Any) -> str:
    """Of a message's content: a string, or parts of which some are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (part.get("text", "") if isinstance(part, dict) else part for part in content)
    return "\n".join(part for part in parts if isinstance(part, str))
