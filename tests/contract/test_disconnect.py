"""Clients that leave: their requests stop, their blocks are freed, and nothing is left behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from freehold.engine.sim import SimConfig
from freehold.serve.wire import encode_json
from tests.contract.conftest import LiveServer


def raw_post(path: str, body: bytes, *, declared: int | None = None) -> bytes:
    """A request as bytes, for clients that are not polite enough for a library."""
    length = len(body) if declared is None else declared
    lines = (f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}")
    return "\r\n".join((*lines, "", "")).encode() + body


def connect(live: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])))


ENDLESS: Any = {
    "model": "sim",
    "messages": [{"role": "user", "content": "go on"}],
    "max_tokens": 50_000,
    "extra_body": {"ignore_eos": True},
}


async def test_64_streams_with_16_leaving_midway_leak_nothing(start: Callable[..., LiveServer]) -> None:
    live = await asyncio.to_thread(start, SimConfig(seconds_per_step=0.002, num_draft_tokens=3))
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def read(number: int) -> str:
            """One client; every fourth asks for more than it will read, and leaves after a few chunks."""
            leaves = number % 4 == 0
            options = ENDLESS if leaves else {"model": "sim"}
            messages = [{"role": "user", "content": f"words of client {number}"}]
            stream: Any = await client.chat.completions.create(**{**options, "messages": messages, "stream": True})
            text, chunks = "", 0
            async for chunk in stream:
                chunks += 1
                text += chunk.choices[0].delta.content or ""
                if leaves and chunks > 3 + number % 8:
                    await stream.close()
                    return ""
            return text

        texts = await asyncio.gather(*(read(number) for number in range(64)))
    assert texts == [f"You said: words of client {n}" if n % 4 else "" for n in range(64)]
    await asyncio.to_thread(live.wait, live.is_idle)
    assert live.stats().preemptions == 0
    live.call(live.state.engine.engine.check_integrity)


async def test_a_client_that_does_not_wait_for_its_answer_frees_it(start: Callable[..., LiveServer]) -> None:
    live = await asyncio.to_thread(start, SimConfig(seconds_per_step=0.002))
    endless = {"max_tokens": 50_000, "ignore_eos": True}
    chat = {"messages": ENDLESS["messages"], **endless}
    for path, json in (
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "n": 3}),
        ("/v1/chat/completions", {**chat, "n": 3, "stream": True}),
        ("/v1/completions", {"prompt": ["a", "b"], **endless}),
    ):
        async with httpx.AsyncClient(base_url=live.url, timeout=30) as client:
            request = asyncio.create_task(client.post(path, json=json))
            await asyncio.to_thread(live.wait, lambda: live.stats().running > 0)
            request.cancel()
        await asyncio.to_thread(live.wait, live.is_idle, 2)


def test_a_client_that_leaves_during_a_long_step_is_noticed_at_once(start: Callable[..., LiveServer]) -> None:
    """The disconnect is seen while the engine computes, not when there is next something to send."""
    live = start(SimConfig(seconds_per_prefill_token=0.001))
    prompt = "x " * 3000  # a step of two seconds
    with connect(live) as sock:
        sock.sendall(raw_post("/v1/completions", encode_json({"prompt": prompt, "stream": True})))
        live.wait(lambda: live.tasks() > live.idle_tasks)
    live.wait(lambda: live.tasks() <= live.idle_tasks, 1.5)
    live.wait(live.is_idle)


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_error(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(server) as sock:
        sock.sendall(raw_post("/v1/completions", b"{", declared=100))
        server.wait(lambda: server.tasks() > server.idle_tasks)
    server.wait(server.is_idle)
    assert caplog.records == []


def test_a_slow_reader_holds_nobody_back(start: Callable[..., LiveServer]) -> None:
    live = start()
    endless = {"prompt": "x", "stream": True, "max_tokens": 20_000, "ignore_eos": True}
    with connect(live) as sock:
        sock.sendall(raw_post("/v1/completions", encode_json(endless)))  # and never reads
        live.wait(lambda: live.stats().generation_tokens > 100)
        answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": "y", "max_tokens": 5}, timeout=20)
        assert answer.status_code == 200
    live.wait(live.is_idle)
