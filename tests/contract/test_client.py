"""Freehold's own client and terminal chat against a live server, over real sockets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from freehold.client import Client, usage_counts
from freehold.errors import InvalidRequest, NotFound
from tests.contract.conftest import LiveServer

BODY = {"model": "sim", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


async def test_a_stream_adds_up_to_the_whole_answer(server: LiveServer) -> None:
    async with Client(server.url) as client:
        assert await client.models() == ["sim", "alias"]
        whole = (await client.chat(BODY))["choices"][0]["message"]
        async with client.stream_chat({**BODY, "reasoning_effort": "medium"}) as stream:
            chunks = [chunk async for chunk in stream]
            assert "medium" in stream.headers["x-freehold-warning"]
        assert "".join(chunk.content for chunk in chunks) == whole["content"]
        assert "".join(chunk.reasoning for chunk in chunks) == whole["reasoning_content"]
        counts = usage_counts(chunks[-1].usage or {})
        assert counts["completion_tokens"] > counts["reasoning_tokens"] > 0
        assert [chunk.at for chunk in chunks] == sorted(chunk.at for chunk in chunks)


async def test_refusals_come_as_their_exceptions(server: LiveServer) -> None:
    async with Client(server.url) as client:
        with pytest.raises(InvalidRequest, match="top_p") as caught:
            await client.chat({**BODY, "top_p": 3})
        assert caught.value.param == "top_p"
        with pytest.raises(NotFound, match="nobody"):
            async with client.stream_chat({**BODY, "model": "nobody"}):
                raise AssertionError("it has no stream")


def test_the_terminal_chat_talks_to_a_url(server: LiveServer) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "freehold.cli.main", "chat", server.url],
        input="/effort high\nHello\nAnd again\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "You said: Hello" in result.stdout
    assert "You said: And again" in result.stdout
    assert "Effort is High" in result.stdout
