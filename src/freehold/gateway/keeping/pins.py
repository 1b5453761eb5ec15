"""What gateways on one PostgreSQL tell one another while an experiment's share rises: see `routing.crossing`.

Each statement is a transaction of its own, by the database's clock, and never waits for the ledger's rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from freehold.gateway.keeping.postgres import PostgresStore
from freehold.gateway.routing.agreement import Change, Conversation, Mark, change_of
from freehold.gateway.routing.crossing import LIVE_SECONDS

_NOW = "extract(epoch FROM clock_timestamp())"
_AT_ONCE = 5000
_JOIN = f"""
INSERT INTO followers (experiment, writer, number, level, until)
SELECT $1, $2, coalesce(min(number), $3), 1, {_NOW} + $4
FROM followers WHERE experiment = $1 AND writer <> $2 AND until > {_NOW}
ON CONFLICT (experiment, writer)
DO UPDATE SET number = excluded.number, level = excluded.level, until = excluded.until
RETURNING number"""
_BEAT = f"""
UPDATE followers SET number = $3, level = $4, until = {_NOW} + $5
WHERE experiment = $1 AND writer = $2 AND until > {_NOW} RETURNING number"""
_OTHERS = f"SELECT number, level FROM followers WHERE experiment = $1 AND writer <> $2 AND until > {_NOW}"
_SHARE = """
INSERT INTO pins (experiment, conversation, on_canary, at)
SELECT $1, conversation, false, at FROM unnest($2::text[], $3::double precision[]) AS given (conversation, at)
ON CONFLICT (experiment, conversation) DO UPDATE SET at = greatest(pins.at, excluded.at)"""
_CLAIM = f"""
INSERT INTO pins (experiment, conversation, on_canary, at) SELECT $1::text, $2::text, $3::boolean, {_NOW}
WHERE EXISTS (SELECT FROM followers WHERE experiment = $1 AND writer = $4 AND until > {_NOW})
ON CONFLICT (experiment, conversation) DO UPDATE SET at = greatest(pins.at, excluded.at) RETURNING on_canary"""


class SharedPins:
    """An `agreement.Shared`."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store

    async def join(self, experiment: str, number: int) -> int:
        rows = await self._store.statement(_JOIN, (experiment, self._store.writer, number, LIVE_SECONDS))
        return int(rows[0][0])

    async def beat(self, experiment: str, mark: Mark) -> list[Mark] | None:
        own = await self._store.statement(_BEAT, (experiment, self._store.writer, *mark, LIVE_SECONDS))
        if not own:
            return None
        rows = await self._store.statement(_OTHERS, (experiment, self._store.writer))
        return [Mark(number, level) for number, level in rows]

    async def share(self, experiment: str, pinned: Mapping[str, float]) -> None:
        names = list(pinned)
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            await self._store.statement(_SHARE, (experiment, part, [pinned[name] for name in part]))

    async def shared(self, experiment: str, since: float) -> list[Conversation]:
        rows = await self._store.statement(
            "SELECT conversation, on_canary, at FROM pins WHERE experiment = $1 AND at >= $2 ORDER BY at",
            (experiment, since),
        )
        return [Conversation(*row) for row in rows]

    async def claim(self, experiment: str, conversation: str, on_canary: bool) -> bool | None:
        rows = await self._store.statement(_CLAIM, (experiment, conversation, on_canary, self._store.writer))
        return bool(rows[0][0]) if rows else None

    async def in_ledger(self, experiment: str, since: float) -> list[tuple[str, str, float, float]]:
        return await self._store.conversations(experiment, since)

    async def changes(self, experiment: str, after: int) -> list[Change]:
        return [change_of(each) for each in await self._store.decisions(experiment, after)]
