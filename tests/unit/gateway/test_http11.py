"""The gateway's HTTP server on raw sockets: what it refuses, how long it waits, and that answers keep their order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from freehold.gateway.http import http11
from freehold.gateway.http.http11 import App, Listener

Ask = Callable[..., Awaitable[bytes]]


class Echo:
    """Answers with what it was asked; counts who left."""

    def __init__(self) -> None:
        self.left = 0
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.paths.append(path)
        if path == "/early":
            await reply(send, 401, b"no")
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body += message["body"]
            if not message["more_body"]:
                break
        if path == "/fails":
            raise ValueError("on purpose")
        if path == "/slow":
            assert (await receive())["type"] == "http.disconnect"
            self.left += 1
            return
        if path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            for part in (b"a", b"", b"bc"):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return
        if path == "/half":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            raise ValueError("on purpose")
        await reply(send, 200, b"%b %b %d" % (scope["method"].encode(), path.encode(), len(body)))


async def reply(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server:
    def __init__(self, app: App) -> None:
        self.listener = Listener(app)

    async def start(self) -> None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        await self.listener.start(sock)

    async def ask(self, *pieces: bytes, pause: float = 0.0) -> bytes:
        """Everything that comes back until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause)
        data = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return data


@pytest.fixture
def app() -> Echo:
    return Echo()


@pytest.fixture
async def server(app: Echo) -> AsyncIterator[Server]:
    started = Server(app)
    await started.start()
    yield started
    await started.listener.stop(1)
    assert not started.listener.connections
    assert not started.listener.tasks


CLOSE = b"connection: close\r\n"


async def test_answers_to_pipelined_requests_keep_their_order(server: Server, app: Echo) -> None:
    one = b"POST /%d HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"
    asked = b"".join(one % at for at in range(5)) + b"GET /stream HTTP/1.1\r\nhost: a\r\n" + CLOSE + b"\r\n"
    answers = (await server.ask(asked)).split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert [answer.partition(b"\r\n\r\n")[2] for answer in answers[:-1]] == [b"POST /%d 3" % at for at in range(5)]
    assert answers[-1].endswith(b"\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n")


async def test_a_request_may_come_byte_by_byte(server: Server) -> None:
    whole = (
        b"POST /a HTTP/1.1\r\nhost: a\r\n"
        + CLOSE
        + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"
    )
    answer = await server.ask(*(whole[at : at + 1] for at in range(len(whole))))
    assert answer.endswith(b"POST /a 4")


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 3\r\ncontent-length: 4\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"transfer-encoding : chunked\r\n",
        b"content-length: +3\r\n",
        b"content-length: 0x3\r\n",
        b"a: b\r\n c: d\r\n",
        b"a\x00: b\r\n",
        b"a: b\nc\r: d\r\n",
    ],
)
async def test_what_two_servers_could_read_in_two_ways_is_refused(head: bytes, server: Server, app: Echo) -> None:
    answer = await server.ask(
        b"POST /a HTTP/1.1\r\nhost: a\r\n" + head + b"\r\nabcGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer
    assert "/smuggled" not in app.paths


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"b" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/3.7\r\n\r\n", 400),
    ],
)
async def test_what_is_too_much_or_no_http_is_refused(request_: bytes, status: int, server: Server, app: Echo) -> None:
    assert (await server.ask(request_)).startswith(b"HTTP/1.1 %d " % status)
    assert not app.paths


async def test_headers_that_trickle_are_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http11, "HEADER_SECONDS", 0.3)
    started = time.monotonic()
    answer = await server.ask(b"GET / HTTP/1.1\r\n", *(b"a: b\r\n" for _ in range(8)), pause=0.1)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 5


async def test_an_idle_connection_is_closed_without_a_word(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http11, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(http11, "IDLE_SECONDS", 0.3)
    assert await server.ask() == b""
    assert (await server.ask(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n")).endswith(b"GET /a 0")


async def test_a_running_request_outlives_the_idle_timeout(
    server: Server, app: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http11, "HEADER_SECONDS", 0.05)
    monkeypatch.setattr(http11, "IDLE_SECONDS", 0.1)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n")
    await asyncio.sleep(0.5)
    assert app.left == 0
    writer.close()
    await asyncio.sleep(0.1)
    assert app.left == 1


async def test_an_early_refusal_arrives_though_the_body_was_not_read(server: Server) -> None:
    body = b"x" * 3_000_000
    answer = await server.ask(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer


async def test_a_body_that_nobody_takes_is_not_read(server: Server, app: Echo) -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)
        taken.append(len((await receive())["body"]))
        await reply(send, 200, b"")

    taken: list[int] = []
    server.listener.app = waits
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 50000000\r\n\r\n" + b"x" * 20_000_000)
    await asyncio.sleep(1.0)
    writer.transport.abort()
    assert taken
    assert taken[0] < 2_000_000, "the rest waits in the client"


async def test_a_client_that_reads_slowly_makes_the_application_wait(server: Server) -> None:
    sent = 0

    async def pours(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            sent += 65_536

    server.listener.app = pours
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1000)
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    await asyncio.sleep(0.5)
    assert sent < 30_000_000
    writer.transport.abort()


async def test_continue_is_said_to_who_waits_for_it(server: Server) -> None:
    head = b"POST /a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n" + CLOSE + b"\r\n"
    answer = await server.ask(head, b"abc", pause=0.2)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_http_1_0_and_head(server: Server) -> None:
    assert (await server.ask(b"GET /stream HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\nabc"), "no chunks, and then the end"
    answer = await server.ask(b"HEAD /a HTTP/1.1\r\nhost: a\r\n" + CLOSE + b"\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"content-length: 9" in answer


async def test_an_upgrade_is_not_followed(server: Server) -> None:
    answer = await server.ask(
        b"GET /a HTTP/1.1\r\nhost: a\r\nconnection: upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n\r\nPRI * HTTP/2.0"
    )
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"GET /a 0")


async def test_an_application_that_fails(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    assert (await server.ask(b"GET /fails HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 500 ")
    with contextlib.suppress(ConnectionResetError):
        half = await server.ask(b"GET /half HTTP/1.1\r\nhost: a\r\n\r\n")
        assert not half.endswith(b"0\r\n\r\n"), "the client must not take it for the whole"
    assert "on purpose" in caplog.text


async def test_a_line_break_cannot_get_into_the_head_of_an_answer(server: Server) -> None:
    async def splits(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b\r\nset-cookie: c")]})

    server.listener.app = splits
    answer = await server.ask(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"set-cookie" not in answer


async def test_stopping_lets_answers_end_and_closes_the_idle(server: Server, app: Echo) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await asyncio.sleep(0.05)
    await server.listener.stop(1)
    assert await reader.read() == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)


async def test_many_small_pieces_of_a_body_hold_nobody_up(server: Server) -> None:
    pieces = 200_000
    asking = asyncio.create_task(
        server.ask(
            b"POST /a HTTP/1.1\r\nhost: a\r\n" + CLOSE + b"transfer-encoding: chunked\r\n\r\n",
            b"1\r\na\r\n" * pieces + b"0\r\n\r\n",
        )
    )
    longest = 0.0
    while not asking.done():
        before = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - before)
    assert (await asking).endswith(b"POST /a %d" % pieces)
    assert longest < 1.0


async def test_trailers_are_no_headers(server: Server) -> None:
    async def shows(scope: Any, receive: Any, send: Any) -> None:
        await reply(send, 200, b",".join(name for name, _ in scope["headers"]))

    server.listener.app = shows
    answer = await server.ask(
        b"POST /a HTTP/1.1\r\nhost: a\r\n"
        + CLOSE
        + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-api-key: k\r\n\r\n"
    )
    assert answer.endswith(b"\r\n\r\nhost,connection,transfer-encoding")


@pytest.mark.parametrize("rest", [b"\x00\r\n\r\n", b"POST /b HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"])
async def test_nonsense_after_a_request_does_not_take_its_answer(
    rest: bytes, server: Server, app: Echo, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await server.ask(b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc" + rest)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"POST /a 3")
    assert app.paths == ["/a"]
    assert not caplog.records


async def test_a_body_that_turns_into_nonsense_is_refused(server: Server, app: Echo) -> None:
    head = b"POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"
    assert (await server.ask(head, b"zz\r\n", pause=0.1)).startswith(b"HTTP/1.1 400 ")
    assert app.left == 1


@pytest.mark.parametrize("close", [b"", CLOSE])
async def test_who_never_reads_an_answer_is_not_kept(
    close: bytes, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pours(scope: Any, receive: Any, send: Any) -> None:
        await reply(send, 200, b"x" * 50_000_000)

    monkeypatch.setattr(http11, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(http11, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(http11, "STUCK_SECONDS", 0.2)
    server.listener.app = pours
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n" + close + b"\r\n")
        await asyncio.sleep(0.1)
        assert server.listener.connections
        end = time.monotonic() + 5
        while server.listener.connections and time.monotonic() < end:
            await asyncio.sleep(0.05)
        assert not server.listener.connections


async def test_who_reads_slowly_gets_the_whole_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 20_000_000

    async def pours(scope: Any, receive: Any, send: Any) -> None:
        await reply(send, 200, b"x" * size)

    monkeypatch.setattr(http11, "STUCK_SECONDS", 0.5)
    server.listener.app = pours
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=100_000)
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n" + CLOSE + b"\r\n")
    got = 0
    while data := await reader.read(1_000_000):
        got += len(data)
        if got < 10_000_000:
            await asyncio.sleep(0.005)
    assert got > size
    writer.close()


@pytest.mark.parametrize(
    "body",
    [b"content-length: 3\r\n\r\nabc", b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_request_that_offers_an_upgrade_keeps_its_body(body: bytes, at_once: bool, server: Server) -> None:
    head = b"POST /a HTTP/1.1\r\nhost: a\r\nconnection: upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
    whole = head + body
    pieces = [whole] if at_once else [whole[at : at + 1] for at in range(len(whole))]
    answer = await server.ask(*pieces)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"POST /a 3")
