"""What a budget has reserved for an answer is what the upstream is told: it cannot cost more than was reserved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from freehold.gateway.access.budget import LocalBudgets
from freehold.gateway.config import MAX_OUTPUT_TOKENS
from freehold.gateway.door.translate.to_messages import request_to_messages
from freehold.gateway.door.wire import DEFAULT_LIMIT
from freehold.gateway.keeping.records import Usage, day_of
from tests.live_gateway import LiveGateway
from tests.scripted_upstream import Asked, Scripted

Start = Callable[..., LiveGateway]
StartUpstream = Callable[..., Scripted]

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
}
NAMES = ("max_tokens", "max_completion_tokens", "max_output_tokens")
EVERYTHING = 60_000  # tokens that the upstream generates if nobody stops it


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = f"""
[keys.budget]
sha256 = "{digest("key-budget")}"
budget_per_day = 0.04
[keys.team]
sha256 = "{digest("key-team")}"
team = "t"
[keys.free]
sha256 = "{digest("key-free")}"
requests_per_minute = 1000
tokens_per_minute = 10000000
[teams.t]
budget_per_day = 0.04
"""


def config(url: str, *, engine: str = "vllm", alias: str = "", speaks: str = "") -> str:
    """Prices of a dollar a million tokens: a token is a micro-dollar."""
    return f"""
[upstreams.u]
url = "{url}"
engine = "{engine}"
health = {{every = 60.0}}
speaks = [{speaks or '"chat", "completions", "responses", "embeddings"'}]
models.m = {{prices = {{input = 1.0, output = 1.0}}}}
[models.glm]
{alias}
arms = [{{name = "a", upstream = "u", model = "m"}}]
{KEYS}"""


async def as_long_as_it_may(asked: Asked) -> None:
    """Generates up to the limit that it was told."""
    if b"POST" not in asked.head.encode():
        await asked.answer(200, b"{}")
        return
    most = min([asked.json[name] for name in NAMES if name in asked.json], default=EVERYTHING)
    usage = {"prompt_tokens": 2, "completion_tokens": most, "input_tokens": 2, "output_tokens": most}
    said = {"role": "assistant", "content": "x"}
    choice = {"index": 0, "message": said, "text": "x", "finish_reason": "stop"}
    body = {"choices": [choice], "usage": usage, "status": "completed", "output": [], "data": [{"embedding": [0.5]}]}
    await asked.answer(200, json.dumps(body).encode())


def told(live: LiveGateway, up: Scripted, path: str, key: str, **more: Any) -> dict[str, Any]:
    """The limits in the body that the upstream got for a call."""
    body = {"model": "glm", **BODIES[path], **more}
    answer = httpx.post(f"{live.url}{path}", json=body, headers={"authorization": f"Bearer key-{key}"}, timeout=20)
    assert answer.status_code == 200, answer.text
    sent = up.asked[-1].json
    assert {name: value for name, value in sent.items() if name not in (*NAMES, "model")} == {
        name: value for name, value in body.items() if name not in (*NAMES, "model")
    }
    return {name: sent[name] for name in NAMES if name in sent}


def spent(live: LiveGateway, scope: str) -> Usage:
    admission = live.parts.admission if live.parts is not None else None
    budgets: LocalBudgets = admission.budgets  # type: ignore[union-attr]
    return live.call(lambda: budgets.usage(scope, day_of(live.rows[-1].at)))


@pytest.mark.parametrize("key", ["budget", "team"])
def test_what_is_reserved_is_what_the_upstream_is_told(gateway: Start, upstream: StartUpstream, key: str) -> None:
    up = upstream(as_long_as_it_may)
    live = gateway(config(up.url))
    assert told(live, up, "/v1/chat/completions", key) == {"max_tokens": MAX_OUTPUT_TOKENS}
    live.wait(lambda: len(live.rows) == 1)
    used = spent(live, "key:budget" if key == "budget" else "team:t")
    assert used.reserved == 0
    assert MAX_OUTPUT_TOKENS <= used.spent <= 40_000, "it cost more than was reserved, and than the budget"


def test_each_api_and_engine_has_its_name_for_it(gateway: Start, upstream: StartUpstream) -> None:
    up = upstream(as_long_as_it_may)
    live = gateway(config(up.url, engine="api").replace("0.04", "4.0"))
    assert told(live, up, "/v1/chat/completions", "budget") == {"max_completion_tokens": MAX_OUTPUT_TOKENS}
    assert told(live, up, "/v1/responses", "budget") == {"max_output_tokens": MAX_OUTPUT_TOKENS}
    assert told(live, up, "/v1/completions", "budget") == {"max_tokens": 16}, "what that API generates by default"
    assert told(live, up, "/v1/embeddings", "budget") == {}


def test_a_limit_of_the_clients_stays_as_it_is(gateway: Start, upstream: StartUpstream) -> None:
    up = upstream(as_long_as_it_may)
    live = gateway(config(up.url))
    assert told(live, up, "/v1/chat/completions", "budget", max_tokens=7) == {"max_tokens": 7}
    assert told(live, up, "/v1/chat/completions", "budget", max_completion_tokens=9) == {"max_completion_tokens": 9}


def test_where_no_budget_is_guarded_nothing_is_added(gateway: Start, upstream: StartUpstream) -> None:
    up = upstream(as_long_as_it_may)
    live = gateway(config(up.url))
    for path in BODIES:
        assert told(live, up, path, "free") == {}, path


def test_the_aliass_own_limit_is_for_everybody(gateway: Start, upstream: StartUpstream) -> None:
    up = upstream(as_long_as_it_may)
    live = gateway(config(up.url, alias="max_output_tokens = 500"))
    for key in ("free", "budget"):
        assert told(live, up, "/v1/chat/completions", key) == {"max_tokens": 500}
        assert told(live, up, "/v1/completions", key) == {"max_tokens": 500}


def test_an_api_that_wants_a_limit_gets_its_usual_one_which_is_not_more_than_is_reserved(
    gateway: Start, upstream: StartUpstream
) -> None:
    up = upstream(as_long_as_it_may)
    live = gateway(config(up.url, engine="api", speaks='"messages"'))
    for key in ("free", "budget"):
        headers = {"authorization": f"Bearer key-{key}"}
        body = {"model": "glm", "messages": MESSAGES}
        httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=headers, timeout=20)
        assert up.asked[-1].json["max_tokens"] == DEFAULT_LIMIT < MAX_OUTPUT_TOKENS


def test_no_tokens_at_all_is_a_limit_too() -> None:
    assert request_to_messages({"messages": MESSAGES, "max_tokens": 0}, "m", 100, None)["max_tokens"] == 0
