"""What both directions share: reasons to stop, usage, refusals, and errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from freehold.errors import InvalidRequest, UnsupportedField

decode: Final = msgspec.json.Decoder(dict[str, Any]).decode
encode: Final = msgspec.json.encode

TO_FINISH_REASON: Final[Mapping[str, str]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
TO_STOP_REASON: Final[Mapping[str, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


def check_fields(
    body: Mapping[str, Any], known: Iterable[str], left_out: Iterable[str], neutral: Mapping[str, Any]
) -> None:
    """Refuse what cannot be said. neutral: fields that may be there with this value, which changes nothing.

    Raises UnsupportedField.
    """
    allowed = {*known, *left_out}
    for name, value in body.items():
        if name in allowed or value is None or (name in neutral and value == neutral[name]):
            continue
        raise UnsupportedField(
            f"{name}: this model's upstream speaks another API, which has nothing like it", param=name
        )


def objects(value: object, name: str) -> list[dict[str, Any]]:
    """The items of a list of objects. Raises InvalidRequest: it is none."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidRequest(f"{name} must be a list of objects", param=name)
    return value


def text_of(content: object, name: str) -> str:
    """Of a string, or of a list of text parts. Raises UnsupportedField: there is something else in it."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = objects(content, name)
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UnsupportedField(f"{name}: only text can be sent here", param=name)
    return "".join(part["text"] for part in parts)


def message_of_error(body: bytes, status: int) -> str:
    """The upstream's own words, in whichever shape they are."""
    try:
        found: Any = decode(body)
        found = found.get("error", found)
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail")
        if isinstance(found, str) and found:
            return found
    except (ValueError, RecursionError):
        pass
    return f"the upstream answered {status}"
