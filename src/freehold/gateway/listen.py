"""What serves the door's ASGI application: our own server on llhttp and libuv, or uvicorn where they are not installed.

With httptools and uvloop a call costs about half as much (docs/decisions/0007).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
from collections.abc import Iterator
from typing import Protocol

from freehold.gateway.app import Door


class Listens(Protocol):
    async def start(self, sock: socket.socket) -> None:
        """Returns when connections are taken. The socket is its own from now on."""

    async def stop(self, seconds: float) -> None:
        """Take no more, and give answers under way so long to be taken."""


def event_loop() -> asyncio.AbstractEventLoop:
    """A new event loop: uvloop's, if installed."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def make_listener(door: Door) -> Listens:
    if importlib.util.find_spec("httptools") is None:
        return _Uvicorn(door)
    from freehold.gateway.http11 import Listener

    return Listener(door)


class _Uvicorn:
    def __init__(self, door: Door) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:  # they are the process's
                yield

        self._server = Server(
            uvicorn.Config(
                door,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
            )
        )

    async def start(self, sock: socket.socket) -> None:
        self._serving = asyncio.create_task(self._server.serve(sockets=[sock]))
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110  it has no event for it
            await asyncio.sleep(0.005)

    async def stop(self, seconds: float) -> None:
        self._server.should_exit = True
        await self._serving
