"""The `openai` and `anthropic` SDKs, unchanged but for the base URL, through a gateway to `freehold serve --sim`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.contract.conftest import LiveServer
from tests.live_gateway import LiveGateway

KEY = "fh-test-3b1f0d62c9"
SPEAKS = {
    "all": '"chat", "completions", "responses", "messages"',
    "chat": '"chat", "completions"',
    "messages": '"messages"',
}

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def config(url: str, speaks: str) -> str:
    return f"""
[upstreams.sim]
url = "{url}/v1"
speaks = [{SPEAKS[speaks]}]
engine = "freehold"
models.sim = {{prices = {{input = 1.0, output = 2.0}}}}
[models.glm]
arms = [{{name = "main", upstream = "sim", model = "sim"}}]
[keys.app]
sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
"""


@pytest.fixture
def start_gateway(server: LiveServer, tmp_path: Path) -> Iterator[Callable[..., LiveGateway]]:
    started: list[LiveGateway] = []

    def start(speaks: str = "all") -> LiveGateway:
        started.append(LiveGateway(config(server.url, speaks), tmp_path))
        return started[-1]

    yield start
    for gateway in started:
        gateway.wait(gateway.is_idle)
        gateway.stop()


@pytest.fixture(params=["all", "messages"])
def chat(request: pytest.FixtureRequest, start_gateway: Callable[..., LiveGateway]) -> Iterator[Any]:
    """An OpenAI client in front of an upstream that speaks chat, and of one that speaks Messages only."""
    gateway = start_gateway(request.param)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        client.gateway = gateway  # type: ignore[attr-defined]
        yield client


@pytest.fixture(params=["all", "chat"])
def messages(request: pytest.FixtureRequest, start_gateway: Callable[..., LiveGateway]) -> Iterator[Any]:
    gateway = start_gateway(request.param)
    with anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=30) as client:
        client.gateway = gateway  # type: ignore[attr-defined]
        yield client


def ask(text: str = "Hello") -> Any:
    return {"model": "glm", "messages": [{"role": "user", "content": text}]}


def test_a_chat_that_is_not_streamed(chat: Any) -> None:
    answer = chat.chat.completions.create(**ask(), extra_headers={"x-prompt-name": "hi", "x-prompt-version": "7"})
    assert answer.choices[0].message.content == "You said: Hello"
    assert answer.choices[0].finish_reason == "stop"
    (row,) = chat.gateway.wait_for_rows(1)
    assert (row.alias, row.model_id, row.upstream, row.key_id) == ("glm", "sim", "sim", "app")
    assert (row.prompt_name, row.prompt_version) == ("hi", "7")
    assert (row.status, row.error, row.counted) == (200, "", "upstream")
    assert row.input_tokens == answer.usage.prompt_tokens
    assert row.output_tokens == answer.usage.completion_tokens
    assert row.cost == row.input_tokens + 2 * row.output_tokens, (
        "1 and 2 USD a million are 1 and 2 micro-dollars a token"
    )


def test_a_streamed_chat_says_the_same_and_is_metered(chat: Any) -> None:
    stream = chat.chat.completions.create(**ask(), stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "You said: Hello"
    assert all(chunk.choices for chunk in chunks), "usage was not asked for"
    (row,) = chat.gateway.wait_for_rows(1)
    assert row.streamed
    assert row.counted == "upstream"
    assert row.output_tokens > 0
    assert row.undelivered_tokens == 0
    assert row.ttft is not None


def test_usage_comes_if_it_is_asked_for(chat: Any) -> None:
    *_, last = chat.chat.completions.create(**ask(), stream=True, stream_options={"include_usage": True})
    assert last.usage is not None
    (row,) = chat.gateway.wait_for_rows(1)
    assert (row.input_tokens, row.output_tokens) == (last.usage.prompt_tokens, last.usage.completion_tokens)


def test_reasoning_comes_in_both_spellings(start_gateway: Callable[..., LiveGateway]) -> None:
    gateway = start_gateway("all")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        message: Any = client.chat.completions.create(**ask(), reasoning_effort="high").choices[0].message
    assert message.reasoning_content
    assert message.reasoning_content == message.reasoning


def test_a_tool_is_called_and_its_result_is_understood(chat: Any) -> None:
    first = chat.chat.completions.create(**ask("weather in Paris?"), tools=[TOOL], tool_choice="required")
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_weather"
    history = [
        {"role": "user", "content": "weather in Paris?"},
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    second = chat.chat.completions.create(model="glm", messages=history, tools=[TOOL])
    assert "sunny" in second.choices[0].message.content
    assert [row.error for row in chat.gateway.wait_for_rows(2)] == ["", ""]


def test_a_streamed_tool_call_has_its_arguments(chat: Any) -> None:
    stream = chat.chat.completions.create(**ask("weather?"), tools=[TOOL], tool_choice="required", stream=True)
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather"
    assert "".join(call.function.arguments or "" for call in calls).startswith("{")
    assert chat.gateway.wait_for_rows(1)[0].finish_reason in ("tool_calls", "tool_use")


def test_a_message_that_is_not_streamed(messages: Any) -> None:
    answer = messages.messages.create(**ask(), max_tokens=100, system="Be brief.")
    assert answer.content[-1].text == "You said: Hello"
    assert answer.stop_reason == "end_turn"
    (row,) = messages.gateway.wait_for_rows(1)
    assert row.endpoint == "messages"
    assert row.output_tokens == answer.usage.output_tokens


def test_a_streamed_message(messages: Any) -> None:
    with messages.messages.stream(**ask(), max_tokens=100) as stream:
        assert "".join(stream.text_stream) == "You said: Hello"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    (row,) = messages.gateway.wait_for_rows(1)
    assert row.output_tokens == final.usage.output_tokens


def test_a_tool_in_messages(messages: Any) -> None:
    function = TOOL["function"]
    tool = {"name": function["name"], "input_schema": function["parameters"]}
    question = ask("weather in Paris?")
    with messages.messages.stream(**question, max_tokens=300, tools=[tool], tool_choice={"type": "any"}) as stream:
        first = stream.get_final_message()
    use = next(block for block in first.content if block.type == "tool_use")
    assert first.stop_reason == "tool_use"
    assert "city" in use.input
    history = [
        *question["messages"],
        {"role": "assistant", "content": [{"type": "tool_use", "id": use.id, "name": use.name, "input": use.input}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]},
    ]
    second = messages.messages.create(model="glm", max_tokens=300, messages=history, tools=[tool])
    assert "sunny" in second.content[-1].text


def test_the_other_endpoints(start_gateway: Callable[..., LiveGateway]) -> None:
    gateway = start_gateway("all")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["glm"]
        assert client.models.retrieve("glm").id == "glm"
        assert client.completions.create(model="glm", prompt="Once", max_tokens=8).choices[0].text
        assert "Hello" in client.responses.create(model="glm", input="Hello").output_text
        events = list(client.responses.create(model="glm", input="Hello", stream=True))
        assert events[-1].type == "response.completed"
    rows = gateway.wait_for_rows(3)
    assert [row.endpoint for row in rows] == ["completions", "responses", "responses"]
    assert [row.error for row in rows] == ["", "", ""]
    assert all(row.output_tokens for row in rows)


def test_errors_are_those_the_sdks_know(start_gateway: Callable[..., LiveGateway]) -> None:
    gateway = start_gateway("all")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(**ask())
        assert refused.value.request_id
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="no model 'gone'"):
            client.chat.completions.create(model="gone", messages=[])
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**ask(), temperature=9)  # the upstream's own refusal, as it said it
        with pytest.raises(openai.BadRequestError, match="does not answer embeddings"):
            client.embeddings.create(model="glm", input="a")
    with (
        anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as client,
        pytest.raises(anthropic.NotFoundError, match="no model"),
    ):
        client.messages.create(model="gone", max_tokens=10, messages=[{"role": "user", "content": "hi"}])


def test_what_translation_cannot_say_is_refused_by_name(start_gateway: Callable[..., LiveGateway]) -> None:
    gateway = start_gateway("messages")
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="logit_bias"),
    ):
        client.chat.completions.create(**ask(), logit_bias={"1": 2})
    assert not gateway.rows, "no attempt was made"


def test_a_client_that_leaves_ends_the_generation(
    start: Callable[..., LiveServer], tmp_path: Path, server: LiveServer
) -> None:
    from freehold.engine.sim import SimConfig

    slow = start(SimConfig(seconds_per_step=0.02))
    gateway = LiveGateway(config(slow.url, "all"), tmp_path)
    try:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
            stream = client.chat.completions.create(**ask(), stream=True, extra_body={"ignore_eos": True})
            for _ in range(3):
                next(iter(stream))
            slow.wait(lambda: slow.stats().running == 1)
            stream.close()
        slow.wait(slow.is_idle)
        (row,) = gateway.wait_for_rows(1)
        assert (row.error, row.counted) == ("client_gone", "counted")
        assert row.output_tokens is not None
        gateway.wait(gateway.is_idle)
    finally:
        gateway.stop()
