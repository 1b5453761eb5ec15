"""The gateway's HTTP client on raw sockets: which connections it keeps, and what it makes of those that end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from freehold.gateway.http import client as http_client
from freehold.gateway.http.client import Http11
from freehold.gateway.http.outbound import Broken

Start = Callable[..., Awaitable["Upstream"]]

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"


class Upstream:
    """Answers requests on raw sockets. answers: what is sent for each request, in turn, the last one from then on; None
    closes the connection without a word. closes: it is closed soon after each answer, and nothing says so."""

    def __init__(self, *answers: bytes | None, closes: bool = False) -> None:
        self.answers = answers
        self.closes = closes
        self.thinks = 0.0  # seconds before each answer
        self.connections = 0
        self.requests = 0
        self.open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(size)
                answer = self.answers[min(self.requests, len(self.answers) - 1)]
                self.requests += 1
                await asyncio.sleep(self.thinks)
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
                if self.closes:
                    await asyncio.sleep(0.005)
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open.discard(writer)
            writer.close()

    async def all_closed(self) -> None:
        """Fails if a connection is open for two seconds more."""
        for _ in range(100):
            if not self.open:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{len(self.open)} connections are still open")

    async def stop(self) -> None:
        self.server.close()
        for writer in list(self.open):
            writer.close()
        await self.server.wait_closed()


@pytest.fixture
async def client() -> AsyncIterator[Http11]:
    made = Http11()
    yield made
    await made.close()


@pytest.fixture
async def started() -> AsyncIterator[Start]:
    running: list[Upstream] = []

    async def start(*answers: bytes | None, closes: bool = False) -> Upstream:
        upstream = Upstream(*answers, closes=closes)
        await upstream.start()
        running.append(upstream)
        return upstream

    yield start
    for upstream in running:
        await upstream.stop()


async def ask(client: Http11, upstream: Upstream) -> bytes:
    response = await client.post(upstream.url, b"", b"{}", 5.0)
    try:
        body = b""
        while data := await response.next():
            body += data
        return body
    finally:
        response.close()


@pytest.mark.parametrize("answer", [ANSWER, CHUNKED], ids=["sized", "chunked"])
async def test_calls_one_after_another_use_one_connection(answer: bytes, client: Http11, started: Start) -> None:
    upstream = await started(answer)
    for _ in range(10):
        assert await ask(client, upstream) == b"hi"
        if answer is CHUNKED:
            await asyncio.sleep(http_client.REST_SECONDS)
    assert upstream.connections == 1


async def test_a_server_may_close_after_a_stream_without_saying_so(client: Http11, started: Start) -> None:
    upstream = await started(CHUNKED, closes=True)
    for _ in range(10):
        assert await ask(client, upstream) == b"hi"


async def test_calls_at_once_have_a_connection_each_and_leave_them_to_others(client: Http11, started: Start) -> None:
    upstream = await started(ANSWER)
    for _ in range(3):
        assert await asyncio.gather(*(ask(client, upstream) for _ in range(8))) == [b"hi"] * 8
    assert upstream.connections == 8


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        ANSWER.replace(b"1.1", b"1.0"),
        ANSWER + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nmore",
        ANSWER + b"nonsense",
    ],
    ids=["told to close", "HTTP/1.0", "a second answer", "bytes after the answer"],
)
async def test_a_connection_that_cannot_be_trusted_is_not_kept(answer: bytes, client: Http11, started: Start) -> None:
    upstream = await started(answer)
    for count in range(1, 4):
        assert await ask(client, upstream) == b"hi"
        assert upstream.connections == count


async def test_an_answer_that_is_not_read_to_its_end_ends_its_connection(client: Http11, started: Start) -> None:
    upstream = await started(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", ANSWER)
    response = await client.post(upstream.url, b"", b"{}", 5.0)
    response.close()
    assert await ask(client, upstream) == b"hi"
    assert upstream.connections == 2


async def test_a_kept_connection_that_the_upstream_closed_meanwhile_is_not_used(client: Http11, started: Start) -> None:
    upstream = await started(ANSWER)
    await ask(client, upstream)
    for writer in list(upstream.open):
        writer.close()
    await asyncio.sleep(0.05)
    assert await ask(client, upstream) == b"hi"
    assert upstream.requests == 2


async def test_one_that_idled_and_is_lost_under_the_request_is_replaced(
    client: Http11, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = await started(ANSWER, None, ANSWER)
    await ask(client, upstream)
    monkeypatch.setattr(http_client, "STALE_SECONDS", 0.2)
    await asyncio.sleep(0.25)
    assert await ask(client, upstream) == b"hi"
    assert (upstream.connections, upstream.requests) == (2, 3)


async def test_one_that_was_just_used_is_not_asked_twice(client: Http11, started: Start) -> None:
    upstream = await started(ANSWER, None, ANSWER)
    await ask(client, upstream)
    with pytest.raises(Broken) as broken:
        await ask(client, upstream)
    assert broken.value.before_answer
    assert upstream.requests == 2


async def test_a_new_connection_that_is_lost_is_not_replaced(client: Http11, started: Start) -> None:
    upstream = await started(None, ANSWER)
    with pytest.raises(Broken):
        await ask(client, upstream)
    assert upstream.requests == 1


async def test_an_answer_that_began_is_not_asked_for_again(
    client: Http11, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "STALE_SECONDS", 0.2)
    upstream = await started(ANSWER, b"HTTP/1.1 200 OK\r\nconte", ANSWER)
    await ask(client, upstream)
    await asyncio.sleep(0.25)

    async def cut() -> None:
        while upstream.requests < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        for writer in list(upstream.open):
            writer.close()

    cutting = asyncio.create_task(cut())
    with pytest.raises(Broken):
        await ask(client, upstream)
    await cutting
    assert upstream.requests == 2


async def test_connections_that_idle_too_long_are_closed(
    client: Http11, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 0.1)
    upstream = await started(ANSWER)
    await ask(client, upstream)
    await upstream.all_closed()


async def test_what_was_lost_after_a_while_is_not_asked_again(
    client: Http11, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream may have worked on it all that time."""
    monkeypatch.setattr(http_client, "STALE_SECONDS", 0.1)
    upstream = await started(ANSWER, None, ANSWER)
    await ask(client, upstream)
    await asyncio.sleep(0.15)
    upstream.thinks = 0.2
    with pytest.raises(Broken):
        await ask(client, upstream)
    assert upstream.requests == 2


async def test_calls_that_outlast_a_sweep_leave_no_connection_behind(
    client: Http11, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 0.1)
    upstream = await started(ANSWER)
    await ask(client, upstream)
    response = await client.post(upstream.url, b"", b"{}", 5.0)
    await asyncio.sleep(0.3)
    while await response.next():
        pass
    response.close()
    await upstream.all_closed()


async def test_an_old_connection_makes_room_for_a_new_one(
    client: Http11, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "OLDEST_SECONDS", 0.0)
    upstream = await started(ANSWER)
    for count in range(1, 4):
        await ask(client, upstream)
        assert upstream.connections == count


async def test_air_gapped_from_now_on_no_connection_to_the_outside_is_used(
    client: Http11, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "is_local_address", lambda address: False)
    upstream = await started(ANSWER)
    await ask(client, upstream)
    client.local_only = True
    with pytest.raises(Broken, match="air-gapped"):
        await ask(client, upstream)
    assert upstream.requests == 1


async def test_closing_an_answer_twice_leaves_the_next_call_alone(client: Http11, started: Start) -> None:
    upstream = await started(ANSWER)
    first = await client.post(upstream.url, b"", b"{}", 5.0)
    while await first.next():
        pass
    first.close()
    second = await client.post(upstream.url, b"", b"{}", 5.0)
    first.close()
    assert await second.next() == b"hi"
    second.close()
    assert upstream.connections == 1


async def test_trailers_are_no_headers(client: Http11, started: Start) -> None:
    upstream = await started(CHUNKED.replace(b"0\r\n\r\n", b"0\r\nx-late: 1\r\n\r\n"))
    response = await client.post(upstream.url, b"", b"{}", 5.0)
    while await response.next():
        pass
    assert "x-late" not in response.fields
    response.close()
