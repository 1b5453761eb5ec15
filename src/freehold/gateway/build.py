"""Puts the parts together: the one place that knows which implementation stands for which Protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping

from freehold.gateway.admission import open_admission
from freehold.gateway.call import Request, Target
from freehold.gateway.canaries import Canaries
from freehold.gateway.canary_record import Record
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.keys import Keys
from freehold.gateway.metrics import GatewayMetrics
from freehold.gateway.parts import Parts, Replica
from freehold.gateway.router import Router
from freehold.gateway.store import Store, _row, open_store
from freehold.gateway.telemetry import exporting
from freehold.gateway.transactions import QUOTED
from freehold.gateway.upstream import read_key
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
    key = read_key(name, upstream)
    if not key or upstream.auth == "none":
        return {}
    return {"authorization": f"Bearer {key}"} if upstream.auth == "bearer" else {"x-api-key": key}


class _Ledger:
    """A canary's view of the SQLite store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def rows(self, experiment: str, after: int) -> list[tuple[int, Row]]:
        found = await self._store.fetch(
            f"SELECT rowid, {QUOTED} FROM calls WHERE experiment = $1 AND rowid > $2 ORDER BY rowid LIMIT 2000",
            (experiment, after),
        )
        return [(values[0], _row(values[1:])) for values in found]

    async def notes(self, experiment: str, after: int) -> list[tuple[int, Note]]:
        names = ", ".join(f"notes.{name}" for name in Note.__struct_fields__)
        found = await self._store.fetch(
            f"SELECT notes.rowid, {names} FROM notes WHERE row_id IN (SELECT row_id FROM calls WHERE experiment = $1) "
            "AND notes.rowid > $2 ORDER BY notes.rowid LIMIT 2000",
            (experiment, after),
        )
        return [(values[0], Note(**dict(zip(Note.__struct_fields__, values[1:], strict=True)))) for values in found]

    async def records(self, experiment: str) -> list[Record]:
        return [Record.decode(each.record["record"]) for each in await self._store.decisions(experiment)]

    async def add(self, record: Record) -> None:
        decision = {"record": record.encode().decode()}
        await self._store.put_experiment(record.experiment, {}, expected=record.number, decision=decision)

    async def leads(self, experiment: str) -> bool:
        return True


async def build_parts(settings: Settings) -> Parts:
    """The parts of a gateway with these settings, none of them started. Raises ConfigError."""
    store = open_store(settings, serving=True)
    await store.start()
    keys = Keys(settings)
    await keys.follow(store)
    experiments = Canaries(_Ledger(store), settings)
    router = _Router(settings, await store.secret("assign"), experiments, _auth)
    admission = await open_admission(store, settings, time.time())
    metrics = GatewayMetrics()
    spans = [exporting(settings.telemetry.endpoint)] if settings.telemetry.endpoint else []
    return Parts(
        keys=keys,
        router=router,
        admission=admission,
        store=_Started(store),
        observers=(metrics, router.learn, *spans),
        samplers=tuple(spans),
        routes={"GET /metrics": metrics.route, **experiments.routes()},
        configured=(keys, experiments, router, admission),
        background=(router.run, experiments.run),
    )
