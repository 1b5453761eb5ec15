"""Tool-call arguments from GLM's wire format to JSON, typed by the tool's schema, in fragments as they come.

On the wire every value is text: strings as they are, everything else as JSON. Whether `5` is a number or a string
only the schema says. A value that can only be a string streams; another one is given out when it is complete.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

_ALL = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_STRING = frozenset({"string"})
_MAX_DEPTH = 16  # of references and unions inside a schema
_SURROGATE = re.compile("[\ud800-\udfff]")  # an escape can make one, and no encoding can write it


class ArgumentsWriter:
    """Writes one JSON object. The fragments that its methods return concatenate to the object.

    Call open_value, text (any number of times) and close_value for each argument, then finish. `finish(cut=True)`
    ends the object wherever generation stopped: a string that was streaming is closed as far as it got, a value that
    was not complete otherwise is left out.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._keys: set[str] = set()
        self._key = ""
        self._types: frozenset[str] | None = None
        self._mode: str | None = None  # of the open value: "skip", "whole", "maybe null", "string"
        self._begun = False  # the opening quote of a streaming string is out
        self._text = ""

    def open_value(self, key: str) -> None:
        """Begin an argument. One that was there before is skipped: a JSON object has each key once."""
        properties = self._schema.get("properties")
        if isinstance(properties, Mapping) and key not in properties:
            key = key.strip() or key
        self._key, self._text, self._begun = key, "", False
        self._types = accepted_types(self._property(key), self._schema)
        if key in self._keys:
            self._mode = "skip"
        elif self._types == _STRING:
            self._mode = "string"
        elif self._types == _STRING | {"null"}:
            self._mode = "maybe null"
        else:
            self._mode = "whole"

    def text(self, text: str) -> str:
        """More of the open value; the fragment that is now certain."""
        if self._mode == "string":
            return self._begin() + _escaped(text) if text else ""
        if self._mode != "skip":
            self._text += text
        if self._mode == "maybe null" and not "null".startswith(self._text):
            self._mode = "string"
            return self._begin() + _escaped(self._text)
        return ""

    def close_value(self) -> str:
        """The open value is complete."""
        mode, self._mode = self._mode, None
        if mode is None or mode == "skip":
            return ""
        if mode == "string":
            return self._begin() + '"'
        return self._name() + to_json(self._text, self._types)

    def finish(self, *, cut: bool = False) -> str:
        """End the object. cut: generation stopped before the model had ended it."""
        last = ""
        if not cut:
            last = self.close_value()
        elif self._mode == "string" and self._begun:
            last = '"'
        self._mode = None
        return last + ("}" if self._keys else "{}")

    def _begin(self) -> str:
        if self._begun:
            return ""
        self._begun = True
        return self._name() + '"'

    def _name(self) -> str:
        start = ", " if self._keys else "{"
        self._keys.add(self._key)
        return f"{start}{json.dumps(self._key, ensure_ascii=False)}: "

    def _property(self, key: str) -> Any:
        properties = self._schema.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            return properties[key]
        return self._schema.get("additionalProperties")


def accepted_types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str] | None:
    """The JSON types that a schema accepts; None if it does not say. `number` includes `integer`.

    Follows local references, `anyOf`, `oneOf`, `allOf`, `enum`, `const`, lists of types, and OpenAPI's `nullable`.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return None
    found: frozenset[str] | None = None

    def narrow(types: frozenset[str] | None) -> None:
        nonlocal found
        if types is not None:
            found = types if found is None else _common(found, types)

    if isinstance(schema.get("$ref"), str):
        narrow(accepted_types(_resolve(schema["$ref"], root), root, depth + 1))
    kind = schema.get("type")
    if isinstance(kind, str | list):
        names = {kind} if isinstance(kind, str) else {name for name in kind if isinstance(name, str)}
        narrow(frozenset(names) & _ALL or None)
    if isinstance(schema.get("enum"), list):
        narrow(frozenset(map(_type_of, schema["enum"])))
    if "const" in schema:
        narrow(frozenset({_type_of(schema["const"])}))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            options = [accepted_types(option, root, depth + 1) for option in schema[key]]
            narrow(None if None in options else frozenset().union(*(o for o in options if o)))
    for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        narrow(accepted_types(part, root, depth + 1))
    return found | {"null"} if found is not None and schema.get("nullable") is True else found


def to_json(text: str, types: frozenset[str] | None) -> str:
    """A value's wire text as JSON text of one of the types (None: any).

    JSON of an accepted type is taken as it was written. Otherwise, where a string is accepted it is that string;
    else near misses are mended (`True`, `None`, `{'a': 1}`, `5.0` for an integer, JSON inside a JSON string); else
    the value is given out as it is, valid JSON of another type, or a string.
    """
    written = text.strip()
    kind = _json_type(written)
    if kind is not None and kind != "string" and _accepts(types, kind):
        return written
    if types is None or "string" in types:
        return json.dumps(text, ensure_ascii=False)
    if kind == "string":  # a string is not accepted: perhaps what it contains is
        inner = str(json.loads(written)).strip()
        inner_kind = _json_type(inner)
        fits = inner_kind is not None and _accepts(types, inner_kind) and not _SURROGATE.search(inner)
        return inner if fits else written
    mended = _mend(written, types)
    if mended is not None:
        return mended
    return written if kind is not None else json.dumps(text, ensure_ascii=False)


def _mend(written: str, types: frozenset[str]) -> str | None:
    word = {"true": "true", "false": "false", "none": "null", "null": "null"}.get(written.lower())
    try:
        value = json.loads(word) if word is not None else ast.literal_eval(written)
        if isinstance(value, float) and value.is_integer() and "integer" in types:
            value = int(value)
        if not _accepts(types, _type_of(value)):
            return None
        return json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _json_type(text: str) -> str | None:
    """The type of a JSON text, None if it is not JSON. Numbers are not converted, so any length is fine."""
    try:
        value = json.loads(text, parse_int=lambda _: 0, parse_float=lambda _: 0.5, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return _type_of(value)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list | tuple) else "object"


def _accepts(types: frozenset[str] | None, kind: str) -> bool:
    return types is None or kind in types or (kind == "integer" and "number" in types)


def _common(left: frozenset[str], right: frozenset[str]) -> frozenset[str]:
    both = {kind for kind in left | right if _accepts(left, kind) and _accepts(right, kind)}
    return frozenset(both) or left  # a schema that contradicts itself says nothing of use


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    if not reference.startswith("#"):
        return None
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
