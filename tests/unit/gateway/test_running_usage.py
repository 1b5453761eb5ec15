"""The usage of a chunk is cut out of its bytes, and nothing else is touched."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from freehold.gateway.door.running_usage import without_usage
from freehold.gateway.http.sse import data_of

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}


def cut(text: str, *, null: bool = False) -> str:
    event = f"data: {text}".encode()
    return without_usage(event, data_of(event), null=null).decode().removeprefix("data: ")


@pytest.mark.parametrize(
    ("text", "gone", "nulled"),
    [
        ('{"a":1,"usage":{"x":{"y":2}}}', '{"a":1}', '{"a":1,"usage":null}'),
        ('{"usage":{"x":1},"a":1}', '{"a":1}', '{"usage":null,"a":1}'),
        ('{"a" : 1 , "usage" : { "x" : 1 } , "b":2}', '{"a" : 1  , "b":2}', '{"a" : 1 , "usage" : null , "b":2}'),
        ('{"usage":{}}', "{}", '{"usage":null}'),
        ('{"a":"\\"usage\\":{}","usage":{}}', '{"a":"\\"usage\\":{}"}', '{"a":"\\"usage\\":{}","usage":null}'),
        ('{"usage":{"x":1},"b":{"x":1}}', '{"b":{"x":1}}', '{"usage":null,"b":{"x":1}}'),
        ('{"usage":{"x":1},"b":{"usage":{"x":2}}}', '{"b":{"usage":{"x":2}}}', '{"usage":null,"b":{"usage":{"x":2}}}'),
        ('{"a":1,"usage":null}', '{"a":1,"usage":null}', '{"a":1,"usage":null}'),
        ('{"a":{"usage":{"x":1}}}', '{"a":{"usage":{"x":1}}}', '{"a":{"usage":{"x":1}}}'),
        ('{"a":1}', '{"a":1}', '{"a":1}'),
    ],
)
def test_cut_out(text: str, gone: str, nulled: str) -> None:
    assert cut(text) == gone
    assert cut(text, null=True) == nulled


values: Any = st.recursive(
    st.one_of(st.integers(), st.text(), st.none(), st.just('"usage":{'), st.just(USAGE)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
        st.fixed_dictionaries({"usage": inner}),
    ),
    max_leaves=6,
)


def has_the_same_within(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("usage") == USAGE or any(map(has_the_same_within, value.values()))
    return isinstance(value, list) and any(map(has_the_same_within, value))


@example({"delta": {"usage": USAGE}}, 0, "tight")
@example({"delta": [{"usage": USAGE}]}, 1, "pretty")
@example({"delta": {"usage": {"prompt_tokens": 7}}}, 0, "tight")
@given(
    st.dictionaries(st.text(max_size=5), values, max_size=4), st.integers(0, 4), st.sampled_from(["pretty", "tight"])
)
def test_the_rest_means_what_it_meant(members: dict[str, Any], at: int, spelling: str) -> None:
    members.pop("usage", None)
    items = list(members.items())
    whole = dict([*items[:at], ("usage", USAGE), *items[at:]])
    separators = (",", ":") if spelling == "tight" else (", ", ": ")
    text = json.dumps(whole, separators=separators)
    if has_the_same_within(members):  # one of the two would be cut, perhaps the wrong one
        assert cut(text) == cut(text, null=True) == text
        return
    assert cut(text) == json.dumps(members, separators=separators)
    assert msgspec.json.decode(cut(text, null=True)) == msgspec.json.decode(json.dumps(whole | {"usage": None}))


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize(
    "event",
    [
        b'event: x\ndata: {"usage":\ndata: {"a":1}}',
        b'data: {"a":1,\ndata: "usage":{"x":1}}',
        b'data: {"a":1,\ndata: "usage":{"x":1},\ndata: "b":2}',
        b'data: {"a":1,"usage":{"x":1}}\ndata:',
    ],
)
def test_data_of_several_lines_stay_as_they_are(event: bytes, null: bool) -> None:
    assert without_usage(event, data_of(event), null=null) == event


def test_other_lines_of_an_event_are_not_in_the_way() -> None:
    event = b'event: x\ndata: {"a":1,"usage":{"x":1}}\nid: 7'
    assert without_usage(event, data_of(event), null=False) == b'event: x\ndata: {"a":1}\nid: 7'
