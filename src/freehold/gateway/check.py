"""What `freehold gateway check` says of valid settings: who may be asked, where each alias goes, and warnings."""

from __future__ import annotations

from collections.abc import Iterator

from freehold.errors import ConfigError
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.server import read_admin_key
from freehold.gateway.upstream import read_key


def report(settings: Settings) -> Iterator[str]:
    """Lines. Raises ConfigError for a key that is not where the settings say."""
    read_admin_key(settings)
    gateway = settings.gateway
    yield f"gateway on {gateway.host}:{gateway.port}, data in {gateway.data_dir}, {settings.store.kind}"
    yield f"keys: {', '.join(settings.keys) or 'none: anybody on this machine may ask'}"
    for name, upstream in settings.upstreams.items():
        yield from _upstream(name, upstream)
    for alias, model in settings.models.items():
        total = sum(arm.weight for arm in model.arms)
        arms = [f"{arm.name} {arm.weight / total:.1%} → {arm.upstream}/{arm.model}" for arm in model.arms]
        yield f"model {alias}: {'; '.join(arms)}" + (f"; then {', '.join(model.fallback)}" if model.fallback else "")
        if model.note:
            yield f"  note: {model.note}"


def _upstream(name: str, upstream: Upstream) -> Iterator[str]:
    key = read_key(name, upstream)
    if key and any(url.startswith("http://") for url in upstream.replicas) and upstream.auth != "none":
        where = "its key goes over plain http"
        if any(not url.startswith(("http://127.", "http://localhost", "http://[::1]")) for url in upstream.replicas):
            yield f"warning: upstream {name}: {where}"
    if key and upstream.auth == "none":
        raise ConfigError(f'upstreams.{name}: it has a key, and auth = "none"')
    owner = upstream.provider or "ourselves"
    yield (
        f"upstream {name} ({upstream.engine}, {owner}{', ' + upstream.region if upstream.region else ''}): "
        + ", ".join(upstream.replicas)
    )
    if upstream.note:
        yield f"  note: {upstream.note}"
    for model, facts in upstream.models.items():
        if facts.licence:
            yield f"  {model}: licence {facts.licence}"
