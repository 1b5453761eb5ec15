"""The server process: the socket, signals, draining, and what is printed when it is ready.

The first SIGTERM or SIGINT drains: `/ready` turns 503, new requests get 503 with `retry-after`, running ones finish
(up to `drain_timeout`), then the process ends with exit code 0. The socket stays open meanwhile, so that load
balancers see the 503 instead of a refused connection. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from freehold.address import base_url, bind
from freehold.engine.async_engine import AsyncEngine
from freehold.engine.guide import GuideCompiler
from freehold.errors import InvalidRequest
from freehold.serve.app import build_app
from freehold.serve.service import ChatService, CompletionService
from freehold.serve.state import SamplingDefaults, ServerState

if TYPE_CHECKING:
    from freehold.engine.engine import Engine
    from freehold.model.chat.template import ChatTemplate
    from freehold.model.tokenizer import Tokenizer

API_KEY_VARIABLE = "FREEHOLD_API_KEY"

# Longer than the idle timeout of common HTTP clients, so that it is never the server that closes first.
KEEP_ALIVE_SECONDS = 75
CLOSE_SECONDS = 5  # for slow readers to take the end of their answer, after the drain


def read_api_keys(file: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line (`#` begins a comment), and the one in FREEHOLD_API_KEY. Raises InvalidRequest."""
    keys = [os.environ.get(API_KEY_VARIABLE, "").strip()]
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--api-key-file {file}: {error}") from None
        keys += [line.partition("#")[0].strip() for line in lines]
        if not any(keys[1:]):
            raise InvalidRequest(f"--api-key-file {file}: there is no key in it")
    found = tuple(dict.fromkeys(key for key in keys if key))
    for key in found:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InvalidRequest("an API key must be printable ASCII without spaces, or no client can send it")
    return found


def open_socket(host: str, port: int, *, has_keys: bool) -> tuple[socket.socket, bool]:
    """Bind (without listening) and say whether the address is loopback.

    Done before weights are loaded, so that a wrong address fails at once. Raises InvalidRequest: the address cannot
    be bound, or it is not loopback and there are no API keys.
    """
    return bind(host, port, has_keys=has_keys, cure=f"set {API_KEY_VARIABLE} or give --api-key-file")


def build_state(
    engine: Engine,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    model_names: Sequence[str] = (),
    sampling: SamplingDefaults | None = None,
    api_keys: tuple[str, ...] = (),
    salt_per_key: bool = False,
    loopback: bool = True,
) -> ServerState:
    """Put services around an engine. model_names: by default the engine's own.

    Structured output needs llguidance; without it, requests that ask for it are refused.
    """
    async_engine = AsyncEngine(engine)
    guides = None
    if importlib.util.find_spec("llguidance") is not None:
        guides = GuideCompiler(tokenizer, engine.config.eos_token_ids)
    return ServerState(
        chat=ChatService(async_engine, tokenizer, template, guides),
        completion=CompletionService(async_engine, tokenizer, guides),
        model_names=tuple(model_names) or (engine.config.model_name,),
        sampling=sampling or SamplingDefaults(),
        api_keys=api_keys,
        salt_per_key=salt_per_key,
        loopback=loopback,
    )


def serve(
    state: ServerState,
    sock: socket.socket,
    *,
    drain_timeout: float = 30.0,
    notice: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Serve until a signal; returns when drained. Raises what went wrong with the first generation.

    Call it on the main thread. drain_timeout: seconds. notice: where messages to the operator go.
    """

    async def main() -> None:
        server = Server(state, sock, drain_timeout=drain_timeout, notice=notice)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, _on_signal, server, number)
        await server.run()

    asyncio.run(main())


def _on_signal(server: Server, number: int) -> None:
    if server.is_stopping:
        sys.stderr.write("stopped at once\n")
        sys.stderr.flush()
        os._exit(128 + number)  # not even the engine's thread is waited for
    server.stop()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling, and with an event for when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server on one event loop, without signal handlers: `serve` adds them, tests do without.

    It closes the socket.
    """

    def __init__(
        self, state: ServerState, sock: socket.socket, *, drain_timeout: float, notice: Callable[[str], None]
    ) -> None:
        self.is_stopping = False
        self._state = state
        self._socket = sock
        self._url = base_url(sock)
        self._drain_timeout = drain_timeout
        self._notice = notice
        self._failure: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = _Uvicorn(
            uvicorn.Config(
                build_app(state, on_warm=self._on_warm),
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )

    async def run(self) -> None:
        """Serve until `stop` has drained. Raises what went wrong with the first generation."""
        await self._server.serve(sockets=[self._socket])
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begin to drain; `run` returns when that is done. Call it on the event loop."""
        self.is_stopping = True
        self._notice(f"draining: running requests have {self._drain_timeout:g} s; signal again to stop at once")
        self._spawn(self._drain())

    async def _drain(self) -> None:
        await self._state.engine.drain(self._drain_timeout)
        self._server.should_exit = True

    def _on_warm(self, failure: Exception | None) -> None:
        if failure is None:
            self._spawn(self._announce())
        else:
            self._failure = failure
            self._server.should_exit = True

    async def _announce(self) -> None:
        await self._server.listens.wait()  # the engine may be warm before
        for line in ready_lines(self._state, self._url):
            self._notice(line)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop keeps no hold of its tasks
        task.add_done_callback(self._tasks.discard)


def ready_lines(state: ServerState, url: str) -> Sequence[str]:
    """What is printed when requests are taken: where, and what to try."""
    config = state.engine.config
    key = f'\n  -H "authorization: Bearer ${API_KEY_VARIABLE}" \\' if state.api_keys else ""
    example = (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\{key}\n"
        """  -d '{"messages": [{"role": "user", "content": "Hello"}]}'"""
    )
    return f"ready: {state.model_name} on {url}/v1 (context {config.max_model_len:,} tokens)", f"try:   {example}"
