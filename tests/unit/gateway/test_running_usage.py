"""The usage of a chunk is cut out of its bytes, and nothing else is touched."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
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
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@given(
    st.dictionaries(st.text(max_size=5), values, max_size=4), st.integers(0, 4), st.sampled_from(["pretty", "tight"])
)
def test_the_rest_means_what_it_meant(members: dict[str, Any], at: int, spelling: str) -> None:
    members.pop("usage", None)
    items = list(members.items())
    whole = dict([*items[:at], ("usage", USAGE), *items[at:]])
    separators = (",", ":") if spelling == "tight" else (", ", ": ")
    text = json.dumps(whole, separators=separators)
    assert cut(text) == json.dumps(members, separators=separators)
    assert msgspec.json.decode(cut(text, null=True)) == msgspec.json.decode(json.dumps(whole | {"usage": None}))


def test_an_event_of_several_lines_stays_as_it_is() -> None:
    event = b'event: x\ndata: {"usage":\ndata: {"a":1}}'
    assert without_usage(event, data_of(event), null=False) in (event, b"event: x\ndata: {}")
