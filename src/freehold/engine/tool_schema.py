"""Reads the JSON schema of a tool's parameters: which arguments there are, and how each may be written.

GLM writes an argument as raw text where the schema asks for a string and as JSON elsewhere, so a schema has to be taken
apart into the two: `take_apart`. Whatever cannot be taken apart is refused by name, never approximated. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from freehold.errors import InvalidRequest

Schema = Mapping[str, Any]

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "nullable",
     "format", "contentEncoding", "contentMediaType", "$comment", "$schema", "$id", "$defs", "definitions", "strict")
)  # fmt: skip
# What a tool's parameters may say besides: these only speak of properties that the grammar never produces.
_OBJECT_KEYS = frozenset(("type", "properties", "required", "additionalProperties", "patternProperties"))
_STRING_KEYS = frozenset(("type", "pattern", "minLength", "maxLength"))
_MAPS_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_DATA = frozenset(("const", "enum", "default", "example", "examples"))
_PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "null": (type(None),), "boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,),
    "array": (list, tuple), "object": (Mapping,),
}  # fmt: skip
_MAX_DEPTH = 64
_MOST_PROPERTIES = 1_000


class Document:
    """A JSON schema that its own parts may refer to."""

    def __init__(self, schema: Any, where: str) -> None:
        if schema is not None and not isinstance(schema, Mapping):
            raise InvalidRequest(f"{where}: its parameters must be a JSON schema, an object", param="tools")
        self.schema: Schema = schema or {}
        self._has_refs = '"$ref"' in json.dumps(self.schema)

    def resolve(self, schema: Any, where: str) -> Schema:
        """Follow `$ref`s at the top of a schema and merge an `allOf` of strings. True is the empty schema."""
        for _ in range(_MAX_DEPTH):
            if schema is True:
                return {}
            if not isinstance(schema, Mapping):
                raise InvalidRequest(f"{where}: {schema!r} is not a JSON schema that a value can have", param="tools")
            if "$ref" in schema:
                parts = [self._pointed_at(schema["$ref"], where)]
            elif isinstance(schema.get("allOf"), list | tuple):
                parts = [self.resolve(part, where) for part in schema["allOf"]]
                if len(parts) > 1 and not any(_speaks_of_strings(part) for part in (schema, *parts)):
                    return schema  # objects and numbers are llguidance's to merge
            else:
                return schema
            siblings = {key: value for key, value in schema.items() if key not in _ANNOTATIONS | {"$ref", "allOf"}}
            schema = parts[0] if len(parts) == 1 and not siblings else _merged([siblings, *parts], where)
        raise InvalidRequest(f"{where}: $ref leads in a circle", param="tools")

    def standalone(self, schema: Schema) -> Schema:
        """A part of this document as a schema of its own, its references intact."""
        if not self._has_refs:
            return schema
        moved: dict[str, Any] = _move_refs(dict(schema))
        return {**moved, "$defs": {**moved.get("$defs", {}), _MOVED: _move_refs(self.schema)}}

    def _pointed_at(self, ref: Any, where: str) -> Any:
        node: Any = self.schema
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise InvalidRequest(f"{where}: $ref {ref!r} is not within the schema", param="tools")
        for step in ref.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(key)] if isinstance(node, list) else node[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise InvalidRequest(f"{where}: $ref {ref!r} points at nothing", param="tools") from None
        return node


_MOVED = "__document__"


def _speaks_of_strings(schema: Schema) -> bool:
    types = schema.get("type")
    values = [*schema.get("enum", ()), schema.get("const")]
    return (
        types == "string" or (isinstance(types, list) and "string" in types) or any(isinstance(v, str) for v in values)
    )


def _merged(parts: Sequence[Any], where: str) -> dict[str, Any]:
    """The one schema that says what all parts say, if they speak of different things."""
    merged: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, Mapping) and part is not True:
            raise InvalidRequest(f"{where}: {part!r} is not a JSON schema that a value can have", param="tools")
        for key, value in ({} if part is True else part).items():
            if key not in _ANNOTATIONS and merged.setdefault(key, value) != value:
                raise InvalidRequest(f"{where}: {key!r} is given twice, differently, in one schema", param="tools")
    return merged


def rewritten(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """A copy of a schema with `change` applied to every schema in it, and to nothing that only looks like one."""
    if isinstance(schema, list | tuple):
        return [rewritten(part, change) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = {}
    for key, value in change(schema).items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, Mapping):
            copy[key] = {name: rewritten(part, change) for name, part in value.items()}
        else:
            copy[key] = value if key in _DATA else rewritten(value, change)
    return copy


def _move_refs(schema: Any) -> Any:
    """A copy in which `#/...` refers to a document that was moved to `$defs`."""

    def move(part: Schema) -> Schema:
        ref = part.get("$ref")
        if isinstance(ref, str) and ref.startswith("#"):
            return {**part, "$ref": f"#/$defs/{_MOVED}{ref[1:]}"}
        return part

    return rewritten(schema, move)


def properties(root: Document, where: str) -> Iterator[tuple[str, Any, bool]]:
    """(name, schema, required) of each argument, in declared order. Refuses what arguments cannot express."""
    schema = root.resolve(root.schema, where)
    unknown = [key for key in schema if key not in _ANNOTATIONS | _OBJECT_KEYS and not key.startswith("x-")]
    if unknown or schema.get("type", "object") != "object":
        cause = f"{unknown[0]!r} is not supported" if unknown else f"type is {schema['type']!r}, not 'object'"
        raise InvalidRequest(f"{where}: {cause} at the top of parameters when a call is forced", param="tools")
    declared, required = schema.get("properties", {}), schema.get("required", [])
    named = isinstance(required, list | tuple) and all(isinstance(key, str) for key in required)
    if not isinstance(declared, Mapping) or not named:
        raise InvalidRequest(f"{where}: properties must be an object and required a list of names", param="tools")
    check_size(declared, where)
    for key in dict.fromkeys((*declared, *required)):
        if key not in required and declared[key] is False:
            continue
        yield key, declared.get(key, {}), key in required


def check_size(declared: Any, where: str = "schema") -> None:
    """Refuse an object with so many properties that compiling it, which takes time in their square, would not end."""
    if isinstance(declared, Mapping) and len(declared) > _MOST_PROPERTIES:
        raise InvalidRequest(
            f"{where}: {len(declared):,} properties of one object are more than the {_MOST_PROPERTIES:,} that can be "
            "enforced"
        )


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
    if "type" in schema and not isinstance(types, str | list | tuple):
        raise InvalidRequest(f"{where}: type must be a name or a list of names", param="tools")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list | tuple):
            raise InvalidRequest(f"{where}: enum must be a list", param="tools")
        return _enum_forms(schema, values, where)
    for union in ("anyOf", "oneOf"):
        if isinstance(schema.get(union), list | tuple) and _may_be_string(root, schema, where):
            return _union_forms(root, schema, union, where, depth)
    if types == "string" or (isinstance(types, list | tuple) and "string" in types):
        rest = [] if types == "string" else [kind for kind in types if kind != "string"]
        unknown = [key for key in schema if key not in _STRING_KEYS | _ANNOTATIONS and not key.startswith("x-")]
        if unknown and not rest:
            raise InvalidRequest(f"{where}: {unknown[0]!r} is not supported for a string", param="tools")
        string = {key: schema[key] for key in _STRING_KEYS & schema.keys()}
        others = {key: value for key, value in schema.items() if key not in _STRING_KEYS}
        return Forms([string], [{**others, "type": rest}] if rest else [])
    constraints = [key for key in schema if key not in _ANNOTATIONS and not key.startswith("x-")]
    if not constraints or _STRING_KEYS & schema.keys() - {"type"}:
        return Forms([{key: schema[key] for key in _STRING_KEYS & schema.keys()}])  # any text will do
    if types is None and not {"anyOf", "oneOf", "allOf", "not"} & schema.keys():
        return Forms(others=[{**schema, "type": [kind for kind in _PYTHON_TYPES if kind != "string"]}])
    return Forms(others=[schema])


def _enum_forms(schema: Schema, values: Sequence[Any], where: str) -> Forms:
    """Strings as they are, anything else as JSON; a `type` beside the enum narrows both."""
    types = schema.get("type", list(_PYTHON_TYPES))
    allowed = {types} if isinstance(types, str) else {kind for kind in types if isinstance(kind, str)}
    values = [value for value in values if _type_names(value) & allowed]
    strings = [value for value in values if isinstance(value, str)]
    others = [value for value in values if not isinstance(value, str)]
    beside = [key for key in schema if key not in _ANNOTATIONS | {"enum", "const", "type"} and not key.startswith("x-")]
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
    unions = [schema[union] for union in ("anyOf", "oneOf") if isinstance(schema.get(union), list | tuple)]
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
