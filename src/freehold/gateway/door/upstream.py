"""The one way out: who gets which key, and what of a client's request goes along.

Nothing of a client's request gets out but its body and the few headers named here; credentials are the upstream's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from freehold.errors import ConfigError
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.http.client import Http11
from freehold.gateway.http.outbound import Incoming, Outbound
from freehold.gateway.parts import Header

# What a client may tell an upstream beside the body.
FORWARDED: Final = ("anthropic-version", "anthropic-beta", "openai-beta", "traceparent", "tracestate")
# What an upstream may tell a client. Its rate limits are not: they are the gateway's, not the client's.
RETURNED: Final = ("retry-after", "retry-after-ms", "warning", "openai-processing-ms", "x-freehold-warning")

# Of the Messages API, where the client does not say one.
_ANTHROPIC_VERSION: Final = b"anthropic-version: 2023-06-01\r\n"


class TooMuch(Exception):
    """An answer is larger than `max_answer_bytes`."""


class Answered:
    """An upstream's answer: status and headers are there, the body is yet to come. Close it."""

    __slots__ = ("close", "content_type", "headers", "next", "status")

    def __init__(self, incoming: Incoming) -> None:
        self.status = incoming.status
        fields = incoming.fields
        self.content_type = fields.get("content-type", "")
        if fields.get("content-encoding", "identity") != "identity":
            incoming.close()
            raise ValueError(f"it is compressed ({fields['content-encoding'][:20]}), which was not asked for")
        self.headers: list[Header] = [
            (name.encode(), fields[name].encode("latin-1", "replace")) for name in RETURNED if name in fields
        ]
        self.next = incoming.next
        self.close = incoming.close

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


class Upstreams:
    """All upstreams: their keys, and the connections to them. Made on the event loop; closed with `close`."""

    def __init__(self, outbound: Outbound | None = None) -> None:
        self._outbound = outbound or Http11()
        self._heads: dict[str, bytes] = {}
        self._connect: dict[str, float] = {}
        self._secrets: tuple[bytes, ...] = ()

    def configure(self, settings: Settings) -> None:
        """Read the keys. Raises ConfigError: one is missing."""
        keys = {name: read_key(name, upstream) for name, upstream in settings.upstreams.items()}
        self._heads = {name: _head(settings.upstreams[name], key) for name, key in keys.items()}
        self._connect = {name: upstream.timeouts.connect for name, upstream in settings.upstreams.items()}
        self._outbound.local_only = settings.gateway.air_gapped
        self._secrets = tuple(sorted({key.encode() for key in keys.values() if key}, key=len, reverse=True))

    async def post(
        self, upstream: str, url: str, body: bytes, given: Mapping[str, str], request_id: str, *, messages: bool = False
    ) -> Answered:
        """Send a request; returns with the headers of the answer. given: the client's headers.

        Raises Broken, ValueError: it is no answer.
        """
        lines = [self._heads[upstream], b"x-request-id: %b\r\n" % request_id.encode()]
        if messages and "anthropic-version" not in given:
            lines.append(_ANTHROPIC_VERSION)
        lines += [b"%b: %b\r\n" % (name.encode(), _one_line(given[name])) for name in FORWARDED if name in given]
        return Answered(await self._outbound.post(url, b"".join(lines), body, self._connect[upstream]))

    def scrub(self, text: bytes) -> bytes:
        """Without any of the keys, which an upstream may have put into its message."""
        for secret in self._secrets:
            text = text.replace(secret, b"[key]")
        return text

    async def close(self) -> None:
        await self._outbound.close()


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


def _head(upstream: Upstream, key: str) -> bytes:
    """The header lines that every request to an upstream has."""
    head = (
        b"content-type: application/json\r\naccept: application/json, text/event-stream\r\n"
        b"accept-encoding: identity\r\nuser-agent: freehold-gateway\r\n"
    )
    return head + b"".join(b"%b: %b\r\n" % (n.encode(), v.encode()) for n, v in _authorization(upstream, key).items())


def auth_headers(name: str, upstream: Upstream) -> Mapping[str, str]:
    """What shows an upstream who asks; {} if it needs nothing. Raises ConfigError."""
    return _authorization(upstream, read_key(name, upstream))


def _authorization(upstream: Upstream, key: str) -> Mapping[str, str]:
    if key and upstream.auth == "bearer":
        return {"authorization": f"Bearer {key}"}
    if key and upstream.auth == "x-api-key":
        return {"x-api-key": key}
    return {}


def _one_line(value: str) -> bytes:
    """Of a client's header. The server has refused line breaks; this holds behind any server."""
    return value.encode("latin-1", "replace").replace(b"\r", b" ").replace(b"\n", b" ")
