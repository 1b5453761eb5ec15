"""Structured output: what the grammar lets through, what is refused before generation, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest

from freehold.engine.guide import GuideCompiler, GuideState, _cause
from freehold.errors import EngineError, InvalidRequest, UnsupportedField
from freehold.model.tokenizer import Tokenizer
from freehold.types import Guide, ToolSpec

TOKENIZER = Tokenizer.toy(1024)
EOS = tuple(TOKENIZER.special_id(text) or 0 for text in ("<|endoftext|>", "<|user|>", "<|observation|>"))
COMPILER = GuideCompiler(TOKENIZER, EOS)
# Tokens that close something: a uniform choice among a thousand would hardly ever end a string.
CLOSING = np.array([TOKENIZER.is_special(i) or bool(set(b'"]}>') & set(TOKENIZER.token_bytes(i))) for i in range(1024)])

WEATHER = ToolSpec(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "area": {"$ref": "#/$defs/Area"},
            "code": {"anyOf": [{"type": "string", "pattern": "^[A-Z]{2}$"}, {"type": "null"}]},
        },
        "required": ["city", "days"],
        "$defs": {
            "Area": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 8}, "inner": {"$ref": "#/$defs/Area"}},
                "required": ["name"],
                "additionalProperties": False,
            }
        },
    },
)
NOW = ToolSpec("get_time", {})


def allowed(state: GuideState) -> np.ndarray[Any, Any]:
    return np.flatnonzero(np.unpackbits(state.fill_mask(), bitorder="little"))


def generate(guide: Guide, seed: int, compiler: GuideCompiler = COMPILER, longest: int = 400) -> list[int]:
    """Random tokens under the mask, without the last one; leans to what closes something, so that it ends."""
    state, random, tokens = compiler.compile(guide), np.random.default_rng(seed), []
    while len(tokens) < longest:
        choices = allowed(state)
        assert len(choices), "dead end"
        ends = [token for token in choices if token in EOS]
        assert not ends or list(ends) == list(EOS)
        if ends and random.random() < 0.5:
            assert not state.is_finished or len(choices) == len(EOS)
            state.accept(EOS[seed % len(EOS)])
            assert state.is_finished
            assert sorted(allowed(state)) == sorted(EOS)
            return tokens
        closing = choices[CLOSING[choices] & ~np.isin(choices, EOS)]
        rest = choices[~np.isin(choices, EOS)]
        token = int(
            random.choice(closing if len(closing) and random.random() < 0.6 else rest if len(rest) else choices)
        )
        if token in EOS:
            return tokens
        state.accept(token)
        tokens.append(token)
    pytest.skip("did not end")  # bounded by the caller's count of ended ones


def accepts(guide: Guide, text: str) -> bool:
    """Whether the whole text, and then the end, is allowed."""
    state = COMPILER.compile(guide)
    for token in TOKENIZER.encode(text):
        if token not in allowed(state):
            return False
        state.accept(token)
    return EOS[0] in allowed(state)


def calls_in(tokens: list[int]) -> list[tuple[str, dict[str, str]]]:
    """(name, key → wire text) of each call. Only control tokens count as tags, whatever the text spells."""
    text = "".join(
        TOKENIZER.decode([t])
        if TOKENIZER.is_special(t)
        else TOKENIZER.token_bytes(t).decode("latin-1").replace("<", "‹")
        for t in tokens
    )
    call = r"<tool_call>([^<]*)((?:<arg_key>[^<]*</arg_key><arg_value>[^<]*</arg_value>)*)</tool_call>"
    assert re.fullmatch(f"(?:{call})+", text), text
    found = []
    for name, arguments in re.findall(call, text):
        pairs = re.findall(r"<arg_key>([^<]*)</arg_key><arg_value>([^<]*)</arg_value>", arguments)
        assert len(pairs) == len(dict(pairs))
        found.append((_utf8(name), {_utf8(key): _utf8(value) for key, value in pairs}))
    return found


def _utf8(text: str) -> str:
    return text.replace("‹", "<").encode("latin-1").decode("utf-8")


def read(text: str, schema: Any, root: Any) -> Any:
    """A wire value as the value that the schema accepts: the raw string, or else JSON."""
    validator = jsonschema.Draft202012Validator({"$defs": root.get("$defs", {}), **schema})
    if validator.is_valid(text) and not (text == "null" and validator.is_valid(None)):
        return text
    return json.loads(text)


@pytest.mark.parametrize("seed", range(12))
def test_json_object(seed: int) -> None:
    assert isinstance(json.loads(TOKENIZER.decode(generate(Guide("json_object"), seed))), dict)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("parallel", [True, False])
def test_tool_calls_are_in_the_grammar_and_fit_the_schema(seed: int, parallel: bool) -> None:
    calls = calls_in(generate(Guide("tool_call", tools=(WEATHER, NOW), parallel=parallel), seed))
    assert parallel or len(calls) == 1
    for name, wire in calls:
        tool = {"get_weather": WEATHER, "get_time": NOW}[name]
        properties = tool.schema.get("properties", {})
        assert list(wire) == [key for key in properties if key in wire], "declared order"
        values = {key: read(text, properties[key], tool.schema) for key, text in wire.items()}
        jsonschema.validate(values, {"type": "object", **tool.schema})


def test_parallel_calls_and_both_tools_do_come() -> None:
    seen = [calls_in(generate(Guide("tool_call", tools=(WEATHER, NOW)), seed)) for seed in range(30)]
    assert max(map(len, seen)) > 1
    assert {name for calls in seen for name, _ in calls} == {"get_weather", "get_time"}


@pytest.mark.parametrize(
    "guide", [Guide("json_object", thinking=True), Guide("tool_call", tools=(NOW,), thinking=True)]
)
def test_thinking_comes_first(guide: Guide) -> None:
    tokens = generate(guide, 3)
    end = tokens.index(TOKENIZER.special_id("</think>") or 0)
    assert not any(TOKENIZER.is_special(token) for token in tokens[:end])
    rest = tokens[end + 1 :]
    assert calls_in(rest) if guide.tools else isinstance(json.loads(TOKENIZER.decode(rest)), dict)


def call(arguments: str) -> str:
    return f"<tool_call>f{arguments}</tool_call>"


def argument(value: str, key: str = "a") -> str:
    return f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ["", "plain", '"quoted"', "a\n<b> 北京", "</arg_value"], []),
        ({"enum": ["on", "off"]}, ["on", "off"], ["o", '"on"', "of f", ""]),
        ({"type": "string", "const": 'a "b"\\'}, ['a "b"\\'], ["a"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "北京市"], ["a", "abcd"]),
        ({"type": "string", "pattern": "^a+$|z"}, ["aaa", "xzx"], ["ab", "x"]),
        ({"type": "string", "pattern": r"^\d{2}/[^|/]$"}, ["12/x"], ["12/|", "1/x"]),
        ({"type": "integer"}, ["5", "-12"], ["5.0", "x", '"5"', ""]),
        ({"type": "boolean"}, ["true"], ["True"]),
        ({"type": "array", "items": {"type": "string"}}, ['["a", "b"]', "[]"], ["a, b", "[1]"]),
        ({"type": ["string", "null"], "maxLength": 4}, ["null", "ab"], ["abcde"]),
        ({"enum": ["auto", 1, None]}, ["auto", "1", "null"], ["2", '"auto"']),
        ({"type": "string", "enum": ["x", None]}, ["x"], ["null"]),
        ({"anyOf": [{"type": "integer"}, {"enum": ["all"]}]}, ["3", "all"], ["some"]),
        ({"oneOf": [{"const": "a"}, {"const": "b"}, {"type": "boolean"}]}, ["a", "b", "true"], ["c"]),
        ({"allOf": [{"type": "string"}, {"maxLength": 2}]}, ["ab"], ["abc"]),
        ({"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}, ['{"x": 1.5}'], ["{}"]),
        ({}, ["anything", "5", '{"a": 1}'], []),
        (True, ["anything"], []),
        ({"type": "string", "format": "uri-reference", "title": "T", "x-order": 1}, ["../a"], []),
        ({"minimum": 3}, ["4", "true"], ["2", '"x"']),
        ({"type": "integer", "minLength": 3}, ["4"], ["four"]),
        ({"minLength": 3}, ["four"], ["4"]),
        ({"const": "a", "enum": ["a", "b"]}, ["a"], ["b"]),
        ({"allOf": [{"maxLength": 3}], "$ref": "#/$defs/s"}, ["a", "abc"], ["abcd", "ABC"]),
    ],
)
def test_argument_values(schema: Any, right: list[str], wrong: list[str]) -> None:
    parameters = {
        "properties": {"a": schema},
        "required": ["a"],
        "$defs": {"s": {"type": "string", "pattern": "^[a-z]*$"}},
    }
    guide = Guide("tool_call", tools=(ToolSpec("f", parameters),))
    assert [value for value in right if not accepts(guide, call(argument(value)))] == []
    assert [value for value in wrong if accepts(guide, call(argument(value)))] == []
    assert not accepts(guide, call(""))


def test_argument_order_optional_ones_and_nothing_else() -> None:
    schema = {"properties": {"a": {}, "b": {}, "c": False}, "required": ["b", "d"]}
    guide = Guide("tool_call", tools=(ToolSpec("f", schema),), parallel=False)
    a, b, d = (argument("1", key) for key in "abd")
    assert accepts(guide, call(a + b + d))
    assert accepts(guide, call(b + d))
    for wrong in (b, a + b, b + a + d, a + a + b + d, b + d + argument("1", "c")):
        assert not accepts(guide, call(wrong))
    assert not accepts(guide, call(b + d) * 2)
    assert not accepts(guide, "text first" + call(b + d))


def test_references_within_parameters() -> None:
    schema = {
        "properties": {
            "tree": {"$ref": "#/components/schemas/t"},
            "same": {"$ref": "#/properties/tree"},
            "s": {"$ref": "#/$defs/s"},
        },
        "components": {"schemas": {"t": {"$ref": "#/definitions/tree"}, "odd": {"$ref": None, "properties": []}}},
        "definitions": {"tree": {"type": "array", "items": {"$ref": "#/definitions/tree"}}},
        "$defs": {"s": {"enum": ["x/y"]}},
    }
    guide = Guide("tool_call", tools=(ToolSpec("f", schema),))
    assert accepts(guide, call(argument("[[], [[]]]", "tree") + argument("[]", "same") + argument("x/y", "s")))
    assert not accepts(guide, call(argument("[1]", "tree")))


@pytest.mark.parametrize(
    ("schema", "cause"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"type": "string", "pattern": "(?=a)b"}, "look"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"enum": []}, ""),
    ],
)
@pytest.mark.parametrize("as_tool", [False, True])
def test_schemas_that_cannot_be_enforced_are_refused_in_time(schema: Any, cause: str, as_tool: bool) -> None:
    guide = Guide("json_schema", schema=schema)
    if as_tool:
        guide = Guide("tool_call", tools=(ToolSpec("f", {"properties": {"a": schema}}),))
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.validate(guide)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.param == ("tools" if as_tool else "response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 3, "pattern": "^ab$"},
        {"type": "string", "minLength": 3, "maxLength": 1},
        {"type": "string", "minLength": "3"},
        {"type": "string", "pattern": 3},
        {"minLength": 3, "minimum": 3},
        {"const": "a", "enum": ["b"]},
        {"$ref": "#/required"},
        {"anyOf": []},
        {"enum": ["1", 1]},
        {"enum": ["a"], "pattern": "a"},
        {"oneOf": [{"type": "string"}, {"enum": ["a"]}]},
        {"allOf": [{"maxLength": 3}, {"maxLength": 2, "type": "string"}]},
        {"$ref": "#/properties/a"},
        {"$ref": "#/nowhere"},
        5,
    ],
)
def test_arguments_that_cannot_be_met_are_refused_in_time(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"argument 'a'|properties/a|enforced"):
        COMPILER.validate(Guide("tool_call", tools=(ToolSpec("f", {"properties": {"a": schema}, "required": ["a"]}),)))


@pytest.mark.parametrize(
    "parameters", [{"type": "array"}, {"anyOf": [{}]}, {"minProperties": 1}, {"required": 3}, {"required": [[]]}, [], 3]
)
def test_parameters_that_are_no_object_schema_are_refused(parameters: Any) -> None:
    with pytest.raises(InvalidRequest, match="tool 'f'"):
        COMPILER.validate(Guide("tool_call", tools=(ToolSpec("f", parameters),)))


def test_other_refusals() -> None:
    with pytest.raises(InvalidRequest, match="no tools"):
        COMPILER.validate(Guide("tool_call"))
    with pytest.raises(InvalidRequest, match="needs a schema"):
        COMPILER.validate(Guide("json_schema"))
    with pytest.raises(InvalidRequest, match="longer than"):
        COMPILER.validate(Guide("json_schema", schema={"const": "x" * (1 << 21)}))
    with pytest.raises(InvalidRequest, match="2,000 properties"):
        COMPILER.validate(Guide("json_schema", schema={"items": {"properties": {f"p{i}": {} for i in range(2_000)}}}))
    with pytest.raises(InvalidRequest, match="too big"):
        COMPILER.validate(Guide("json_schema", schema={"enum": [f"value {i}" for i in range(20_000)]}))
    with pytest.raises(InvalidRequest, match="not JSON"):
        COMPILER.validate(Guide("json_schema", schema={"const": "\ud800"}))
    deep: dict[str, Any] = {}
    for _ in range(600):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidRequest):
        COMPILER.validate(Guide("json_schema", schema=deep))


def test_a_tokenizer_without_tool_tags_is_refused() -> None:
    class NoTags(Tokenizer):
        def special_id(self, text: str) -> int | None:
            return None if text == "<tool_call>" else super().special_id(text)

    compiler = GuideCompiler(NoTags(TOKENIZER.backend, vocab_size=1024), EOS)
    with pytest.raises(UnsupportedField, match="<tool_call>"):
        compiler.validate(Guide("tool_call", tools=(NOW,)))


def test_names_and_values_that_look_like_keywords_are_left_alone() -> None:
    schema = {
        "type": "object",
        "properties": {
            "const": {"type": "string", "format": "int64"},
            "format": {"const": {"format": "int64", "$ref": "#/x"}},
            "again": {"$ref": "#/properties/format"},
        },
        "required": ["const", "format", "again"],
        "additionalProperties": False,
    }
    value = {"const": "any", "format": {"format": "int64", "$ref": "#/x"}, "again": {"format": "int64", "$ref": "#/x"}}
    assert accepts(Guide("json_schema", schema=schema), json.dumps(value))
    wrong = json.dumps(value).replace("#/x", "#/y")
    assert not accepts(Guide("json_schema", schema=schema), wrong)
    tool = Guide("tool_call", tools=(ToolSpec("f", {**schema, "required": ["again"]}),))
    assert accepts(tool, call(argument(json.dumps(value["again"]), "again")))


def test_many_tools_are_fine() -> None:
    kinds: list[Any] = [{"type": "string"}, {"type": "integer"}, {"enum": ["a", "b"]}, {"items": {"type": "string"}}]
    tools = [ToolSpec(f"t{i}", {"properties": {f"{i}-{j}": kinds[j % 4] for j in range(10)}}) for i in range(100)]
    assert calls_in(generate(Guide("tool_call", tools=tuple(tools)), 1))


def test_users_cannot_switch_enforcement_off() -> None:
    with pytest.raises(InvalidRequest, match="not"):
        COMPILER.validate(Guide("json_schema", schema={"x-guidance": {"lenient": True}, "not": {}}))


def test_ids_without_a_token_are_never_allowed() -> None:
    compiler = GuideCompiler(Tokenizer(TOKENIZER.backend, vocab_size=1400), EOS)
    for guide in (Guide("json_object"), Guide("json_object", thinking=True)):
        state = compiler.compile(guide)
        assert len(state.fill_mask()) == 1400 // 8
        for token in generate(guide, 5, compiler):
            assert all(TOKENIZER.token_bytes(int(t)) for t in allowed(state))
            state.accept(token)


def test_white_space_is_bounded() -> None:
    state = COMPILER.compile(Guide("json_object"))
    (opening,) = TOKENIZER.encode("{")
    (space,) = TOKENIZER.encode(" ")
    state.accept(opening)
    for _ in range(200):
        if space not in allowed(state):
            return
        state.accept(space)
    raise AssertionError("white space without end")


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    state = COMPILER.compile(Guide("json_object"))
    with pytest.raises(EngineError, match="not allowed"):
        state.accept(TOKENIZER.encode("x")[0])
    with pytest.raises(EngineError, match="not allowed"):
        COMPILER.compile(Guide("json_object")).accept(EOS[0])


def test_states_of_one_guide_are_independent() -> None:
    guide = Guide("json_schema", schema={"enum": ["ab", "cd"]})
    first, second = COMPILER.compile(guide), COMPILER.compile(guide)
    before = second.fill_mask().copy()
    for token in TOKENIZER.encode('"ab"'):
        first.accept(token)
    assert first.is_finished
    assert (second.fill_mask() == before).all()
    assert not second.is_finished


def test_importing_does_not_import_llguidance_or_torch() -> None:
    code = "import sys, freehold.engine.guide; sys.exit(bool({'torch', 'llguidance'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_without_llguidance_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["llguidance"] = None
from freehold.engine.guide import GuideCompiler
from freehold.errors import MissingExtra
from freehold.model.tokenizer import Tokenizer
from freehold.types import Guide, ToolSpec
compiler = GuideCompiler(Tokenizer.toy(512), (0,))
tool = ToolSpec("f", {"properties": {"a": {"pattern": "x"}}})
for guide in (Guide("json_object"), Guide("tool_call", tools=(tool,))):
    try:
        compiler.validate(guide)
    except MissingExtra as error:
        assert "freehold[engine]" in str(error)
    else:
        sys.exit(1)
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("noise", ["\n<backtrace>\n  0: main", " panic: index out of bounds", "\n<state>\nx"])
def test_a_cause_ends_before_the_noise(noise: str) -> None:
    assert _cause(f"too many\n states{noise}") == "too many states"
