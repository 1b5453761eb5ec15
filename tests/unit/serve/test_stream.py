"""Streams: one write a frame, errors before and after the first byte, disconnects, keep-alives, fair merging."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import pytest
from starlette.requests import ClientDisconnect, Request

from freehold.errors import EngineError, Overloaded
from freehold.serve import stream as stream_module
from freehold.serve.stream import EventStream, all_or_none, merge, sse, until_disconnect


class Client:
    """The other end of an ASGI call: collects what is sent, and leaves when told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.leave = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)

    @property
    def scope(self) -> dict[str, Any]:
        return {"type": "http", "method": "POST", "path": "/", "headers": []}

    def request(self) -> Request:
        return Request(self.scope, self.receive, self.send)

    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]


class Source:
    """A generator of frames that knows whether it was closed."""

    def __init__(self, *items: Any, then: Exception | None = None, hang: bool = False) -> None:
        self.closed = False
        self._items, self._then, self._hang = items, then, hang

    async def stream(self) -> AsyncGenerator[Any, None]:
        try:
            for item in self._items:
                yield item
            if self._hang:
                await asyncio.Event().wait()
            if self._then is not None:
                raise self._then
        finally:
            self.closed = True


async def run(client: Client, source: Source, **options: Any) -> None:
    response = EventStream(client.request(), source.stream(), **options)
    await response(client.scope, client.receive, client.send)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_frame() -> None:
    assert sse(b"{}") == b"data: {}\n\n"
    assert sse(b"{}", "ping") == b"event: ping\ndata: {}\n\n"


async def test_each_frame_is_one_write() -> None:
    client, source = Client(), Source(b"a", b"b")
    await run(client, source, warnings=["careful"])
    start = client.sent[0]
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-freehold-warning"] == b"careful"
    assert client.bodies() == [b"a", b"b", b""]
    assert client.sent[-1]["more_body"] is False
    assert source.closed


async def test_a_failure_before_the_first_frame_is_raised_so_that_it_becomes_a_status() -> None:
    client, source = Client(), Source(then=EngineError("broken"))
    with pytest.raises(EngineError):
        await run(client, source)
    assert client.sent == []


@pytest.mark.parametrize("error", [EngineError("broken"), RuntimeError("a secret")])
async def test_a_failure_after_it_is_an_event_and_the_end(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    client, source = Client(), Source(b"a", then=error)
    await run(client, source)
    first, frame, last = client.bodies()
    assert (first, last) == (b"a", b"")
    body = msgspec.json.decode(frame.removeprefix(b"data: "))
    assert body["error"]["type"] == "server_error"
    assert "secret" not in frame.decode()
    assert str(error) in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, RuntimeError), "of what was not foreseen"
    assert source.closed


async def test_a_disconnect_closes_the_source_at_once() -> None:
    client, source = Client(), Source(b"a", hang=True)
    task = asyncio.create_task(run(client, source))
    await until(lambda: client.bodies() == [b"a"])
    client.leave.set()
    await asyncio.wait_for(task, 1)
    assert source.closed
    assert client.bodies() == [b"a"]
    assert task.cancelling() == 0


async def test_a_disconnect_before_the_first_frame_closes_the_source() -> None:
    client, source = Client(), Source(hang=True)
    client.leave.set()
    await run(client, source)
    assert source.closed
    assert client.sent == []


async def test_a_cancellation_from_outside_stays_a_cancellation() -> None:
    client, source = Client(), Source(b"a", hang=True)
    task = asyncio.create_task(run(client, source))
    await until(lambda: bool(client.bodies()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed


async def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_SECONDS", 0.01)
    client, source = Client(), Source(hang=True)
    task = asyncio.create_task(run(client, source))
    await until(lambda: len(client.bodies()) >= 3)
    client.leave.set()
    await task
    assert client.sent[0]["type"] == "http.response.start"
    assert set(client.bodies()) == {b": keep-alive\n\n"}


async def test_no_task_is_left_behind() -> None:
    before = len(asyncio.all_tasks())
    await run(Client(), Source(b"a"))
    assert len(asyncio.all_tasks()) == before


async def test_work_without_a_stream_stops_too() -> None:
    client = Client()
    stopped = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    task = asyncio.create_task(until_disconnect(client.request(), work()))
    await asyncio.sleep(0.01)
    client.leave.set()
    with pytest.raises(ClientDisconnect):
        await task
    assert stopped.is_set()


async def test_work_that_ends_gives_its_result() -> None:
    async def work() -> int:
        return 5

    assert await until_disconnect(Client().request(), work()) == 5


async def test_merge_is_fair_and_complete() -> None:
    sources = [Source(*range(50)) for _ in range(3)]
    seen = [pair async for pair in merge([source.stream() for source in sources])]
    for index in range(3):
        assert [item for i, item in seen if i == index] == list(range(50))
    first_thirty = [i for i, _ in seen[:30]]
    assert min(first_thirty.count(i) for i in range(3)) >= 5
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("n", [1, 3])
async def test_merge_raises_a_failure_and_closes_the_rest(n: int) -> None:
    sources = [Source(1, then=EngineError("broken"))] + [Source(1, hang=True) for _ in range(n - 1)]
    with pytest.raises(EngineError):
        async for _ in merge([source.stream() for source in sources]):
            pass
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_a_merge_closes_its_streams(n: int) -> None:
    sources = [Source(1, hang=True) for _ in range(n)]
    merged = merge([source.stream() for source in sources])
    await anext(merged)
    await merged.aclose()
    assert all(source.closed for source in sources)
    assert [t for t in asyncio.all_tasks() if t.get_name().startswith("merge-")] == []


async def test_all_or_none_closes_those_that_were_opened() -> None:
    opened: list[Any] = []

    class Stream:
        closed = False

        async def aclose(self) -> None:
            self.closed = True

    def submit(index: int) -> Any:
        if index == 2:
            raise Overloaded("full", retry_after=1)
        opened.append(Stream())
        return opened[-1]

    with pytest.raises(Overloaded):
        await all_or_none(submit, 4)
    assert [stream.closed for stream in opened] == [True, True]
