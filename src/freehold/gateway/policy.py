"""Where data may go: its class, against the region, the provider and the address of an upstream.

A request that names no class may go anywhere. One that names a class may go only where

* the upstream's `data_classes` has the class, and
* the class's own table `[data_classes.NAME]`, if there is one, has the upstream's region and provider.

So a class that nobody wrote down goes nowhere. A request has the class of its header and that of its key, and both must
be allowed: a header can narrow what a key may do, never widen it. The same question is asked of every target of a
decision: the first, those after it, and the shadow. Torch-free.

Air-gapped, no upstream outside of private and loopback addresses is used: `check_addresses` refuses such settings, and
`LocalResolver` refuses a name that leads outside at the moment of connecting, when it may have come to mean something
else.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection, Iterable
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from freehold.errors import ConfigError
from freehold.gateway.call import Request
from freehold.gateway.config import DataClass, Settings, Upstream

# RFC 1918, RFC 4193 and loopback. Link-local addresses are left out, where clouds have their metadata services, and
# so is 100.64.0.0/10, which is shared with a carrier or an overlay network that may span the world.
_LOCAL = tuple(
    ipaddress.ip_network(text)
    for text in ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")
)

Resolve = Callable[[str], Collection[str]]
"""Addresses of a host name; OSError if it has none."""


class Policy:
    """The rules of the settings, worked out for every class that they name."""

    def __init__(self, settings: Settings) -> None:
        self._everywhere = frozenset(
            name
            for name, upstream in settings.upstreams.items()
            if not (settings.gateway.air_gapped and is_local(upstream) is False)
        )
        named = {each for upstream in settings.upstreams.values() for each in upstream.data_classes}
        self._allowed = {
            data_class: frozenset(
                name
                for name in self._everywhere
                if _permits(settings.upstreams[name], data_class, settings.data_classes.get(data_class))
            )
            for data_class in named | set(settings.data_classes)
        }

    def allowed(self, data_classes: Iterable[str]) -> frozenset[str]:
        """Names of the upstreams that may be sent data of all these classes. An empty class says nothing."""
        names = self._everywhere
        for data_class in data_classes:
            if data_class:
                names &= self._allowed.get(data_class, frozenset())
        return names


def classes_of(request: Request) -> tuple[str, str]:
    """What the request says its data is, and what its key says; either may be empty."""
    of_key = request.caller.data_class
    return (request.data_class or of_key, of_key)


def in_region(region: str, rule: str) -> bool:
    """Whether a region is the rule's or a part of it: eu-west-1 is in eu-west and in eu."""
    return region == rule or region.startswith(rule + "-")


def is_local_address(text: str) -> bool:
    """Whether an IP address is private or loopback; False for what is not an address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in _LOCAL if network.version == address.version)


def is_local(upstream: Upstream) -> bool | None:
    """Whether all addresses of an upstream are private or loopback, as far as they are written as such.

    None: the others are names, about which only resolving them can tell. `localhost` is this machine (RFC 6761).
    """
    verdicts = [_host_is_local(host) for host in hosts(upstream)]
    return False if False in verdicts else None if None in verdicts else True


def hosts(upstream: Upstream) -> tuple[str, ...]:
    """Host names or addresses of all replicas, each once."""
    return tuple(dict.fromkeys(urlsplit(url).hostname or "" for url in upstream.replicas))


def check_addresses(settings: Settings, resolve: Resolve | None = None) -> None:
    """Refuse upstreams outside, if the gateway is air-gapped. It asks for names and so may take seconds: call it in a
    thread. A name that cannot be resolved passes, as nothing can be sent there. Raises ConfigError."""
    if not settings.gateway.air_gapped:
        return
    for name, upstream in settings.upstreams.items():
        for host in hosts(upstream):
            outside = [host] if _host_is_local(host) is False else _outside(host, resolve or addresses_of)
            if outside:
                found = host if outside == [host] else f"{host}, which is {outside[0]},"
                raise ConfigError(f"upstreams.{name}: air_gapped is set, and {found} is not a local address")


def addresses_of(host: str) -> list[str]:
    """All addresses of a name. Raises OSError."""
    return sorted({str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})


class LocalResolver(AbstractResolver):
    """For aiohttp's connector in an air-gapped gateway: a name with any address outside does not resolve.

    Addresses that are written as such never come here: `check_addresses` and `Policy` have refused those.
    """

    def __init__(self, inner: AbstractResolver | None = None) -> None:
        self._inner = inner or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        outside = [each["host"] for each in found if not is_local_address(each["host"])]
        if outside:
            raise OSError(f"air-gapped: {host} is {outside[0]}, which is not a local address")
        return found

    async def close(self) -> None:
        await self._inner.close()


def _permits(upstream: Upstream, data_class: str, rule: DataClass | None) -> bool:
    if data_class not in upstream.data_classes:
        return False
    if rule is None:
        return True
    region = not rule.regions or any(in_region(upstream.region, each) for each in rule.regions)
    provider = not rule.providers or upstream.provider in rule.providers
    return region and provider and (not rule.local or is_local(upstream) is True)


def _host_is_local(host: str) -> bool | None:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    return is_local_address(host)


def _outside(host: str, resolve: Resolve) -> list[str]:
    if _host_is_local(host) is not None:
        return []
    try:
        return [address for address in resolve(host) if not is_local_address(address)]
    except OSError:
        return []
