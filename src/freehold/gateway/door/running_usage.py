"""The usage that every chunk of a stream has where it was asked for (`continuous_usage`), cut out for a client that has
not asked. Every other byte stays as it came.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_KEY: Final = b'"usage"'
_before_value: Final = re.compile(rb'"usage"[ \t]*:[ \t]*')


def without_usage(event: bytes, data: bytes, *, null: bool) -> bytes:
    """An event without the member `usage` of its object, or (null) with null for it, as OpenAI has it.

    data: of the event. Anything that is not found as it should be stays as it is; so do data of several lines, which a
    cut could leave without their ends, and those that have the same member twice: which one to cut cannot be told.
    """
    if _KEY not in data or b"\n" in data:
        return event
    found = _object.decode(data).get("usage")
    value = b"" if found is None else bytes(found)
    if not value.startswith(b"{"):
        return event
    places = [match for match in _before_value.finditer(event) if event.startswith(value, match.end())]
    if len(places) != 1:
        return event
    key, start = places[0].span()
    return _cut(event, key, start, start + len(value), null)


def _cut(event: bytes, key: int, start: int, end: int, null: bool) -> bytes:
    if null:
        return event[:start] + b"null" + event[end:]
    left, right = event[:key].rstrip(), event[end:]
    if left.endswith(b","):
        return left[:-1] + right
    return left + right.lstrip().removeprefix(b",").lstrip()
