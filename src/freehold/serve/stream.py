"""Server-sent events, and stopping work when the client goes away.

    frames: AsyncGenerator[bytes, None]      # each item is one or more whole SSE frames, made with `sse`
    return EventStream(request, frames, warnings=..., error_frame=...)

One write per item, nothing buffered, no task per item. Each response in flight has one watcher task, which waits for
the disconnect and also sends keep-alive comments through long prefills.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from freehold.serve.wire import common_headers, encode_json, error_body, log_failure

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE_SECONDS = 15.0  # proxies commonly give up on a silent response after 60


def sse(data: bytes, event: str | None = None) -> bytes:
    """One SSE frame. data is JSON, so it has no line breaks."""
    if event is None:
        return b"".join((b"data: ", data, b"\n\n"))
    return b"".join((b"event: ", event.encode(), b"\ndata: ", data, b"\n\n"))


def openai_error_frame(error: Exception) -> bytes:
    """How OpenAI's streams report a failure after the first byte; the SDK raises APIError on it."""
    return sse(encode_json(error_body(error)))


@asynccontextmanager
async def cancelled_on_disconnect(
    receive: Receive, *, on_idle: Callable[[], Awaitable[None]] | None = None, interval: float | None = None
) -> AsyncIterator[None]:
    """Cancel the body of the `async with` when the client disconnects, and raise ClientDisconnect from it.

    The request body must have been read. `on_idle` is called every `interval` seconds.
    Leave the context before sending the last part of a response: servers report a disconnect after it.
    """
    task = asyncio.current_task()
    assert task is not None  # a coroutine always runs in one
    gone = False

    async def watch() -> None:
        nonlocal gone
        while not gone:
            try:
                message = await asyncio.wait_for(receive(), interval)
            except TimeoutError:
                if on_idle is not None:
                    await on_idle()
                continue
            gone = message["type"] == "http.disconnect"
        task.cancel()

    watcher = asyncio.create_task(watch(), name="disconnect-watcher")
    try:
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.wait({watcher})
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it and raising ClientDisconnect if the client leaves first."""
    async with cancelled_on_disconnect(request.receive):
        return await work


class EventStream(Response):
    """An SSE response over a generator of frames.

    The status line goes out with the first frame (or the first keep-alive), so that a failure before it is a
    proper HTTP error, which a gateway can still retry elsewhere. A failure after it is sent as `error_frame(error)`
    and ends the stream. The generator is always closed.
    """

    def __init__(
        self,
        request: Request,
        frames: AsyncGenerator[bytes, None],
        *,
        warnings: Iterable[str] = (),
        error_frame: Callable[[Exception], bytes] = openai_error_frame,
        keep_alive: bytes = b": keep-alive\n\n",
    ) -> None:
        headers = {
            **common_headers(request, warnings),
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would collect the frames
        }
        self.status_code = 200
        self.background = None
        self._frames = frames
        self._error_frame = error_frame
        self._keep_alive = keep_alive
        self._start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        lock = asyncio.Lock()  # the watcher writes too
        started, last_write = False, clock()

        async def write(data: bytes) -> None:
            nonlocal started, last_write
            async with lock:
                if not started:
                    started = True
                    await send(self._start)
                await send({"type": "http.response.body", "body": data, "more_body": True})
                last_write = clock()

        async def keep_alive() -> None:
            if clock() - last_write >= KEEP_ALIVE_SECONDS:
                await write(self._keep_alive)

        try:
            async with cancelled_on_disconnect(receive, on_idle=keep_alive, interval=KEEP_ALIVE_SECONDS):
                try:
                    async for frame in self._frames:
                        await write(frame)
                except Exception as error:
                    if not started:
                        raise
                    log_failure(f"{scope['method']} {scope['path']}", error)
                    await write(self._error_frame(error))
                finally:
                    await self._frames.aclose()
        except ClientDisconnect:
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def all_or_none(submit: Callable[[int], AsyncGenerator[T, None]], n: int) -> list[AsyncGenerator[T, None]]:
    """`[submit(0), …, submit(n - 1)]`; if one raises, those before it are closed."""
    opened: list[AsyncGenerator[T, None]] = []
    try:
        for index in range(n):
            opened.append(submit(index))  # noqa: PERF401  what was opened must be known if one raises
    except BaseException:
        for stream in opened:
            await stream.aclose()
        raise
    return opened


@dataclass(frozen=True, slots=True)
class _Ended:
    """One of the merged streams has nothing more."""

    failure: Exception | None


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Interleave several generators as (index, item), first come first served, taking turns.

    The first failure is raised and ends the others. All of them are closed in the end.
    """
    if len(streams) == 1:
        (only,) = streams
        try:
            async for item in only:
                yield 0, item
        finally:
            await only.aclose()
        return

    # Each stream has at most one item in the queue: they take turns, and a slow reader holds all of them back.
    queue: asyncio.Queue[tuple[int, T] | _Ended] = asyncio.Queue()
    taken = [asyncio.Event() for _ in streams]

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        ended = _Ended(None)
        try:
            async for item in stream:
                queue.put_nowait((index, item))
                await taken[index].wait()
                taken[index].clear()
        except Exception as error:
            ended = _Ended(error)
        queue.put_nowait(ended)

    pumps = [asyncio.create_task(pump(i, s), name=f"merge-{i}") for i, s in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            entry = await queue.get()
            if not isinstance(entry, _Ended):
                taken[entry[0]].set()
                yield entry
            elif entry.failure is not None:
                raise entry.failure
            else:
                running -= 1
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
