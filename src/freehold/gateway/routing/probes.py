"""Asks replicas how they are: health, load, and a generation before they get calls. Torch-free.

A replica of an engine is ready only when it has completed a generation, at its start, after it was out, and when the
settings say that it has other weights: an engine that answers its health probe may still be compiling, or fail at
the first token. An API (`engine = "api"`) is probed only if its `health` is in the settings, and never asked for a
generation, which costs money: its circuit breaker tells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from freehold.errors import ConfigError
from freehold.gateway.config import Speaks, Upstream
from freehold.gateway.policy import LocalResolver
from freehold.gateway.routing.engine_load import read_load
from freehold.gateway.routing.replicas import Clock, Replica

_log = logging.getLogger(__name__)

Auth = Callable[[str, Upstream], Mapping[str, str]]
"""The headers with which the gateway calls an upstream, by its name and settings. Raises ConfigError: no key."""

PROBE_SECONDS = 5.0  # for the answer to a probe, at the most
_MOST_BYTES = 4 << 20  # of an answer that is read

# What to post, below the base URL, to have something generated, and the field that has it; the first that is spoken.
_GENERATIONS: Final[Mapping[Speaks, tuple[str, Mapping[str, Any], str]]] = {
    "chat": ("/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}, "choices"),
    "completions": ("/completions", {"prompt": "Hi", "max_tokens": 1}, "choices"),
    "responses": ("/responses", {"input": "Hi", "max_output_tokens": 16}, "output"),
    "messages": ("/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}, "content"),
    "embeddings": ("/embeddings", {"input": "Hi"}, "data"),
}


def is_probed(upstream: Upstream) -> bool:
    """Whether there is a health probe: engines have one, APIs only if the settings say which."""
    return upstream.engine != "api" or "health" in upstream.model_fields_set


def is_warmed(upstream: Upstream) -> bool:
    """Whether a replica must complete a generation before it is ready."""
    return upstream.engine != "api"


class Prober:
    """Asks one replica after the other. Its connections are its own: waiting calls do not keep a probe waiting."""

    def __init__(self, auth: Auth, *, air_gapped: bool = False, clock: Clock = time.monotonic) -> None:
        self._auth = auth
        self.air_gapped = air_gapped
        self._clock = clock
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # by air_gapped, which a reload may change

    async def look(self, replica: Replica, models: Sequence[str]) -> None:
        """One round: health, then a generation with each of these models if one is due, then load."""
        settings = replica.settings
        before = replica.state
        if is_probed(settings) and not await self._healthy(replica):
            replica.probe_failures += 1
            if replica.probe_failures >= settings.health.failures:
                replica.healthy = replica.ready = replica.fresh = False
        else:
            replica.probe_failures = 0
            if not replica.ready:
                replica.ready = not is_warmed(settings) or await self._generates(replica, models)
                replica.fresh = False
            replica.healthy = True  # but out, if it generated nothing: neither fresh nor ready
            if settings.metrics:
                await self._read_load(replica)
        if replica.state != before:
            level = logging.INFO if replica.state == "ready" else logging.WARNING
            _log.log(level, "upstream %s: %s is %s, was %s", replica.upstream, replica.url, replica.state, before)

    async def close(self) -> None:
        while self._sessions:
            await self._sessions.popitem()[1].close()

    async def _healthy(self, replica: Replica) -> bool:
        status, _ = await self._ask(replica, root(replica.url) + replica.settings.health.path)
        return 200 <= status < 300

    async def _generates(self, replica: Replica, models: Sequence[str]) -> bool:
        """Whether every model generates something."""
        path, body, field = next(_GENERATIONS[each] for each in _GENERATIONS if each in replica.settings.speaks)
        for model in models:
            status, answer = await self._ask(
                replica,
                replica.url + path,
                {"model": model, **body},
                seconds=replica.settings.health.warm_up_seconds,
            )
            if status != 200 or not _has(answer, field):
                _log.warning(
                    "upstream %s: %s generates nothing with %r (status %d)",
                    *(replica.upstream, replica.url, model, status),
                )
                return False
        return True

    async def _read_load(self, replica: Replica) -> None:
        in_flight = replica.in_flight
        status, text = await self._ask(replica, root(replica.url) + "/metrics")
        load = read_load(replica.settings.engine, text.decode(errors="replace")) if status == 200 else None
        if load is not None:
            replica.load, replica.load_at, replica.load_in_flight = load, self._clock(), in_flight

    async def _ask(
        self, replica: Replica, url: str, body: Mapping[str, Any] | None = None, seconds: float = PROBE_SECONDS
    ) -> tuple[int, bytes]:
        """Status and body; status 0 if there was no answer in time, or one without end. No redirect is followed."""
        try:
            headers = dict(self._auth(replica.upstream, replica.settings))
        except ConfigError as error:
            _log.warning("%s", error.message)
            return 0, b""
        data = None if body is None else msgspec.json.encode(body)
        if data is not None:
            headers["content-type"] = "application/json"
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=replica.settings.timeouts.connect)
        try:
            async with self._open().request(
                "GET" if data is None else "POST",
                url,
                data=data,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                found = bytearray()
                async for chunk in response.content.iter_any():
                    found += chunk
                    if len(found) > _MOST_BYTES:
                        return 0, b""
                return response.status, bytes(found)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return 0, b""

    def _open(self) -> aiohttp.ClientSession:
        session = self._sessions.get(self.air_gapped)
        if session is None:
            resolver = LocalResolver() if self.air_gapped else None
            connector = aiohttp.TCPConnector(limit=0, resolver=resolver, keepalive_timeout=30)
            session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
            self._sessions[self.air_gapped] = session
        return session


def root(url: str) -> str:
    """Scheme, host and port of a base URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _has(answer: bytes, field: str) -> bool:
    """Whether a JSON object has a list with something in it there."""
    try:
        found = msgspec.json.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get(field), list) and bool(found[field])
