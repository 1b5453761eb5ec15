"""Puts the parts together: the one place that knows which implementation stands for which Protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping

from freehold.gateway.admission import open_admission
from freehold.gateway.call import Request, Target
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.keys import Keys
from freehold.gateway.metrics import GatewayMetrics
from freehold.gateway.parts import Parts, Replica
from freehold.gateway.route import FirstSteps
from freehold.gateway.router import Router
from freehold.gateway.store import open_store
from freehold.gateway.upstream import _headers, read_key
from freehold.ledger import Note, Row


class _Router(Router):
    def choose(self, target: Target, request: Request, avoid: frozenset[str] = frozenset()) -> Replica:  # type: ignore[override]
        return super().choose(target, request)


class _Started:
    def __init__(self, store: object) -> None:
        self.store = store

    def append(self, row: Row) -> None:
        self.store.append(row)

    def note(self, note: Note) -> None:
        self.store.note(note)

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        await self.store.stop()


def _auth(name: str, upstream: Upstream) -> Mapping[str, str]:
    return _headers(upstream, read_key(name, upstream))


async def build_parts(settings: Settings) -> Parts:
    """The parts of a gateway with these settings, none of them started. Raises ConfigError."""
    store = open_store(settings, serving=True)
    await store.start()
    keys = Keys(settings)
    await keys.follow(store)
    experiments = FirstSteps(settings)
    router = _Router(settings, await store.secret("assign"), experiments, _auth)
    admission = await open_admission(store, settings, time.time())
    metrics = GatewayMetrics()
    return Parts(
        keys=keys,
        router=router,
        admission=admission,
        store=_Started(store),
        observers=(metrics, router.learn),
        routes={"GET /metrics": metrics.route},
        configured=(keys, router, admission),
        background=(router.run,),
    )
