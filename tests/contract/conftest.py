"""A real server for SDK tests: the real engine over canned text, on a free port, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import openai
import pytest

from freehold.engine.engine import Engine
from freehold.engine.metrics import EngineStats
from freehold.engine.sim import SimConfig, build_sim_engine
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.serve.server import Server, base_url, build_state, open_socket

T = TypeVar("T")


class LiveServer:
    """A server that runs until `stop`. What happens inside is visible: stats, and tasks of its event loop.

    build: makes another engine than the simulated one, for which sim and engine_options are.
    """

    def __init__(
        self,
        sim: SimConfig | None = None,
        *,
        profile: str = "glm-5.2",
        build: Callable[[], tuple[Engine, Tokenizer]] | None = None,
        api_keys: tuple[str, ...] = (),
        salt_per_key: bool = False,
        warm: bool = True,
        **engine_options: Any,
    ) -> None:
        engine, tokenizer = build() if build is not None else build_sim_engine(sim, **engine_options)
        sock, loopback = open_socket("127.0.0.1", 0, has_keys=bool(api_keys))
        self.url = base_url(sock)
        self.state = build_state(
            engine,
            tokenizer,
            ChatTemplate.builtin(profile),
            api_keys=api_keys,
            salt_per_key=salt_per_key,
            loopback=loopback,
            model_names=("sim", "alias"),
        )
        self.notices: list[str] = []
        self._sock = sock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="live-server")
        self._thread.start()
        if warm:
            self.wait(lambda: any(notice.startswith("ready") for notice in self.notices))
        self.idle_tasks = self.tasks() if warm else 0

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = Server(self.state, self._sock, drain_timeout=5, notice=self.notices.append)
        await self._server.run()

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the server's event loop."""
        assert self._loop is not None
        result: Future[T] = Future()
        self._loop.call_soon_threadsafe(lambda: result.set_result(function()))
        return result.result(timeout=10)

    def tasks(self) -> int:
        """Unfinished tasks, those that serve an idle connection not included (they end with the request)."""
        return self.call(lambda: len(asyncio.all_tasks()))

    def stats(self) -> EngineStats:
        return self.state.engine.stats()

    def wait(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self._thread.is_alive(), "the server has stopped"
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.002)

    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, no block is held, no task is left."""
        stats = self.stats()
        return stats.running == stats.waiting == 0 and stats.kv_usage == 0 and self.tasks() <= self.idle_tasks

    def begin_stop(self) -> None:
        assert self._loop is not None
        assert self._server is not None
        if self._thread.is_alive() and not self._server.is_stopping:
            self._loop.call_soon_threadsafe(self._server.stop)

    def stop(self) -> None:
        self.begin_stop()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    """The server that most tests share."""
    live = LiveServer()
    yield live
    live.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers with options of their own; they stop with the test."""
    started: list[LiveServer] = []

    def start_server(*args: Any, **options: Any) -> LiveServer:
        started.append(LiveServer(*args, **options))
        return started[-1]

    yield start_server
    for live in started:
        live.stop()


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as sdk:
        yield sdk
