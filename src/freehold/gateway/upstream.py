"""The one way out: requests to upstreams over aiohttp, which is behind this file alone.

Nothing of a client's request gets out but its body and the few headers named here; credentials are the upstream's own.
Redirects are not followed, cookies not kept, proxies of the environment not used.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import aiohttp
from yarl import URL

from freehold import __version__
from freehold.errors import ConfigError
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.parts import Header

# What a client may tell an upstream beside the body.
FORWARDED: Final = ("anthropic-version", "anthropic-beta", "openai-beta", "traceparent", "tracestate")
# What an upstream may tell a client. Its rate limits are not: they are the gateway's, not the client's.
RETURNED: Final = ("retry-after", "retry-after-ms", "warning", "openai-processing-ms", "x-freehold-warning")

_ANTHROPIC_VERSION = "2023-06-01"  # of the Messages API, where a client of another API does not say one


class Broken(Exception):
    """The connection failed. before_answer: no byte of an answer had come, so the upstream may not have seen it."""

    def __init__(self, message: str, *, before_answer: bool) -> None:
        super().__init__(message)
        self.before_answer = before_answer


class TooMuch(Exception):
    """An answer is larger than `max_answer_bytes`."""


class Answered:
    """An upstream's answer: status and headers are there, the body is yet to come. Close it."""

    __slots__ = ("_response", "content_type", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        found = response.headers
        self.content_type = found.get("content-type", "")
        self.headers: list[Header] = [
            (name.encode(), found[name].encode("latin-1", "replace")) for name in RETURNED if name in found
        ]

    async def next(self) -> bytes:
        """What has come since; b"" at the end. Raises Broken."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(_words(error), before_answer=False) from None

    async def read(self, most: int) -> bytes:
        """The whole body. Raises Broken, TooMuch."""
        pieces: list[bytes] = []
        size = 0
        while data := await self.next():
            size += len(data)
            if size > most:
                raise TooMuch(f"the answer has more than {most} bytes")
            pieces.append(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Give the connection back if the answer was read to its end; else close it, which ends the generation."""
        self._response.close() if not self._response.content.at_eof() else self._response.release()


class Upstreams:
    """Connections to all upstreams. Made on the event loop; closed with `close`."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context(), keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),  # the relay keeps the time
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            read_bufsize=1 << 18,
        )
        self._headers: dict[str, dict[str, str]] = {}
        self._secrets: tuple[bytes, ...] = ()
        self._urls: dict[str, URL] = {}

    def configure(self, settings: Settings) -> None:
        """Read the keys. Raises ConfigError: one is missing."""
        keys = {name: read_key(name, upstream) for name, upstream in settings.upstreams.items()}
        self._headers = {name: _headers(settings.upstreams[name], key) for name, key in keys.items()}
        self._secrets = tuple(sorted({key.encode() for key in keys.values() if key}, key=len, reverse=True))

    async def post(
        self, upstream: str, url: str, body: bytes, given: Mapping[str, str], request_id: str, *, messages: bool = False
    ) -> Answered:
        """Send a request; returns with the headers of the answer. given: the client's headers. Raises Broken."""
        headers = self._headers[upstream] | {"x-request-id": request_id}
        if messages:
            headers["anthropic-version"] = _ANTHROPIC_VERSION
        for name in FORWARDED:
            if name in given:
                headers[name] = given[name]
        target = self._urls.get(url)
        if target is None:
            target = self._urls[url] = URL(url)  # a few fixed ones: base URLs are settings, paths are ours
        try:
            response = await self._session.request("POST", target, data=body, headers=headers, allow_redirects=False)
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(_words(error), before_answer=True) from None
        return Answered(response)

    def scrub(self, text: bytes) -> bytes:
        """Without any of the keys, which an upstream may have put into its message."""
        for secret in self._secrets:
            text = text.replace(secret, b"[key]")
        return text

    async def close(self) -> None:
        await self._session.close()


def read_key(name: str, upstream: Upstream) -> str:
    """The upstream's key; "" if it needs none. Raises ConfigError: the variable or file is missing or empty."""
    if upstream.key_env:
        key, where = os.environ.get(upstream.key_env, ""), f"the variable {upstream.key_env}"
    elif upstream.key_file is not None:
        where = str(upstream.key_file)
        key = _read_file(name, upstream.key_file)
    else:
        return ""
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"upstreams.{name}: there is no key in {where}")
    return key


def _read_file(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"upstreams.{name}: {path}: {error}") from None


def _headers(upstream: Upstream, key: str) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "user-agent": f"freehold-gateway/{__version__}",
    }
    if key and upstream.auth == "bearer":
        headers["authorization"] = f"Bearer {key}"
    elif key and upstream.auth == "x-api-key":
        headers["x-api-key"] = key
    return headers


def _words(error: BaseException) -> str:
    return type(error).__name__ + (f": {error}" if str(error) else "")
