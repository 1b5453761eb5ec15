"""The application in process, on the simulated engine: HTTP's own errors, probes, tokenize, and no blocking calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from blockbuster import blockbuster_ctx

from freehold.engine.sim import SimConfig, build_sim_engine
from freehold.model.chat.template import ChatTemplate
from freehold.serve.app import build_app
from freehold.serve.server import build_state
from freehold.serve.state import SamplingDefaults, ServerState

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def nothing_blocks_the_event_loop() -> Iterator[None]:
    with blockbuster_ctx():
        yield


@asynccontextmanager
async def serving(state: ServerState, *, warm: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application; the engine runs meanwhile."""
    app = build_app(state)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
    async with app.router.lifespan_context(app), client:
        if warm:
            await until_ready(client)
        yield client


async def until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.005)


def make_state(sim: SimConfig | None = None, **options: Any) -> ServerState:
    engine, tokenizer = build_sim_engine(sim)
    return build_state(engine, tokenizer, ChatTemplate.builtin(), **options)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(make_state()) as found:
        yield found


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req-")
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
    ],
)
async def test_wrong_addresses(client: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    response = await client.request(method, path)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert path in error["message"]
    assert method in error["message"]


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", "{", 400),
        ("application/json", "[]", 400),
        ("text/plain", "{}", 415),
        ("application/x-www-form-urlencoded", "{}", 415),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_wrong_bodies(client: httpx.AsyncClient, path: str, content_type: str, body: str, status: int) -> None:
    response = await client.post(path, content=body, headers={"content-type": content_type})
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"


async def test_a_body_over_the_limit() -> None:
    async with serving(replace(make_state(), max_body_bytes=100)) as client:
        response = await client.post("/tokenize", json={"prompt": "x" * 100})
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"
        assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 200


async def test_a_host_that_is_not_local_is_refused_unless_there_are_keys() -> None:
    rebound = {"host": "evil.example"}
    async with serving(make_state()) as client:
        assert error_of(await client.get("/v1/models", headers=rebound))["code"] == "forbidden"
    async with serving(make_state(api_keys=("k",))) as client:
        headers = {**rebound, "x-api-key": "k"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        response = await client.get("/v1/models", headers=rebound)
        assert response.status_code == 401
        assert error_of(response)["type"] == "authentication_error"


async def test_ready_is_only_after_a_generation() -> None:
    async with serving(make_state(SimConfig(seconds_per_step=0.1)), warm=False) as client:
        assert (await client.get("/health")).status_code == 200
        early = await client.get("/ready")
        assert early.status_code == 503
        assert int(early.headers["retry-after"]) >= 1
        error_of(early)
        await until_ready(client)
        assert "freehold_" in (await client.get("/metrics")).text


async def test_an_unforeseen_failure_is_a_500_without_details(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr("freehold.serve.tokenize._tokenize", fail)
    response = await client.post("/tokenize", json={"prompt": "x"})
    assert response.status_code == 500
    assert "secret" not in error_of(response)["message"]


async def test_a_failure_of_the_engine_is_in_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"messages": [{"role": "user", "content": "[[sim error]]"}]}
    with caplog.at_level(logging.ERROR):
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 500
    assert "simulated failure" in error_of(response)["message"]
    assert "POST /v1/chat/completions" in caplog.text


async def test_what_the_caller_got_wrong_is_not_in_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await client.post("/v1/chat/completions", json={"messages": 5})).status_code == 400
    assert caplog.records == []


async def test_tokenize_a_text(client: httpx.AsyncClient) -> None:
    body = (await client.post("/tokenize", json={"prompt": "hi <|user|>", "return_token_strs": True})).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert "".join(body["token_strs"]) == "hi <|user|>"
    assert body["max_model_len"] > 1
    back = (await client.post("/detokenize", json={"tokens": body["tokens"]})).json()
    assert back == {"prompt": "hi <|user|>"}


async def test_tokenize_a_conversation_gives_what_chat_counts(client: httpx.AsyncClient) -> None:
    conversation = {"messages": HI, "reasoning_effort": "high", "chat_template_kwargs": {"clear_thinking": False}}
    count = (await client.post("/tokenize", json=conversation)).json()["count"]
    answer = (await client.post("/v1/chat/completions", json={**conversation, "max_tokens": 1})).json()
    assert answer["usage"]["prompt_tokens"] == count
    shorter = (await client.post("/tokenize", json={**conversation, "add_generation_prompt": False})).json()
    assert shorter["count"] < count


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": HI}, "prompt"),
        ({"prompt": "x", "tools": []}, "tools"),
        ({"prompt": "x", "model": "other"}, "model"),
        ({"prompt": "x", "add_special_tokens": 5}, "add_special_tokens"),
    ],
)
async def test_tokenize_refusals(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await client.post("/tokenize", json=body)
    assert response.status_code in (400, 404)
    assert error_of(response)["param"] == param


async def test_detokenize_refuses_ids_that_do_not_exist(client: httpx.AsyncClient) -> None:
    response = await client.post("/detokenize", json={"tokens": [1, 999_999]})
    assert error_of(response)["param"] == "tokens"


async def test_a_long_prompt_is_tokenised_off_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[object] = []
    to_thread = asyncio.to_thread

    async def spy(function: Any, *args: Any) -> Any:
        threads.append(function)
        return await to_thread(function, *args)

    monkeypatch.setattr(asyncio, "to_thread", spy)
    for words, expected in ((10, 0), (20_000, 1)):
        message = {"role": "user", "content": "word " * words}
        response = await client.post("/v1/chat/completions", json={"messages": [message], "max_tokens": 1})
        assert response.status_code == 200
        assert len(threads) == expected


async def test_the_checkpoints_sampling_defaults_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(sampling=SamplingDefaults(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1))
    seen: list[Any] = []
    submit = state.engine.submit

    def spy(request_id: str, prompt: Any, params: Any, **options: Any) -> Any:
        seen.append(params)
        return submit(request_id, prompt, params, **options)

    monkeypatch.setattr(state.engine, "submit", spy)
    async with serving(state) as client:
        await client.post("/v1/completions", json={"prompt": "x"})
        await client.post("/v1/chat/completions", json={"messages": HI, "temperature": 0, "top_k": -1, "min_p": 0})
    open_, given = seen
    assert (open_.temperature, open_.top_p, open_.top_k, open_.min_p) == (0.5, 0.9, 7, 0.1)
    assert (given.temperature, given.top_p, given.top_k, given.min_p) == (0, 0.9, 0, 0)
