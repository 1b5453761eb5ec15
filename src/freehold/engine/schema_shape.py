"""Whether a JSON schema has the shape of one, and walking through it. Torch-free.

Schemas come from clients. Everything after `check_shape` may rely on keywords having the types that the JSON Schema
specification (2020-12) gives them; what they mean is for `tool_schema` and llguidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from freehold.errors import InvalidRequest

Schema = Mapping[str, Any]

_MOST_PROPERTIES = 1_000  # of one object: compiling takes time in their square
_MAPS_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_LISTS_OF_SCHEMAS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))
_SCHEMAS = frozenset(
    ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
     "unevaluatedItems", "unevaluatedProperties")
)  # fmt: skip
_DATA = frozenset(("const", "enum", "default", "example", "examples"))
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def check_shape(schema: Any, where: str, param: str, path: str = "#") -> None:
    """Raises InvalidRequest naming the place and the keyword whose value is not what the specification says."""

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise InvalidRequest(f"{where}: {path}: {problem}", param=param)

    if isinstance(schema, bool):
        return
    require(isinstance(schema, Mapping), f"a JSON schema is an object or a boolean, not {_short(schema)}")
    for key, value in schema.items():
        problem = f"{key!r} cannot be {_short(value)}"
        if key in _MAPS_OF_SCHEMAS:
            require(isinstance(value, Mapping), problem)
            require(
                len(value) <= _MOST_PROPERTIES,
                f"{len(value):,} {key} in one object are more than the {_MOST_PROPERTIES:,} that can be enforced",
            )
            for name, part in value.items():
                check_shape(part, where, param, f"{path}/{key}/{name}")
        elif key in _LISTS_OF_SCHEMAS:
            require(isinstance(value, list | tuple), problem)
            for index, part in enumerate(value):
                check_shape(part, where, param, f"{path}/{key}/{index}")
        elif key in _SCHEMAS:
            check_shape(value, where, param, f"{path}/{key}")
        elif key == "type":
            names = [value] if isinstance(value, str) else value
            require(isinstance(names, list | tuple) and all(name in _TYPES for name in names), problem)
        elif key == "required":
            require(isinstance(value, list | tuple) and all(isinstance(name, str) for name in value), problem)
        elif key == "enum":
            require(isinstance(value, list | tuple), problem)
        elif key in ("$ref", "pattern", "format"):
            require(isinstance(value, str), problem)
        elif key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
            require(isinstance(value, int) and not isinstance(value, bool) and value >= 0, problem)


def rewritten(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """A copy of a schema with `change` applied to every schema in it, but not to values of `const` and their like.

    Under unknown keywords there may be schemas that a `$ref` points at, or anything else: `change` must expect that.
    """
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
