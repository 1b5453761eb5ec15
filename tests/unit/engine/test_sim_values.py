"""Values by schema: each is checked against its schema by an independent validator."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from freehold.engine.sim_values import ValueMaker

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                "parent": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["name", "parent"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: list[Any] = [
    {},
    True,
    {"const": {"a": [1]}},
    {"enum": [None, 1]},
    {"type": "string", "default": "x"},
    {"type": "string", "minLength": 20, "maxLength": 20},
    {"type": "string", "maxLength": 2},
    {"type": "string", "pattern": "^[a-z]+$"},
    {"type": "string", "pattern": r"^\d{5}$"},
    {"type": "string", "format": "date"},
    {"type": ["null", "integer"], "minimum": 10},
    {"type": "integer", "exclusiveMinimum": 3, "maximum": 4},
    {"type": "integer", "multipleOf": 7, "minimum": 8},
    {"type": "integer", "maximum": -5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "array", "items": {"type": "integer"}, "minItems": 3, "uniqueItems": True},
    {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 3, "uniqueItems": True},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "maxItems": 2},
    {"type": "array", "maxItems": 0},
    {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "array"}}}}},
    {"type": "object", "required": ["undeclared"]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2},
    {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"required": ["b"]}], "type": "object"},
    {"oneOf": [{"type": "null"}, {"type": "integer", "minimum": 5}]},
    {"anyOf": [{"type": "null"}]},
    {"properties": {"a": {"type": "string"}}, "required": ["a"]},
    TREE,
    {"properties": {"x/y": {"type": "integer"}, "z": {"$ref": "#/properties/x~1y"}}, "required": ["z"]},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
@pytest.mark.parametrize("text", ["", "Meet Ann Lee in 北京 at 7 or 12.5"])
@pytest.mark.parametrize("variant", [0, 1])
def test_a_value_fits_its_schema(schema: Any, text: str, variant: int) -> None:
    value = ValueMaker(schema, text, variant).make()
    jsonschema_rs.Draft202012Validator(schema, validate_formats=True).validate(value)
    assert json.loads(json.dumps(value)) == value
    assert ValueMaker(schema, text, variant).make() == value


def test_values_come_from_the_text_where_they_fit() -> None:
    schema = {"properties": {"who": {"type": "string"}, "at": {"type": "integer"}, "price": {"type": "number"}}}
    assert ValueMaker(schema, "Meet Ann at 7").make() == {"who": "Ann", "at": 7, "price": 7}
    assert ValueMaker(schema, 'Look for "two words" now').make()["who"] == "two words"
    assert ValueMaker(schema, "nothing here").make() == {"who": "who", "at": 1, "price": 1}


def test_variants_take_the_next_one() -> None:
    schema = {"type": "string"}
    text = "From Paris to London"
    assert [ValueMaker(schema, text, variant).make() for variant in range(3)] == ["Paris", "London", "Paris"]


def test_a_schema_that_only_refers_to_itself_ends() -> None:
    assert ValueMaker({"$ref": "#"}).make() == "value"
    endless = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert json.dumps(ValueMaker(endless).make()).count("next") <= 3
