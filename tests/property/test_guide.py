"""Whatever is sampled under a guide's mask fits its schema: JSON as it is, tool calls as the server reads them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jsonschema
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from freehold.engine.guide import GuideCompiler
from freehold.errors import InvalidRequest
from freehold.model.tokenizer import Tokenizer
from freehold.serve.parse import StreamParser
from freehold.serve.turn import ReasoningDelta, ToolCallArguments, ToolCallStart
from freehold.types import Guide, ToolSpec

TOKENIZER = Tokenizer.toy(512)
EOS = tuple(TOKENIZER.special_id(text) or 0 for text in ("<|endoftext|>", "<|user|>", "<|observation|>"))
COMPILER = GuideCompiler(TOKENIZER, EOS)
CLOSING = np.array([TOKENIZER.is_special(i) or bool(set(b'"]}>') & set(TOKENIZER.token_bytes(i))) for i in range(512)])

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6)
STRINGS = st.one_of(
    st.just({"type": "string"}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, *[st.integers(0, 4)] * 2
    ),
    st.sampled_from(["^[a-z]{2,4}$", "^(é|ü)+$", "[0-9]", r"^\d{3}-x$", "^a|b$", r"^[^\"\\]?$", "北京"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "uuid", "ipv4", "made-up"]).map(lambda name: {"type": "string", "format": name}),
)
NUMBERS = st.one_of(
    st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, *[st.integers(-99, 99)] * 2
    ).filter(lambda schema: schema["minimum"] <= schema["maximum"]),
    st.integers(-5, 5).map(lambda low: {"type": "number", "exclusiveMinimum": low, "maximum": low + 1.5}),
    st.just({"type": "integer", "multipleOf": 3}),
)
ENUMS = st.one_of(
    st.lists(TEXT, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    TEXT.map(lambda value: {"const": value}),
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(-9, 9)), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], required: set[str], closed: bool) -> dict[str, Any]:
        schema = {"type": "object", "properties": properties, "required": sorted(required & properties.keys())}
        return {**schema, "additionalProperties": False} if closed else schema

    keys = st.sampled_from(["a", "b", "ключ", 'q"uote', "back\\slash"])
    return st.builds(build, st.dictionaries(keys, inner, max_size=3), st.sets(keys), st.just(True))


SCHEMAS = st.recursive(
    st.one_of(STRINGS, NUMBERS, ENUMS),
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner, st.integers(0, 2), st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)  # fmt: skip


def sample(guide: Guide, seed: int) -> list[int]:
    """Random tokens under the mask, without the end token. Leans to what closes something."""
    state, random, tokens = COMPILER.compile(guide), np.random.default_rng(seed), list[int]()
    while len(tokens) < 600:
        choices = np.flatnonzero(np.unpackbits(state.fill_mask(), bitorder="little"))
        assert len(choices), f"dead end after {TOKENIZER.decode(tokens)!r}"
        if set(EOS) & set(choices.tolist()) and (len(choices) == len(EOS) or random.random() < 0.7):
            return tokens
        choices = choices[~np.isin(choices, EOS)]
        closing = choices[CLOSING[choices]]
        lean = len(closing) > 0 and random.random() < (0.5 if len(tokens) < 200 else 0.95)
        token = int(random.choice(closing if lean else choices))
        state.accept(token)
        tokens.append(token)
    assume(False)
    return []


@given(SCHEMAS, st.integers(0, 2**32))
@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_json_fits_its_schema(schema: Any, seed: int) -> None:
    guide = Guide("json_schema", schema=schema)
    value = json.loads(TOKENIZER.decode(sample(guide, seed)))
    jsonschema.validate(value, schema)


@given(
    st.lists(objects(SCHEMAS), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_tool_calls_read_by_the_parser_fit_their_schema(
    schemas: list[Any], seed: int, thinking: bool, parallel: bool
) -> None:
    tools = tuple(ToolSpec(f"tool-{number}", schema) for number, schema in enumerate(schemas))
    guide = Guide("tool_call", tools=tools, thinking=thinking, parallel=parallel)
    tokens = sample(guide, seed)
    parser = StreamParser(thinking, tools, text_tags=())
    events = []
    text_so_far = b""
    for token in tokens:
        if TOKENIZER.is_special(token):
            if text_so_far:
                events += parser.feed(text_so_far.decode("utf-8"))
                text_so_far = b""
            events += parser.feed(TOKENIZER.token_bytes(token).decode("utf-8"), control=True)
        else:
            text_so_far += TOKENIZER.token_bytes(token)
    assert not text_so_far
    events += parser.finish(cut=False)
    calls: list[tuple[str, list[str]]] = []
    for event in events:
        match event:
            case ToolCallStart():
                calls.append((event.name, []))
            case ToolCallArguments():
                calls[event.index][1].append(event.fragment)
            case ReasoningDelta():
                assert thinking
            case _:
                raise AssertionError(event)
    assert calls
    assert parallel or len(calls) == 1
    by_name = {tool.name: tool.schema for tool in tools}
    for name, fragments in calls:
        jsonschema.validate(json.loads("".join(fragments)), by_name[name])


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from(["string", "object", "#", "#/a", "^("])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["type", "properties", "required", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "items", "a",
                 "pattern", "minLength", "maxLength", "minimum", "format", "additionalProperties", "not"]
            ),
            inner, max_size=4,
        ),
    ),
    max_leaves=10,
)  # fmt: skip


@given(JSON)
@settings(deadline=None)
def test_anything_is_compiled_or_refused(schema: Any) -> None:
    """Clients send schemas: none may raise anything but InvalidRequest."""
    guides = [Guide("tool_call", tools=(ToolSpec("f", {"type": "object", "properties": {"a": schema}}),))]
    if isinstance(schema, dict):
        guides += [Guide("json_schema", schema=schema), Guide("tool_call", tools=(ToolSpec("f", schema),))]
    for guide in guides:
        with contextlib.suppress(InvalidRequest):
            COMPILER.validate(guide)
