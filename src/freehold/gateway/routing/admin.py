"""The admin API of routing: replicas, draining and restoring them, and what rules save.

    GET  /admin/replicas            state, calls and load of each
    POST /admin/replicas/drain      {"url": ...}: no new calls there
    POST /admin/replicas/restore    {"url": ...}: back, after a generation
    GET  /admin/savings             of each routing rule, since the start

Torch-free.
"""

from __future__ import annotations

import msgspec

from freehold.errors import InvalidRequest
from freehold.gateway.parts import Answer, Asked, Handler, Routes
from freehold.gateway.routing.fleet import Fleet
from freehold.gateway.routing.savings import Savings


class _Where(msgspec.Struct, forbid_unknown_fields=True):
    url: str


def admin_routes(fleet: Fleet, savings: Savings) -> Routes:
    """Handlers for `Parts.routes`. savings: the one that is among the observers."""

    async def replicas(asked: Asked) -> Answer:
        return _json({"replicas": fleet.describe()})

    async def drain(asked: Asked) -> Answer:
        fleet.drain(_url(asked))
        return _json({"replicas": fleet.describe()})

    async def restore(asked: Asked) -> Answer:
        await fleet.restore(_url(asked))
        return _json({"replicas": fleet.describe()})

    async def saved(asked: Asked) -> Answer:
        return _json({"savings": savings.report()})

    routes: dict[str, Handler] = {
        "GET /admin/replicas": replicas,
        "POST /admin/replicas/drain": drain,
        "POST /admin/replicas/restore": restore,
        "GET /admin/savings": saved,
    }
    return routes


def _url(asked: Asked) -> str:
    try:
        return msgspec.json.decode(asked.body, type=_Where).url
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f'give {{"url": "..."}}: {error}', param="url") from None


def _json(value: object) -> Answer:
    return Answer(msgspec.json.encode(value))
