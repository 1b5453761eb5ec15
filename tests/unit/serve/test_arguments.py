"""Wire values to JSON by schema, in fragments, whole or cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from freehold.serve.arguments import ArgumentsWriter, accepted_types, to_json

ANY: dict[str, Any] = {}
NULLABLE: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "null"}]}


def properties(**schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schemas}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, ' "quoted"\n', ' "quoted"\n'),
        ({"type": "string"}, "", ""),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "null"}, "null", "null"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " 5 ", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, '"5"', 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, '{"a": 1}', {"a": 1}),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "-1.25e3", -1250.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, "[1, [2]]", [1, [2]]),
        ({"type": "array"}, "['a', None]", ["a", None]),
        ({"type": "array"}, '"[1]"', [1]),
        ({"type": "object"}, '{"北": "京"}', {"北": "京"}),
        ({"type": "object"}, "{'a': True}", {"a": True}),
        ({"type": "object"}, "{1, 2}", "{1, 2}"),
        ({"type": "object"}, '"{\\"a\\": \\"\\ud800\\"}"', '{"a": "\ud800"}'),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        (NULLABLE, "null", None),
        (NULLABLE, "nullable", "nullable"),
        (NULLABLE, "nul", "nul"),
        (NULLABLE, "5", "5"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5.5", "5.5"),
        ({"type": ["string", "integer"]}, '"5"', '"5"'),
        ({"enum": [1, "a", None]}, "1", 1),
        ({"enum": [1, "a", None]}, "a", "a"),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
        ({"allOf": [{"$ref": "#/$defs/Name"}]}, "5", "5"),
        ({"type": "integer", "nullable": True}, "null", None),
        (ANY, "5", 5),
        (ANY, "text", "text"),
        (ANY, '"text"', '"text"'),
        (True, "[1]", [1]),
        ({"type": "whatever"}, "[1]", [1]),
    ],
)
def test_values_are_typed_by_the_schema(schema: Any, text: str, value: Any) -> None:
    root = {**properties(v=schema), "$defs": {"Point": {"type": "object"}, "Name": {"type": "string"}}}
    for step in (1, 3, max(1, len(text))):
        writer = ArgumentsWriter(root)
        writer.open_value("v")
        parts = [writer.text(text[i : i + step]) for i in range(0, len(text), step)]
        written = "".join([*parts, writer.close_value(), writer.finish()])
        assert json.loads(written) == {"v": value}
        assert type(json.loads(written)["v"]) is type(value)


def test_json_stays_as_it_was_written() -> None:
    digits = "9" * 5000
    assert to_json(f" {digits} ", frozenset({"integer"})) == digits
    assert to_json("1.10", frozenset({"number"})) == "1.10"
    assert to_json('{"a":  1}', None) == '{"a":  1}'


def test_strings_stream_and_other_values_wait() -> None:
    writer = ArgumentsWriter(properties(s={"type": "string"}, n={"type": "integer"}, o=NULLABLE))
    writer.open_value("s")
    assert [writer.text('a"'), writer.text("\n京"), writer.close_value()] == ['{"s": "a\\"', "\\n京", '"']
    writer.open_value("n")
    assert [writer.text("1"), writer.text("2"), writer.close_value()] == ["", "", ', "n": 12']
    writer.open_value("o")
    assert [writer.text("nu"), writer.text("mb"), writer.close_value()] == ["", ', "o": "numb', '"']
    assert writer.finish() == "}"


def test_no_arguments() -> None:
    assert ArgumentsWriter({}).finish() == "{}"
    assert ArgumentsWriter({}).finish(cut=True) == "{}"


@pytest.mark.parametrize(
    ("kind", "text", "whole"),
    [("string", "abc", {"v": "abc"}), ("string", "", {}), ("integer", "12", {}), (["string", "null"], "nu", {})],
)
def test_cut_values(kind: Any, text: str, whole: dict[str, Any]) -> None:
    writer = ArgumentsWriter(properties(v={"type": kind}))
    writer.open_value("v")
    assert json.loads(writer.text(text) + writer.finish(cut=True)) == whole


def test_a_value_that_the_model_left_open_is_complete() -> None:
    writer = ArgumentsWriter(properties(v={"type": "integer"}))
    writer.open_value("v")
    assert writer.text("12") + writer.finish() == '{"v": 12}'


def test_the_first_of_two_values_counts() -> None:
    writer = ArgumentsWriter({})
    parts = []
    for text in ("1", "2"):
        writer.open_value("v")
        parts += [writer.text(text), writer.close_value()]
    assert "".join([*parts, writer.finish()]) == '{"v": 1}'


def test_keys_are_escaped_and_trimmed_unless_declared_so() -> None:
    writer = ArgumentsWriter(properties(**{" a ": {"type": "string"}}))
    parts = []
    for key in (" a ", "\nb\n", '"', " "):
        writer.open_value(key)
        parts += [writer.text("1"), writer.close_value()]
    assert json.loads("".join([*parts, writer.finish()])) == {" a ": "1", "b": 1, '"': 1, " ": 1}


def test_undeclared_keys_follow_additional_properties() -> None:
    writer = ArgumentsWriter({**properties(), "additionalProperties": {"type": "string"}})
    writer.open_value("v")
    assert writer.text("1") + writer.close_value() == '{"v": "1"'


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({}, None),
        (False, None),
        ({"$ref": "https://example.com"}, None),
        ({"$ref": "#/$defs/Loop"}, None),
        ({"$ref": "#/$defs/a~1b"}, {"array"}),
        ({"anyOf": [{"type": "string"}, {}]}, None),
        ({"oneOf": [{"type": "string"}, {"const": 1}]}, {"string", "integer"}),
        ({"allOf": [{"type": "number"}, {"type": ["integer", "string"]}]}, {"integer"}),
        ({"type": "string", "enum": ["a", None]}, {"string"}),
        ({"type": "string", "const": 1}, {"string"}),
        ({"enum": [1.5, True, [], {}]}, {"number", "boolean", "array", "object"}),
    ],
)
def test_accepted_types(schema: Any, types: set[str] | None) -> None:
    root = {"$defs": {"Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}]}, "a/b": {"type": "array"}}}
    assert accepted_types(schema, root) == (None if types is None else frozenset(types))
