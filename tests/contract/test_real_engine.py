"""The APIs on the engine that computes: random weights, so what is said means nothing, but it has to have its form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import hypothesis
import openai
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error

from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.model.tiny import make_tiny
from freehold.model.tokenizer import Tokenizer
from freehold.serve.app import operations
from freehold.serve.openapi import document
from tests.contract.conftest import LiveServer
from tests.contract.openai_chat import MODEL, collect, function, user

FUZZED = ("/v1/chat/completions", "/v1/completions")
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["soup", "salad"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
CONFIG = schemathesis.Config.from_dict(
    {"phases": {"examples": {"enabled": False}, "coverage": {"enabled": False}, "stateful": {"enabled": False}}}
)
API = schemathesis.openapi.from_dict(document(operations(), with_keys=False), config=CONFIG)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server on a real engine; at the end it must be alive and hold nothing."""
    directory = tmp_path_factory.mktemp("nano")
    make_tiny(directory, "nano")

    def build() -> tuple[Engine, Tokenizer]:
        return build_engine(directory, EngineOptions(max_model_len=512, cache_bytes=1 << 24, threads=1))

    live = LiveServer(build=build)
    yield live
    try:
        assert live.state.engine.is_alive
        live.wait(live.is_idle)
        live.call(live.state.engine.engine.check_integrity)
    finally:
        live.stop()


@pytest.fixture
def sdk(real: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@API.include(path=list(FUZZED)).parametrize()
@hypothesis.settings(max_examples=30, deadline=None)
def test_random_requests(case: schemathesis.Case, real: LiveServer) -> None:
    case.call_and_validate(base_url=real.url, checks=[not_a_server_error], timeout=60)
    assert real.state.engine.is_alive


def test_a_stream_with_tools_declared(sdk: openai.OpenAI) -> None:
    tools = [function("get_weather", city={"type": "string"})]
    chunks = sdk.chat.completions.create(model=MODEL, messages=user("hi"), tools=tools, stream=True, max_tokens=20)
    assert collect(chunks)["finish"] in ("stop", "length", "tool_calls")


def test_json_schema(sdk: openai.OpenAI) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "dish", "schema": SCHEMA}}
    answer = sdk.chat.completions.create(
        model=MODEL, messages=user("hi"), response_format=format_, reasoning_effort="none", max_tokens=200, seed=1
    )
    # Random weights may fill the room with white space, which JSON allows.
    if answer.choices[0].finish_reason == "stop":
        found = json.loads(answer.choices[0].message.content or "")
        assert type(found["ok"]) is bool
        assert found["kind"] in ("soup", "salad")
    else:
        assert answer.choices[0].finish_reason == "length"


def test_logprobs_of_two_answers(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL, messages=user("hi"), logprobs=True, top_logprobs=3, n=2, max_tokens=5, reasoning_effort="none"
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        for token in choice.logprobs.content or ():
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 3


def test_prompt_logprobs(real: LiveServer) -> None:
    body = {"prompt": "a few words of prompt", "max_tokens": 1, "prompt_logprobs": 1}
    answer = httpx.post(f"{real.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == answer.json()["usage"]["prompt_tokens"]


def test_an_anthropic_message(real: LiveServer) -> None:
    with anthropic.Anthropic(base_url=real.url, api_key="none", max_retries=0, timeout=60) as client:
        message = client.messages.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=10)
    assert message.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert 0 < message.usage.output_tokens <= 10
