"""A gateway that starts again knows how its experiments stand, and who is on which arm, before it takes a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from freehold.gateway.canary.canaries import Canaries
from freehold.gateway.routing.router import Router
from tests.live_gateway import LiveGateway
from tests.scripted_upstream import Scripted

StartUpstream = Callable[..., Scripted]


def config(url: str) -> str:
    return f"""
[upstreams.u]
url = "{url}"
models.m = {{}}
[models.glm]
arms = [{{name = "old", upstream = "u", model = "m"}}, {{name = "new", upstream = "u", model = "m"}}]
[experiments.e]
alias = "glm"
control = "old"
canary = "new"
steps = [0.5, 1.0]
guardrails = [{{metric = "error"}}]
"""


def chat(live: LiveGateway, conversation: int) -> None:
    body = {"model": "glm", "messages": [], "metadata": {"conversation_id": str(conversation)}}
    assert httpx.post(f"{live.url}/v1/chat/completions", json=body).status_code == 200


def test_what_was_decided_holds_from_the_first_call_on(
    tmp_path: Path, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: Canaries) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Canaries, "run", never)  # whatever is known was known at the start
    text = config(upstream().url)
    first = LiveGateway(text, tmp_path)
    try:
        for number in range(12):
            chat(first, number)
        rows = list(first.wait_for_rows(12))
    finally:
        first.stop()
    on_control = {row.conversation for row in rows if row.arm == "old"}
    assert {row.experiment for row in rows} == {"e"}
    assert 0 < len(on_control) < 12

    again = LiveGateway(text, tmp_path)
    again.stop()
    assert again.parts is not None
    router = again.parts.router
    assert isinstance(router, Router)
    assert set(router._table.pins["e"]._seen) == on_control
