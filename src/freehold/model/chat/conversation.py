"""Messages and tools of a request, checked and put into one canonical form before they are rendered.

Both renderers (`template`) start from here, so that they agree on what a message says: content as one string,
`<think>…</think>` split out of assistant content, tool-call arguments as an object, `developer` as `system`.
Whatever cannot be rendered is an InvalidRequest that names the place, like `messages[2].content[0]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from freehold.errors import InvalidRequest
from freehold.types import ToolSpec

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_NOT_IN_NAMES = frozenset("<>{}\"'`\\")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call an assistant made. arguments is the decoded object."""

    id: str | None
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """A message in canonical form.

    reasoning: the thinking of an assistant message, None where it has none. tool_calls: of an assistant message.
    tool_call_id: of a tool message, the call it answers. references: of a tool message whose result is a list of
    deferred tools that are now available (`tool_reference` parts): their names.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    references: tuple[str, ...] = ()


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Check OpenAI chat messages and put them into canonical form. Raises InvalidRequest naming the place."""
    if not messages:
        _refuse("messages", "must have at least one message")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def read_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[ToolSpec, ...]:
    """Check OpenAI function tools; their names and argument schemas. Raises InvalidRequest naming the place."""
    found: dict[str, ToolSpec] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        kind = tool.get("type", "function")
        if kind != "function" or not isinstance(tool.get("function"), Mapping):
            _refuse(where, f"only function tools are supported, found type {kind!r}")
        function = tool["function"]
        name = function.get("name")
        if not isinstance(name, str) or not name or any(c.isspace() or c in _NOT_IN_NAMES for c in name):
            _refuse(f"{where}.function.name", f"{name!r} is not a function name (letters, digits, _ - . : /)")
        if name in found:
            _refuse(f"{where}.function.name", f"{name!r} is declared twice")
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, Mapping):
            _refuse(f"{where}.function.parameters", "must be a JSON schema object")
        found[name] = ToolSpec(name, schema or {"type": "object", "properties": {}})
    return tuple(found.values())


def tool_results_in_call_order(run: Sequence[Message], calls: Sequence[ToolCall]) -> tuple[Message, ...]:
    """The tool messages of one run in the order of the calls they answer, as GLM-5.3's template has them.

    They keep their own order unless every id is there, unique on both sides, and known among the calls.
    """
    order = {call.id: i for i, call in enumerate(calls) if call.id}
    ids = [message.tool_call_id for message in run]
    if len(order) != len(calls) or len(set(ids)) != len(ids) or any(id_ not in order for id_ in ids):
        return tuple(run)
    return tuple(sorted(run, key=lambda message: order[message.tool_call_id or ""]))


def _message(message: Mapping[str, Any], where: str) -> Message:
    name = message.get("role")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        _refuse(f"{where}.role", f"{name!r} is not one of {', '.join(_ROLES)}")
    if role == "tool":
        references = _references(message.get("content"), f"{where}.content")
        content = "" if references else _text(message.get("content"), f"{where}.content")
        return Message(
            role, content, tool_call_id=_optional_text(message, "tool_call_id", where), references=references
        )
    content = _text(message.get("content"), f"{where}.content")
    if role != "assistant":
        return Message(role, content)
    reasoning = _optional_text(message, "reasoning_content", where)
    if reasoning is None:
        reasoning = _optional_text(message, "reasoning", where)  # the other name that the answer gave it
    if reasoning is None and "</think>" in content:
        head, _, content = content.rpartition("</think>")
        reasoning = head.partition("</think>")[0].rpartition("<think>")[2]
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        _refuse(f"{where}.tool_calls", "must be a list")
    return Message(
        role, content, reasoning, tuple(_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls))
    )


def _text(content: Any, where: str) -> str:
    """One string out of a string, null, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        _refuse(where, "must be a string or a list of text parts")
    pieces = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            _refuse(f"{where}[{i}]", f"part of type {kind!r} is not supported; this model reads text only")
    return "".join(pieces)


def _references(content: Any, where: str) -> tuple[str, ...]:
    """The tool names of a result that consists of `tool_reference` parts; () for any other content."""
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        return ()
    if not isinstance(content[0], Mapping) or content[0].get("type") != "tool_reference":
        return ()
    names = []
    for i, part in enumerate(content):
        name = (part.get("name") or part.get("tool_name")) if isinstance(part, Mapping) else None
        if not isinstance(name, str) or part.get("type") != "tool_reference":
            _refuse(f"{where}[{i}]", "tool_reference parts need a name and cannot be mixed with other parts")
        names.append(name)
    return tuple(names)


def _tool_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        _refuse(where, "must be a function call, {'type': 'function', 'function': {...}}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        _refuse(f"{where}.function.name", "must be the name of a function")
    return ToolCall(_optional_text(call, "id", where), name, _arguments(function, f"{where}.function.arguments"))


def _arguments(function: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            _refuse(where, f"is not JSON: {error}")
    elif arguments is None or isinstance(arguments, str):
        arguments = {}  # some clients send a call without arguments this way
    if not isinstance(arguments, Mapping):
        _refuse(where, "must be a JSON object")
    return cast("Mapping[str, Any]", arguments)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _optional_text(message: Mapping[str, Any], key: str, where: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        _refuse(f"{where}.{key}", "must be a string")
    return value


def _refuse(param: str, message: str) -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param)
