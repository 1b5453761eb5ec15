"""The `openai` SDK against a live server: every failure as the SDK's own exception."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.contract.conftest import LiveServer
from tests.contract.openai_chat import MODEL, user


def bad(client: openai.OpenAI, **options: Any) -> openai.APIStatusError:
    given: Any = {"model": MODEL, "messages": user("hi"), **options}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**given)
    return caught.value


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 131_073}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [999_999]}}, "stop_token_ids"),
        ({"max_tokens": 5, "extra_body": {"min_tokens": 6}}, "min_tokens"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_a_bad_request_error_that_names_the_field(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    error = bad(client, **options)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert param in error.message


def test_a_prompt_over_the_context_is_a_bad_request_with_openais_code(start: Callable[..., LiveServer]) -> None:
    live = start(max_model_len=64)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    error = bad(client, messages=user("long " * 200))
    assert isinstance(error, openai.BadRequestError)
    assert error.code == "context_length_exceeded"


def test_another_model_is_a_not_found_error(client: openai.OpenAI) -> None:
    error = bad(client, model="gpt-4")
    assert isinstance(error, openai.NotFoundError)
    assert "sim, alias" in error.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_no_or_another_key_is_an_authentication_error(start: Callable[..., LiveServer]) -> None:
    live = start(api_keys=("right",))
    for key, fine in (("right", True), ("wrong", False)):
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
        if fine:
            assert client.models.list().data
        else:
            assert isinstance(bad(client), openai.AuthenticationError)
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.get(f"{live.url}/v1/models").status_code == 401


def test_a_full_queue_is_a_rate_limit_error_with_a_time(start: Callable[..., LiveServer]) -> None:
    live = start(max_num_seqs=1, max_queue=1)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    slow: Any = {"model": MODEL, "messages": user("[[sim slow seconds=0.02]]"), "max_tokens": 20}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(client.chat.completions.create, **slow) for _ in range(2)]
        live.wait(lambda: live.stats().running + live.stats().waiting == 2)
        error = bad(client)
        assert isinstance(error, openai.RateLimitError)
        assert int(error.response.headers["retry-after"]) >= 1
        assert all(answer.result().choices for answer in running), "those that were accepted are not disturbed"
    # All of n or none: what was submitted for the first choices is taken back.
    live.wait(live.is_idle)
    error = bad(client, n=5)
    assert isinstance(error, openai.RateLimitError)
    live.wait(live.is_idle)


def test_a_failure_before_the_first_byte_is_an_internal_server_error(client: openai.OpenAI) -> None:
    for stream in (False, True):
        error = bad(client, messages=user("[[sim error]]"), stream=stream)
        assert isinstance(error, openai.InternalServerError)
        assert error.code == "engine_error"


def test_a_failure_after_it_is_raised_from_the_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=user("[[sim error after=5]]"), stream=True)
    received: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError, match="simulated failure") as caught:
        received.extend(stream)
    assert received, "what came before it"
    assert not isinstance(caught.value, openai.APIStatusError), "the status line was already out"
    assert client.chat.completions.create(model=MODEL, messages=user("hi")).choices, "others go on"


def test_a_dead_engine_is_a_503_everywhere_and_not_healthy(start: Callable[..., LiveServer]) -> None:
    live = start()
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    assert isinstance(bad(client, messages=user("[[sim crash]]")), openai.InternalServerError)
    error = bad(client)
    assert error.status_code == 503
    assert int(error.response.headers["retry-after"]) >= 1
    assert httpx.get(f"{live.url}/health").status_code == 503
    assert httpx.get(f"{live.url}/ready").status_code == 503
