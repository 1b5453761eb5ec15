"""Reads the JSON schema of a tool's parameters: which arguments there are, and how each may be written.

GLM writes an argument as raw text where the schema asks for a string and as JSON elsewhere, so a schema has to be taken
apart into the two: `take_apart`. Whatever cannot be taken apart is refused by name, never approximated. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from freehold.engine.schema_shape import Schema, check_shape, rewritten
from freehold.errors import InvalidRequest

# Every keyword that a value can fail; any other is an annotation, or unknown, and means nothing for what is allowed.
_ASSERTIONS = frozenset(
    "type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength minLength pattern "
    "items prefixItems additionalItems maxItems minItems uniqueItems contains minContains maxContains "
    "properties patternProperties additionalProperties maxProperties minProperties required propertyNames "
    "dependentRequired dependentSchemas dependencies unevaluatedItems unevaluatedProperties "
    "anyOf oneOf allOf not if then else $ref $dynamicRef $recursiveRef".split()
)
# What a tool's parameters may say besides: these only speak of properties that the grammar never produces.
_OBJECT_KEYS = frozenset(("type", "properties", "required", "additionalProperties", "patternProperties"))
_STRING_KEYS = frozenset(("type", "pattern", "minLength", "maxLength"))
_PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "null": (type(None),), "boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,),
    "array": (list, tuple), "object": (Mapping,),
}  # fmt: skip
_MAX_DEPTH = 64


class Document:
    """A JSON schema that its own parts may refer to."""

    def __init__(self, schema: Any, where: str) -> None:
        if schema is not None and not isinstance(schema, Mapping):
            raise InvalidRequest(f"{where}: its parameters must be a JSON schema, an object", param="tools")
        self.schema: Schema = schema or {}
        check_shape(self.schema, where, "tools")
        self._has_refs = '"$ref"' in json.dumps(self.schema)

    def resolve(self, schema: Schema | bool, where: str) -> Schema:
        """Follow `$ref`s at the top of a schema and merge an `allOf` of strings. True is the empty schema."""
        for _ in range(_MAX_DEPTH):
            if schema is True:
                return {}
            if schema is False:
                raise InvalidRequest(f"{where}: no value satisfies the schema", param="tools")
            if "$ref" in schema:
                handled, parts = "$ref", [self._pointed_at(schema["$ref"], where)]
            elif "allOf" in schema:
                handled, parts = "allOf", schema["allOf"]
            else:
                return schema
            siblings = {key: value for key, value in schema.items() if key in _ASSERTIONS - {handled}}
            if len(parts) == 1 and not siblings:
                schema = parts[0]
                continue
            parts = [siblings, *(self.resolve(part, where) for part in parts)]
            if not any(_speaks_of_strings(part) for part in parts):
                return schema  # llguidance merges objects and numbers better
            schema = _merged(parts, where)
        raise InvalidRequest(f"{where}: $ref leads in a circle", param="tools")

    def standalone(self, schema: Schema) -> Schema:
        """A part of this document as a schema of its own, its references intact."""
        if not self._has_refs:
            return schema
        moved: dict[str, Any] = _move_refs(dict(schema))
        return {**moved, "$defs": {**moved.get("$defs", {}), _MOVED: _move_refs(self.schema)}}

    def _pointed_at(self, ref: str, where: str) -> Any:
        node: Any = self.schema
        if not (ref == "#" or ref.startswith("#/")):
            raise InvalidRequest(f"{where}: $ref {ref!r} is not within the schema", param="tools")
        for step in ref.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(key)] if isinstance(node, list) else node[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise InvalidRequest(f"{where}: $ref {ref!r} points at nothing", param="tools") from None
        check_shape(node, where, "tools", ref)  # it may point into what is not a schema
        return node


_MOVED = "__document__"


def _speaks_of_strings(schema: Schema) -> bool:
    types = schema.get("type")
    values = [*schema.get("enum", ()), schema.get("const")]
    return types == "string" or "string" in (types or ()) or any(isinstance(value, str) for value in values)


def _merged(parts: Sequence[Schema], where: str) -> dict[str, Any]:
    """The one schema that says what all parts say, if they speak of different things."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key in _ASSERTIONS and merged.setdefault(key, value) != value:
                raise InvalidRequest(f"{where}: {key!r} is given twice, differently, in one schema", param="tools")
    return merged


def _move_refs(schema: Any) -> Any:
    """A copy in which `#/...` refers to a document that was moved to `$defs`."""

    def move(part: Schema) -> Schema:
        ref = part.get("$ref")
        is_local = isinstance(ref, str) and ref.startswith("#")
        return {**part, "$ref": f"#/$defs/{_MOVED}{str(ref)[1:]}"} if is_local else part

    return rewritten(schema, move)


def properties(root: Document, where: str) -> Iterator[tuple[str, Any, bool]]:
    """(name, schema, required) of each argument, in declared order. Refuses what arguments cannot express."""
    schema = root.resolve(root.schema, where)
    unknown = [key for key in schema if key in _ASSERTIONS - _OBJECT_KEYS]
    if unknown or schema.get("type", "object") != "object":
        cause = f"{unknown[0]!r} is not supported" if unknown else f"type is {schema['type']!r}, not 'object'"
        raise InvalidRequest(f"{where}: {cause} at the top of parameters when a call is forced", param="tools")
    declared, required = schema.get("properties", {}), schema.get("required", [])
    for key in dict.fromkeys((*declared, *required)):
        if key not in required and declared[key] is False:
            continue
        yield key, declared.get(key, {}), key in required


@dataclass(slots=True)
class Forms:
    """The ways a value can be written: raw strings (`{"enum": ...}` or string keywords), and JSON of other types."""

    strings: list[Schema] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)


def take_apart(root: Document, schema: Any, where: str, depth: int = 0) -> Forms:
    """The forms of a value; the inverse of how `serve/arguments.py` reads one. Raises InvalidRequest with the cause.

    Without a type, text is read as JSON if it is JSON and as a string if not: so where nothing is asked, any text is
    right, and where something is asked of other types than strings, JSON of those.
    """
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"{where}: $ref leads in a circle", param="tools")
    schema = root.resolve(schema, where)
    types = schema.get("type")
    if "const" in schema or "enum" in schema:
        return _enum_forms(schema, where)
    for union in ("anyOf", "oneOf"):
        if union in schema and _may_be_string(root, schema, where):
            return _union_forms(root, schema, union, where, depth)
    if types == "string" or "string" in (types or ()):
        rest = [] if types == "string" else [kind for kind in types if kind != "string"]
        unknown = [key for key in schema if key in _ASSERTIONS - _STRING_KEYS]
        if unknown and not rest:
            raise InvalidRequest(f"{where}: {unknown[0]!r} is not supported for a string", param="tools")
        string = {key: schema[key] for key in _STRING_KEYS & schema.keys()}
        others = {key: value for key, value in schema.items() if key not in _STRING_KEYS}
        return Forms([string], [{**others, "type": rest}] if rest else [])
    if types is not None or {"anyOf", "oneOf", "allOf", "not"} & schema.keys():
        return Forms(others=[schema])
    constraints = _ASSERTIONS & schema.keys()
    if constraints <= _STRING_KEYS:
        return Forms([{key: schema[key] for key in constraints}])
    if constraints & _STRING_KEYS:
        raise InvalidRequest(f"{where}: keywords of several types need a 'type'", param="tools")
    return Forms(others=[{**schema, "type": [kind for kind in _PYTHON_TYPES if kind != "string"]}])


def _enum_forms(schema: Schema, where: str) -> Forms:
    """Strings as they are, anything else as JSON; a `type` beside the enum narrows both."""
    types = schema.get("type", list(_PYTHON_TYPES))
    allowed = {types} if isinstance(types, str) else set(types)
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    values = [value for value in values if _type_names(value) & allowed and schema.get("const", value) == value]
    strings = [value for value in values if isinstance(value, str)]
    others = [value for value in values if not isinstance(value, str)]
    beside = [key for key in schema if key in _ASSERTIONS - {"enum", "const", "type"}]
    if beside:
        raise InvalidRequest(f"{where}: {beside[0]!r} beside enum or const is not supported", param="tools")
    if others and any(_is_json(value) for value in strings):
        raise InvalidRequest(f"{where}: an enum of strings and other values that are written alike", param="tools")
    return Forms([{"enum": strings}] if strings else [], [{"enum": others}] if others else [])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _type_names(value: Any) -> set[str]:
    names = {name for name, kinds in _PYTHON_TYPES.items() if isinstance(value, kinds)}
    return {"boolean"} if isinstance(value, bool) else names  # a Python bool is an int


def _may_be_string(root: Document, schema: Any, where: str, depth: int = 0) -> bool:
    schema = root.resolve(schema, where)
    if depth > _MAX_DEPTH:
        return True  # `take_apart` names the circle
    unions = [schema[union] for union in ("anyOf", "oneOf") if union in schema]
    if unions:
        return any(_may_be_string(root, branch, where, depth + 1) for union in unions for branch in union)
    forms = take_apart(root, schema, where, depth + 1)
    return bool(forms.strings)


def _union_forms(root: Document, schema: Schema, union: str, where: str, depth: int) -> Forms:
    siblings = {key: value for key, value in schema.items() if key != union}
    merged = Forms()
    for branch in schema[union]:
        forms = take_apart(root, _merged([siblings, root.resolve(branch, where)], where), where, depth + 1)
        merged.strings += forms.strings
        merged.others += forms.others
    if union == "oneOf" and not _are_disjoint(merged.strings):
        raise InvalidRequest(f"{where}: oneOf of strings that overlap is not supported; use anyOf", param="tools")
    if union == "oneOf" and len(merged.others) > 1:
        merged.others = [{"oneOf": merged.others}]
    return merged


def _are_disjoint(strings: Sequence[Schema]) -> bool:
    if any("enum" not in string for string in strings):
        return len(strings) == 1
    values = [value for string in strings for value in string["enum"]]
    return len(values) == len(set(values))
