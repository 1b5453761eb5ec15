"""Every fault of an upstream, through the real gateway process: a clear error or a clean failover, in time, no leak."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _gateway import UPSTREAM_KEY, Gateway, Upstream, alias_table, chat, key_table, upstream, upstream_table
from _http import Answer
from _processes import wait_until

from tests.contract.gateway_faults import CONNECT, FAULTS, TIMEOUTS, TOTAL, Fault
from tests.faults.upstream import refused, unreachable


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Aliases: alone (one upstream, that fails), safe (the same, with another to fall back on), dead and hangs."""
    with refused() as dead, unreachable() as hangs:
        urls = {"bad": up.base("bad"), "good": up.base("good"), "dead": dead + "/v1", "hangs": hangs + "/v1"}
        text = "".join(upstream_table(name, url) + TIMEOUTS.format(name=name) for name, url in urls.items())
        text += (
            alias_table("alone", "bad") + alias_table("other", "good") + alias_table("safe", "bad", fallback=("other",))
        )
        text += alias_table("dead", "dead") + alias_table("hangs", "hangs")
        text += alias_table("dead-safe", "dead", fallback=("other",)) + key_table()
        with Gateway(tmp_path_factory.mktemp("gateway"), text) as running:
            yield running


@pytest.fixture(autouse=True)
def fresh(up: Upstream) -> None:
    up.reset()


def ask(gateway: Gateway, model: str, stream: bool, **more: Any) -> Answer:
    return gateway.ask(body=chat(model=model, stream=stream), limit=30, **more)


def events(answer: Answer) -> list[Any]:
    return [json.loads(one) for one in re.findall(rb"^data: (\{.*\})\r?$", bytes(answer.body), re.MULTILINE)]


def check_error(answer: Answer) -> None:
    """An error in OpenAI's shape that names no secret, as the whole answer."""
    error = answer.json()["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "type" in error
    assert answer.headers["x-request-id"]
    assert UPSTREAM_KEY.encode() not in answer.body


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_clear_error_in_time(gateway: Gateway, up: Upstream, fault: Fault) -> None:
    up.script("bad", **fault.script)
    answer = ask(gateway, "alone", fault.stream)
    assert not answer.error, "the gateway's own answer must be whole"
    assert answer.status in fault.status, bytes(answer.body[:300])
    assert answer.seconds < fault.seconds + 1
    if fault.before:
        check_error(answer)
        return
    assert answer.tokens == fault.tokens
    assert "error" in events(answer)[-1], bytes(answer.body[-300:])
    assert events(answer)[-1]["error"]["message"]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.before], ids=str)
def test_a_clean_failover(gateway: Gateway, up: Upstream, fault: Fault) -> None:
    up.script("bad", **fault.script)
    up.script("good", tokens=5)
    answer = ask(gateway, "safe", fault.stream)
    assert answer.ok, (answer.status, answer.error, bytes(answer.body[:300]))
    if fault.stream:
        assert answer.tokens == 5
        assert answer.body.count(b"data: [DONE]") == 1
    else:
        assert answer.json()["usage"]["completion_tokens"] == 5
    assert answer.seconds < fault.seconds + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["dead", "hangs"])
def test_no_connection(gateway: Gateway, model: str, stream: bool) -> None:
    answer = ask(gateway, model, stream)
    assert answer.status in (502, 503, 504)
    check_error(answer)
    assert answer.seconds < CONNECT + 1


def test_failover_when_nothing_listens(gateway: Gateway, up: Upstream) -> None:
    up.script("good", tokens=3)
    for stream in (False, True):
        assert ask(gateway, "dead-safe", stream).ok


def test_retry_after_of_the_upstream_reaches_the_client(gateway: Gateway, up: Upstream) -> None:
    up.script("bad", fault="status", status=429, headers={"retry-after": "7"})
    assert ask(gateway, "alone", False).headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [False, True])
def test_a_gigantic_answer_does_not_fill_the_memory(gateway: Gateway, up: Upstream, stream: bool) -> None:
    up.script("bad", fault="gigantic", size=256 << 20)
    before = gateway.rss()
    answer = ask(gateway, "alone", stream)
    assert gateway.rss() < before + 120
    if answer.status != 200:
        check_error(answer)
    assert ask(gateway, "other", False).ok, "others are still served"


def test_a_stream_has_a_total_time(gateway: Gateway, up: Upstream) -> None:
    up.script("bad", fault="slow_chunks", seconds=0.5, tokens=50)
    answer = ask(gateway, "alone", True)
    assert answer.status == 200
    assert "error" in events(answer)[-1]
    assert TOTAL - 1 < answer.seconds < TOTAL + 1


def test_a_client_that_leaves_frees_the_upstream(gateway: Gateway, up: Upstream) -> None:
    up.script("bad", tokens=1000, chunk_seconds=0.02)
    ask(gateway, "alone", True, abort_after=3)
    wait_until(lambda: up.totals().get("bad", {}).get("aborted") == 1, 5, "the upstream still works for nobody")


def test_nothing_is_left_open(gateway: Gateway, up: Upstream) -> None:
    """Last in this file: after all the faults above, idle connections are all there is."""
    up.script("good", tokens=1)
    ask(gateway, "other", False)

    def few() -> bool:
        return up.sockets() <= 4 and gateway.sockets() <= 16

    wait_until(few, 20, "connections are left over")


class _Slow:
    """Half of a request, for as long as the gateway bears it."""

    def __init__(self, gateway: Gateway, first: bytes) -> None:
        import socket
        from urllib.parse import urlsplit

        parts = urlsplit(gateway.url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=5)
        self.socket.sendall(first)

    def is_closed(self) -> bool:
        self.socket.settimeout(0.01)
        try:
            return self.socket.recv(65536) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


HALVES = [
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{",
]


@pytest.mark.parametrize("first", HALVES, ids=["head", "body"])
def test_slow_clients_do_not_hold_up_others(gateway: Gateway, up: Upstream, first: bytes) -> None:
    baseline = gateway.sockets()
    slow = [_Slow(gateway, first) for _ in range(200)]
    started = time.monotonic()
    assert ask(gateway, "other", False).ok
    assert time.monotonic() - started < 1
    for one in slow:
        one.socket.close()
    wait_until(lambda: gateway.sockets() <= baseline + 8, 10, "sockets of slow clients are left over")


@pytest.mark.nightly
@pytest.mark.parametrize("first", HALVES, ids=["head", "body"])
def test_a_slow_client_is_let_go(gateway: Gateway, first: bytes) -> None:
    slow = _Slow(gateway, first)
    wait_until(slow.is_closed, 120, "half of a request was borne for two minutes", pause=1)


def test_what_the_process_wrote_names_no_key(gateway: Gateway) -> None:
    text = gateway.log_text()
    assert UPSTREAM_KEY not in text
    assert "Traceback" not in text, text[text.index("Traceback") :][:3000]
    assert Path(gateway.log_file).exists()
