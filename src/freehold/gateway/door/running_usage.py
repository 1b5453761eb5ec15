"""The usage that every chunk of a stream has where it was asked for (`continuous_usage`), cut out for a client that has
not asked. Every other byte stays as it came.
"""

from __future__ import annotations

from typing import Final

import msgspec

_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_KEY: Final = b'"usage"'


def without_usage(event: bytes, data: bytes, *, null: bool) -> bytes:
    """An event without the member `usage` of its object, or (null) with null for it, as OpenAI has it.

    data: of the event. Anything that is not found as it should be stays as it is.
    """
    if _KEY not in data:
        return event
    found = _object.decode(data).get("usage")
    value = b"" if found is None else bytes(found)
    if not value.startswith(b"{"):
        return event
    end = len(event)
    while (at := event.rfind(value, 0, end)) >= 0:
        before = event[:at].rstrip()
        key = before[:-1].rstrip()
        if before.endswith(b":") and key.endswith(_KEY):
            return _cut(event, len(key) - len(_KEY), at, at + len(value), null)
        end = at + len(value) - 1
    return event


def _cut(event: bytes, key: int, start: int, end: int, null: bool) -> bytes:
    if null:
        return event[:start] + b"null" + event[end:]
    left, right = event[:key].rstrip(), event[end:]
    if left.endswith(b","):
        return left[:-1] + right
    return left + right.lstrip().removeprefix(b",").lstrip()
