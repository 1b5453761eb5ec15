"""Addresses to serve on: binding one, whether only this machine reaches it, and what its URL is. Shared by the servers.

A server without keys is bound to loopback, and then the only callers that are not local programs are web pages. One
that has pointed its own name at 127.0.0.1 is told by its Host header (`is_local_host`).
"""

from __future__ import annotations

import ipaddress
import socket

from freehold.errors import InvalidRequest


def bind(
    host: str, port: int, *, has_keys: bool, cure: str, named: tuple[str, str] = ("--host", "--port")
) -> tuple[socket.socket, bool]:
    """Bind (without listening) and say whether the address is loopback.

    has_keys: callers must show one. cure: how to get some, for the message. named: what host and port are called there.
    Raises InvalidRequest: the address cannot be bound, or it is not loopback and there are no keys.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidRequest(f"{named[0]} {host}: {error.strerror}") from None
    loopback = is_loopback(str(address[0]))
    if not loopback and not has_keys:
        raise InvalidRequest(
            f"{named[0]} {host} is reachable from other machines, and there is no API key: {cure}, "
            "or serve on 127.0.0.1"
        )
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise InvalidRequest(f"cannot serve on {host}:{port}: {error.strerror}; choose another {named[1]}") from None
    return sock, loopback


def base_url(sock: socket.socket) -> str:
    """The URL of a bound socket, with this machine's name where it is bound to all addresses."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local_host(host: str) -> bool:
    """Whether a Host header names this machine's loopback: `localhost`, `127.x.x.x` or `[::1]`, with any port."""
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    name = name.strip("[]").lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Whether an IP address is a loopback address; False for what is not an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
