"""The report of `freehold gateway check`: the settings in words (`describe`), and whether their keys are there."""

from __future__ import annotations

from collections.abc import Iterator

from freehold.errors import ConfigError
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.describe import describe, warnings
from freehold.gateway.door.upstream import read_key
from freehold.gateway.policy import check_addresses
from freehold.gateway.server import read_admin_key


def report(settings: Settings) -> Iterator[str]:
    """Lines. Raises ConfigError: a key is not where the settings say, or they are air-gapped and call outside."""
    read_admin_key(settings)
    check_addresses(settings)
    gateway = settings.gateway
    yield f"gateway on {gateway.host}:{gateway.port}, data in {gateway.data_dir}, {settings.store.kind}"
    yield f"keys in the settings: {', '.join(settings.keys) or 'none'}; `freehold gateway key list` shows the others"
    yield from describe(settings)
    for name, upstream in settings.upstreams.items():
        yield from _key_warnings(name, upstream)
    for warning in warnings(settings):
        yield f"warning: {warning}"


def _key_warnings(name: str, upstream: Upstream) -> Iterator[str]:
    key = read_key(name, upstream)
    if key and upstream.auth == "none":
        raise ConfigError(f'upstreams.{name}: it has a key, and auth = "none"')
    if key and any(
        url.startswith("http://") and not url.startswith(("http://127.", "http://localhost", "http://[::1]"))
        for url in upstream.replicas
    ):
        yield f"warning: upstreams.{name}: its key goes over plain http"
