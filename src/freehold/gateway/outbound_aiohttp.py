"""The way out over aiohttp, where httptools is not installed."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from freehold.gateway.outbound import Broken
from freehold.gateway.policy import LocalResolver


class Aiohttp:
    """Made on the event loop."""

    def __init__(self) -> None:
        self.local_only = False
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=20, resolver=_Resolver(self)),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            read_bufsize=1 << 18,
        )

    async def post(self, url: str, head: bytes, body: bytes, connect_seconds: float) -> _Incoming:
        lines = [line.partition(": ") for line in head.decode("latin-1").split("\r\n") if line]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds)
        try:
            response = await self._session.request(
                "POST",
                url,
                data=body,
                headers=[(name, value) for name, _, value in lines],
                allow_redirects=False,
                timeout=timeout,
            )
        except aiohttp.ClientResponseError as error:
            raise ValueError(f"what came is not HTTP: {error.message}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(_words(error), before_answer=True) from None
        return _Incoming(response)

    async def close(self) -> None:
        await self._session.close()


class _Resolver(AbstractResolver):
    def __init__(self, owner: Aiohttp) -> None:
        self._owner = owner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        resolver = LocalResolver() if self._owner.local_only else aiohttp.ThreadedResolver()
        return await resolver.resolve(host, port, family)

    async def close(self) -> None:
        """Nothing is held."""


class _Incoming:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.fields: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}

    async def next(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(_words(error), before_answer=False) from None

    def close(self) -> None:
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


def _words(error: BaseException) -> str:
    return type(error).__name__ + (f": {error}" if str(error) else "")
