"""The process of a gateway: the socket, signals, draining, reloading, and what is printed when it is ready.

The first SIGTERM or SIGINT drains: `/ready` turns 503, new calls get 503 with `retry-after`, running ones finish (up to
`drain_seconds`), then the rows are on the disk and the process ends with exit code 0. A second signal ends it at once.
SIGHUP reads the settings again, as does a change of the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from freehold.address import base_url, bind
from freehold.errors import ConfigError
from freehold.gateway.access.keys import check_admin_key
from freehold.gateway.build import build_parts
from freehold.gateway.config import Settings, read
from freehold.gateway.door.app import Door
from freehold.gateway.door.request import RequestReader
from freehold.gateway.door.upstream import Upstreams
from freehold.gateway.http.http11 import Listener
from freehold.gateway.identity import Hasher, read_or_make_key
from freehold.gateway.keeping.kept import has_keys
from freehold.gateway.parts import Parts
from freehold.gateway.reload import Reloader

Notice = Callable[[str], None]

_COLLECT_AFTER = 10_000  # objects: most of a call's die with it, and looking for cycles more often costs every call
_CLOSE_SECONDS = 5  # for slow readers to take the end of their answer, after the drain


def serve(path: Path, notice: Notice) -> None:
    """Serve the settings of a file until a signal; returns when drained. Call it on the main thread.

    Raises ConfigError, InvalidRequest (the address).
    """
    settings = read(path)
    sock, loopback = bind(
        settings.gateway.host,
        settings.gateway.port,
        has_keys=has_keys(settings),
        cure="make one with `freehold gateway key new`",
        named=("gateway.host", "gateway.port"),
    )
    _settle_memory()
    with sock, asyncio.Runner(loop_factory=event_loop) as runner:
        runner.run(_main(path, settings, sock, loopback, notice))


def event_loop() -> asyncio.AbstractEventLoop:
    """A new event loop: libuv's (docs/decisions/0007), but on Windows, where there is none."""
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def _main(path: Path, settings: Settings, sock: socket.socket, loopback: bool, notice: Notice) -> None:
    server = Server(path, settings, sock, loopback=loopback, notice=notice)
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if server.is_stopping:
            sys.stderr.write("stopped at once\n")
            sys.stderr.flush()
            os._exit(128 + number)
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    await server.run()


class Server:
    """One gateway on one event loop, without signal handlers: `serve` adds them, tests do without. It closes the
    socket. finish: a last word about the parts, for whoever embeds a gateway."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        sock: socket.socket,
        *,
        loopback: bool,
        notice: Notice,
        finish: Callable[[Settings, Parts], Parts] = lambda _, parts: parts,
    ) -> None:
        self.is_stopping = False
        self._path = path
        self._settings = settings
        self._socket = sock
        self._loopback = loopback
        self._notice = notice
        self._finish = finish
        self._stop = asyncio.Event()
        self._reloader: Reloader | None = None

    def stop(self) -> None:
        """Begin to drain; `run` returns when that is done. Call it on the event loop."""
        self.is_stopping = True
        self._stop.set()

    def reload(self) -> None:
        if self._reloader is not None:
            self._reloader.reload()

    @property
    def is_reloading(self) -> bool:
        return self._reloader is not None and self._reloader.reloading

    async def run(self) -> None:
        settings = self._settings
        upstreams = Upstreams()
        try:
            upstreams.configure(settings)
            parts = self._finish(settings, await build_parts(settings, base_url(self._socket)))
            await parts.store.start()
            try:
                hasher = Hasher(parts.identity or read_or_make_key(settings.gateway.data_dir))
                door = Door(
                    settings,
                    parts,
                    upstreams,
                    RequestReader(hasher),
                    admin_key=read_admin_key(settings),
                    local_only=self._loopback and parts.keys.authenticate("") is not None,
                )
                everyone = (upstreams, *parts.configured, door)
                self._reloader = Reloader(self._path, settings, everyone, self._notice)
                background = [asyncio.create_task(self._reloader.watch())]
                background += [asyncio.ensure_future(each()) for each in parts.background]
                try:
                    await self._serve(door)
                finally:
                    for task in background:
                        task.cancel()
                    await asyncio.wait(background)
            finally:
                await parts.store.stop()
        finally:
            await upstreams.close()

    async def _serve(self, door: Door) -> None:
        listener = Listener(door)
        await listener.start(self._socket)
        self._notice(f"ready: gateway on {base_url(self._socket)}/v1 ({', '.join(self._settings.models)})")
        await self._stop.wait()
        await self._drain(door)
        await listener.stop(_CLOSE_SECONDS)
        await door.close()

    async def _drain(self, door: Door) -> None:
        seconds = self._settings.gateway.drain_seconds
        door.draining = True
        self._notice(f"draining: running calls have {seconds:g} s; signal again to stop at once")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(door.idle(), seconds)
        for call in list(door.calls):
            call.stop()


def _settle_memory() -> None:
    """Spare calls the pauses of a garbage collector that looks through every module: what is there by now stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 10, 10)


def read_admin_key(settings: Settings) -> str:
    """ "" if there is to be no admin API. Raises ConfigError: a key that is missing, too short, or everybody's."""
    gateway = settings.gateway
    if gateway.admin_key_env:
        key = os.environ.get(gateway.admin_key_env, "").strip()
        where = f"the variable {gateway.admin_key_env}"
    elif gateway.admin_key_file is not None:
        where = str(gateway.admin_key_file)
        try:
            key = gateway.admin_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"gateway.admin_key_file: {where}: {error}") from None
    else:
        return ""
    return check_admin_key(key, f"gateway: {where}")
