"""A real gateway for tests: its server on a free port, in a thread of its own, over whatever upstreams a test has."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from freehold.address import base_url, bind
from freehold.gateway import server as gateway_server
from freehold.gateway.config import Settings, parse
from freehold.gateway.parts import Parts
from freehold.ledger import Row

T = TypeVar("T")


class LiveGateway:
    """Runs until `stop`. config: TOML, without `gateway.data_dir`, which is in `directory`. rows: of its calls."""

    def __init__(self, config: str, directory: Path, build: Callable[[Settings, Parts], Parts] | None = None) -> None:
        self.path = directory / "gateway.toml"
        self.directory = directory
        self.write(config)
        self.rows: list[Row] = []
        self.notices: list[str] = []
        settings = parse(self.path.read_text())
        sock, loopback = bind("127.0.0.1", 0, has_keys=bool(settings.keys), cure="")
        self.url = base_url(sock)
        self.parts: Parts | None = None
        self._build = build
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: gateway_server.Server | None = None
        self._thread = threading.Thread(target=self._run, args=(settings, sock, loopback), name="live-gateway")
        self._thread.start()
        self.wait(lambda: any(notice.startswith("ready") for notice in self.notices))
        self.idle_tasks = self.call(lambda: len(asyncio.all_tasks()))

    def write(self, config: str) -> None:
        """The settings, anew."""
        head = f'[gateway]\ndata_dir = "{self.directory / "data"}"\n'
        self.path.write_text(config.replace("[gateway]\n", head) if "[gateway]" in config else head + config)

    def _run(self, settings: Settings, sock: socket.socket, loopback: bool) -> None:
        with asyncio.Runner(loop_factory=gateway_server.event_loop) as runner:
            runner.run(self._main(settings, sock, loopback))

    async def _main(self, settings: Settings, sock: socket.socket, loopback: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = gateway_server.Server(
            self.path, settings, sock, loopback=loopback, notice=self.notices.append, finish=self._finish
        )
        await self._server.run()

    def _finish(self, settings: Settings, parts: Parts) -> Parts:
        if self._build is not None:
            parts = self._build(settings, parts)
        self.parts = parts.watched_by(self.rows.append)
        return self.parts

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the gateway's event loop."""
        assert self._loop is not None
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return result.result(timeout=10)

    def reload(self) -> None:
        """Take the file as it is now; returns when that is done or refused."""
        assert self._server is not None
        server = self._server
        self.call(server.reload)
        self.wait(lambda: not server.is_reloading)

    def wait(self, condition: Callable[[], bool], seconds: float = 15) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self._thread.is_alive(), "the gateway has stopped"
            assert time.monotonic() < end, f"it did not happen in time: {self.rows} {self.notices}"
            time.sleep(0.002)

    def wait_for_rows(self, count: int) -> list[Row]:
        self.wait(lambda: len(self.rows) >= count)
        assert len(self.rows) == count, self.rows
        return self.rows

    def is_idle(self) -> bool:
        """No call is running, and no task that was not there at the start."""
        return self.call(lambda: len(asyncio.all_tasks())) <= self.idle_tasks

    def begin_stop(self) -> None:
        assert self._loop is not None
        assert self._server is not None
        if self._thread.is_alive() and not self._server.is_stopping:
            self._loop.call_soon_threadsafe(self._server.stop)

    def stop(self) -> None:
        self.begin_stop()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), "the gateway did not stop"
