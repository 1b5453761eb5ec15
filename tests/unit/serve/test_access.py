"""API keys and the Host header: who gets through the guard."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from freehold.address import is_local_host, is_loopback
from freehold.serve.access import Guard
from freehold.serve.wire import error_response


async def answer(
    guard_options: dict[str, Any], path: str = "/v1/models", client: str = "10.0.0.9", **headers: str
) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers that a request gets; 200 means that it came through."""
    sent: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        raise AssertionError("a guard reads no bodies")

    async def send(message: Any) -> None:
        sent.append(message)

    async def refuse(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": raw, "client": (client, 1)}
    await Guard(app, refuse=refuse, **guard_options)(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


KEYS = {"api_keys": ("first-key", "second-key")}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer second-key"},
        {"x_api_key": "second-key"},
    ],
)
async def test_any_key_opens_in_either_header(headers: dict[str, str]) -> None:
    assert (await answer(KEYS, **headers))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-key2"},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer "},
        {"x_api_key": ""},
        {"authorization": "Bearer f\udcfcr".encode("utf-8", "replace").decode()},
    ],
)
async def test_anything_else_is_a_401(headers: dict[str, str]) -> None:
    status, sent = await answer(KEYS, **headers)
    assert status == 401
    assert sent[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_no_key(path: str) -> None:
    assert (await answer(KEYS, path))[0] == 200


@pytest.mark.parametrize(("client", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.9", 401)])
async def test_metrics_are_open_on_this_machine_only(client: str, status: int) -> None:
    assert (await answer(KEYS, "/metrics", client))[0] == status
    assert (await answer(KEYS, "/metrics", client, authorization="Bearer first-key"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/openapi.json", "/nowhere", "/health/", "//health"])
async def test_no_other_path_is_open(path: str) -> None:
    assert (await answer(KEYS, path, "127.0.0.1"))[0] == 401


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST.", "a.localhost"]
)
async def test_a_local_name_passes(host: str) -> None:
    assert (await answer({"local_only": True}, host=host))[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.9:8000", ""])
async def test_a_rebound_name_is_refused(host: str) -> None:
    assert (await answer({"local_only": True}, "/health", "127.0.0.1", host=host))[0] == 403
    assert not is_local_host(host)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("localhost", False)],
)
def test_loopback_addresses(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
