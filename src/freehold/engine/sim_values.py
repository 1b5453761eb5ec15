"""A JSON value that a JSON schema accepts, made without a model: for the tool calls and JSON of the simulated engine.

Honoured: $ref (within the schema), const, enum, default, type (also a list), properties, required, minProperties,
items, prefixItems, minItems, maxItems, minLength, maxLength, minimum, maximum, exclusiveMinimum, exclusiveMaximum,
multipleOf, allOf, anyOf, oneOf, common formats, and `pattern` as far as one of a few samples matches. Values are taken
from the words and numbers of a text where they fit, so that "the weather in Paris" asks for Paris. Deterministic;
torch-free.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "email": "someone@example.org",
    "hostname": "example.org",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_SAMPLES = (
    "a",
    "A",
    "1",
    "abc",
    "ABC",
    "123",
    "0001",
    "12345",
    "abc123",
    "a-b",
    "a_b",
    "AB-123",
    "#00ff00",
    "+491234567",
)
_OPTIONAL_DEPTH = 2  # objects below this depth get their required properties only
_CHOICE_DEPTH = 4  # from this depth on, alternatives that do not refer elsewhere are preferred, so that recursion ends


class ValueMaker:
    """Makes values for one schema document. `variant` picks other words, numbers and enum members."""

    def __init__(self, root: Any, text: str = "", variant: int = 0) -> None:
        self.root = root
        self.variant = variant
        self._words = _quoted(text) or _proper_words(text)
        self._numbers = [json.loads(number) for number in re.findall(r"-?\b(?:0|[1-9]\d*)(?:\.\d+)?\b", text)]

    def make(self, schema: Any = None, name: str = "value", depth: int = 0) -> Any:
        """A value for `schema` (default: the root). `name` is the property it is for."""
        schema = self._resolve(self.root if schema is None else schema, depth)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][self.variant % len(schema["enum"])]
        if "default" in schema:
            return schema["default"]
        match _type(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, name, depth)
            case "integer":
                return self._number(schema, integer=True)
            case "number":
                return self._number(schema, integer=False)
            case "boolean":
                return self.variant % 2 == 0
            case "null":
                return None
            case _:
                return self._string(schema, name)

    def _resolve(self, schema: Any, depth: int) -> dict[str, Any]:
        """The schema with its references followed, its parts merged and one alternative chosen."""
        merged: dict[str, Any] = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"type": "null"}
        for _ in range(32):  # a reference that leads to itself has no value anyway
            if "$ref" in merged:
                target = self._lookup(str(merged.pop("$ref")))
                merged = {**target, **merged}
            elif "allOf" in merged:
                for part in merged.pop("allOf"):
                    merged = _merge(merged, self._resolve(part, depth))
            elif "anyOf" in merged or "oneOf" in merged:
                options = merged.pop("anyOf" if "anyOf" in merged else "oneOf")
                merged = _merge(merged, self._choose(options, depth))
            else:
                break
        return merged

    def _choose(self, options: list[Any], depth: int) -> dict[str, Any]:
        dicts = [dict(option) for option in options if isinstance(option, Mapping)]
        valued = [option for option in dicts if option.get("type") != "null"]
        if depth >= _CHOICE_DEPTH:
            closed = [option for option in dicts if "$ref" not in json.dumps(option)]
            return (closed or valued or [{}])[0]
        return (valued or dicts or [{}])[0]

    def _lookup(self, reference: str) -> dict[str, Any]:
        node = self.root
        for part in reference.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            node = node[int(key)] if isinstance(node, list) else node.get(key, {}) if isinstance(node, Mapping) else {}
        return dict(node) if isinstance(node, Mapping) else {}

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        names = [name for name in properties if name in required or depth < _OPTIONAL_DEPTH]
        names += [name for name in required if name not in properties]
        value = {name: self.make(properties.get(name, True), name, depth + 1) for name in names}
        extra = schema.get("additionalProperties", True)
        for number in range(schema.get("minProperties", 0) - len(value)):
            value[f"key{number + 1}"] = self.make(extra, "value", depth + 1)
        return value

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        first = schema.get("prefixItems", [])
        wanted = max(schema.get("minItems", 0), len(first), 1 if depth < _CHOICE_DEPTH else 0)
        count = min(wanted, schema.get("maxItems", wanted))
        items: list[Any] = []
        variant = self.variant
        tries = 0
        while len(items) < count:
            of = first[len(items)] if len(items) < len(first) else schema.get("items", True)
            item = self.make(of, name, depth + 1)
            tries += 1
            self.variant += 1  # so that items differ
            if not (schema.get("uniqueItems") and item in items and tries < 100):
                items.append(item)
        self.variant = variant
        return items

    def _number(self, schema: dict[str, Any], *, integer: bool) -> int | float:
        fitting = [n for n in self._numbers if not integer or isinstance(n, int)]
        value = fitting[self.variant] if self.variant < len(fitting) else 1 + self.variant
        low = schema.get("minimum", -math.inf)
        high = schema.get("maximum", math.inf)
        step = schema.get("multipleOf", 1 if integer else None)
        nudge = step or 0.5
        low = max(low, schema.get("exclusiveMinimum", -math.inf) + nudge)
        high = min(high, schema.get("exclusiveMaximum", math.inf) - nudge)
        value = min(max(value, low), high)
        if step:
            value = math.ceil(value / step) * step
            value = value - step if value > high else value
        return int(value) if integer else value

    def _string(self, schema: dict[str, Any], name: str) -> str:
        if schema.get("format") in _FORMATS:
            return _FORMATS[schema["format"]]
        value = self._words[self.variant % len(self._words)] if self._words else name
        pattern = schema.get("pattern")
        if pattern:
            value = next((sample for sample in (value, *_SAMPLES) if _matches(pattern, sample)), value)
        value = value.ljust(schema.get("minLength", 0), "x")
        return value[: schema.get("maxLength", len(value))]


def _type(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if isinstance(kind, str):
        return kind
    if "properties" in schema or "required" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else "string"


def _merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both sets of demands; of two that contradict each other, the second."""
    merged = {**one, **other}
    if "properties" in one and "properties" in other:
        merged["properties"] = {**one["properties"], **other["properties"]}
    if "required" in one and "required" in other:
        merged["required"] = [*one["required"], *(name for name in other["required"] if name not in one["required"])]
    return merged


def _matches(pattern: str, sample: str) -> bool:
    try:
        return re.search(pattern, sample) is not None
    except re.error:
        return True


def _quoted(text: str) -> list[str]:
    return [group for match in re.findall(r'"([^"\n]+)"|“([^”\n]+)”', text) for group in match if group]


def _proper_words(text: str) -> list[str]:
    """Words that look like names: capitalised but not first in a sentence, or not in Latin script at all."""
    words = re.findall(r"(?<![.!?\n])(?<!^)\s([A-Z][\w-]+)|([^\x00-\u024f\u2000-\u206f\s，。？！、：；（）]+)", text)
    return [group for match in words for group in match if group]
