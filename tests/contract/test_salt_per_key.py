"""Tenants of one server: with a salt per key they share no prefix cache, on any endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.contract.conftest import LiveServer

TEXT = "a prompt that several tenants send " * 40
CHAT = [{"role": "user", "content": TEXT}]
ENDPOINTS: dict[str, tuple[dict[str, Any], Callable[[Any], int]]] = {
    "/v1/chat/completions": ({"messages": CHAT}, lambda usage: usage["prompt_tokens_details"]["cached_tokens"]),
    "/v1/completions": ({"prompt": TEXT}, lambda usage: usage["prompt_tokens_details"]["cached_tokens"]),
    "/v1/responses": ({"input": TEXT}, lambda usage: usage["input_tokens_details"]["cached_tokens"]),
    "/v1/messages": ({"messages": CHAT, "max_tokens": 10}, lambda usage: usage["cache_read_input_tokens"]),
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_keys_share_nothing(start: Callable[..., LiveServer], path: str) -> None:
    live = start(api_keys=("ann", "bob"), salt_per_key=True)
    body, cached_of = ENDPOINTS[path]

    def cached(key: str, **fields: Any) -> int:
        answer = httpx.post(live.url + path, json={"model": "sim", **body, **fields}, headers={"x-api-key": key})
        assert answer.status_code == 200, answer.text
        return cached_of(answer.json()["usage"])

    assert cached("ann") == 0
    assert cached("bob") == 0
    assert cached("ann") > 0
    assert cached("bob") > 0
    if path != "/v1/messages":  # has no such field
        assert cached("ann", cache_salt="x") == 0, "a client's salt still counts"
        assert cached("bob", cache_salt="x") == 0, "and is its own"
        assert cached("ann", cache_salt="x") > 0


def test_keys_share_by_default(start: Callable[..., LiveServer]) -> None:
    live = start(api_keys=("ann", "bob"))
    for key in ("ann", "bob"):
        answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": TEXT}, headers={"x-api-key": key}).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
