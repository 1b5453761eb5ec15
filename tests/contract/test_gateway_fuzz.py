"""Random requests at every route of a gateway: no answer is a 5xx of ours, and errors have a shape."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from _gateway import ADMIN_KEY, KEY, Gateway, Upstream, alias_table, key_table, upstream, upstream_table
from _http import Answer, call
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from freehold.gateway.door.app import CALLS
from freehold.serve.app import operations
from freehold.serve.openapi import document

WORDS = st.text(string.ascii_letters + string.digits + "-_./: é\u2028\x00", max_size=24)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=8
)
FIELDS = (
    "messages prompt input stream stream_options max_tokens max_completion_tokens max_output_tokens n reasoning_effort "
    "reasoning output_config thinking metadata user safety_identifier prompt_cache_key conversation system tools "
    "tool_choice stop stop_sequences temperature response_format previous_response_id"
).split()
SENSIBLE: dict[str, Any] = {
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES}),
        max_size=3,
    ),
    "stream": st.booleans(),
    "metadata": st.dictionaries(
        st.sampled_from(["prompt_name", "prompt_version", "user_id", "conversation_id"]), VALUES
    ),
    "stream_options": st.fixed_dictionaries({"include_usage": VALUES}),
}
BODIES = st.builds(
    lambda fields, model: fields if model is None else fields | {"model": model},
    st.fixed_dictionaries({}, optional={name: SENSIBLE.get(name, VALUES) | VALUES for name in FIELDS}),
    st.sampled_from(["m", "t", "m", "nothing", None]) | WORDS,
)
HEADERS = st.dictionaries(
    st.sampled_from(
        "x-prompt-name x-prompt-version x-task x-user-id x-conversation-id x-data-class x-request-id traceparent "
        "accept content-type expect anthropic-version anthropic-beta openai-beta".split()
    ),
    st.text(string.printable.replace("\r", "").replace("\n", ""), max_size=40),
    max_size=3,
)
ADMIN = (
    "/admin/experiments",
    "/admin/experiments/{}",
    "/admin/experiments/{}/replay",
    "/admin/experiments/{}/pause",
    "/admin/{}",
)
OTHER = ("/v1/models", "/v1/models/{}", "/v1/feedback", "/metrics", "/health", "/ready", "/{}", "/v1/{}", *ADMIN)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Aliases: m, whose upstream speaks everything, and t, whose speaks Chat only, so Messages is translated."""
    with upstream() as up:
        yield from started(up, tmp_path_factory)


def started(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    speaks = 'speaks = ["chat", "completions", "responses", "messages", "embeddings"]'
    text = upstream_table("one", up.base("one"), more=speaks)
    text += upstream_table("two", up.base("two"), more='speaks = ["chat"]')
    text += alias_table("m", "one") + alias_table("t", "two") + key_table()
    with Gateway(tmp_path_factory.mktemp("gateway"), text) as running:
        yield running


def check(answer: Answer) -> None:
    assert 200 <= answer.status < 500, (answer.status, answer.error, bytes(answer.body[:500]))
    if answer.status >= 400:
        error = answer.json()
        assert error["error"]["message"]


SETTINGS = hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@SETTINGS
@hypothesis.given(st.sampled_from(sorted(CALLS)), BODIES, HEADERS)
def test_calls(gateway: Gateway, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    check(gateway.ask(path, json.dumps(body).encode(), headers=headers, limit=10))


@SETTINGS
@hypothesis.given(
    st.sampled_from(sorted(CALLS)), st.binary(max_size=64) | VALUES.map(lambda value: json.dumps(value).encode())
)
def test_bodies_that_are_no_requests(gateway: Gateway, path: str, body: bytes) -> None:
    check(gateway.ask(path, body, limit=10))


@SETTINGS
@hypothesis.given(
    st.sampled_from(OTHER),
    st.text(string.ascii_letters + string.digits + "%._-~/?&=;+", max_size=20),
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]),
    st.none() | VALUES,
    st.sampled_from([KEY, ADMIN_KEY, "", "x"]),
)
def test_other_routes(gateway: Gateway, path: str, name: str, method: str, body: Any, key: str) -> None:
    data = None if body is None else json.dumps(body).encode()
    if method == "HEAD":
        return  # has no body to read, whatever its length says
    answer = gateway.ask(path.format(name), data, key=key, method=method, limit=10)
    assert answer.status < 500 or answer.status == 501, (answer.status, bytes(answer.body[:500]))


DOCUMENT = document(operations(), with_keys=False)
PATHS = {path: methods for path, methods in DOCUMENT["paths"].items() if path in CALLS}
SCHEMA = schemathesis.openapi.from_dict(
    DOCUMENT | {"paths": PATHS},
    config=schemathesis.Config.from_dict(
        {
            "phases": {name: {"enabled": name == "fuzzing"} for name in ("examples", "coverage", "fuzzing")},
            "operations": [{"include-path": ["/v1/messages"], "generation": {"mode": "positive"}}],
        }
    ),
)


@SCHEMA.parametrize()
@hypothesis.settings(max_examples=30, deadline=None)
def test_requests_of_the_engines_own_document(case: schemathesis.Case, gateway: Gateway) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "m"
    case.call_and_validate(
        base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}, checks=[not_a_server_error], timeout=20
    )


def test_it_still_works_afterwards(gateway: Gateway) -> None:
    assert gateway.ask("/v1/chat/completions", {"model": "m", "messages": []}).ok
    assert "Traceback" not in gateway.log_text(), gateway.log_text()[-3000:]
    assert call(gateway.url, "/health").ok
