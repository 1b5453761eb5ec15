"""The store on PostgreSQL, for several gateways that share keys, budgets and experiments.

Each gateway writes its own batches, in order, one transaction at a time. A batch whose commit was in doubt (the
connection broke) is sent again and recognised by its number. Needs the extra `postgres`.
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from freehold.errors import ConfigError, Unavailable
from freehold.gateway import schema
from freehold.gateway import transactions as to
from freehold.gateway.records import Reservation
from freehold.gateway.store import FLUSH_SECONDS, STUCK_SECONDS, Store

T = TypeVar("T")

LOCKS = 0x66726565  # the class of our advisory locks, so that another program's do not meet them
CONNECTIONS = 8
COMMAND_SECONDS = 30.0
RETRY_SECONDS = 0.5


class PostgresStore(Store):
    """The database at an address such as postgresql://user:password@host/name. serving: for a gateway."""

    dialect = "postgres"

    def __init__(
        self,
        dsn: str,
        flush_seconds: float = FLUSH_SECONDS,
        retention_days: int | None = None,
        *,
        serving: bool = False,
    ) -> None:
        super().__init__(flush_seconds, retention_days)
        self._dsn = dsn
        self._serving = serving
        self._pool: Any = None
        self._pg: Any = None
        self._writing = asyncio.Lock()
        self._batches: list[to.Batch] = []
        self._writer_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `Store.start`. Raises MissingExtra's cause if asyncpg is not installed."""
        self._pg = importlib.import_module("asyncpg")  # an extra: not there for most
        try:
            self._pool = await self._pg.create_pool(
                self._dsn,
                min_size=1,
                max_size=CONNECTIONS,
                timeout=STUCK_SECONDS,
                command_timeout=COMMAND_SECONDS,
                server_settings={"application_name": "freehold gateway"},
            )
            await self._transact(_migrate(schema.MIGRATIONS))
        except (OSError, ValueError, self._pg.PostgresError, self._pg.InterfaceError) as error:
            # The address has a password: it is not in the message.
            raise ConfigError(f"store: PostgreSQL: {error or type(error).__name__}") from None
        self._writer_task = asyncio.create_task(self._write())
        if self._serving:
            await self._begin_chores()

    async def stop(self) -> None:
        await self._end_chores()
        if self._writer_task is not None:
            self._writer_task.cancel()
            await asyncio.gather(self._writer_task, return_exceptions=True)
            self._writer_task = None
        if self._pool is not None:
            try:
                await self.flush()
            finally:
                await self._pool.close()
                self._pool = None

    async def flush(self) -> None:
        async with self._writing:
            if not await self._write_all():
                raise Unavailable(self._failure, retry_after=RETRY_SECONDS)

    async def run(self, transaction: to.Transaction[T]) -> T:
        await self.flush()
        with self._unavailable():
            return await self._transact(transaction)

    async def fetch(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._unavailable():
            return [tuple(row) for row in await self._pool.fetch(sql, *values)]

    async def secret(self, name: str) -> bytes:
        await self._pool.execute(
            "INSERT INTO secrets (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING", name, secrets.token_hex(32)
        )
        return bytes.fromhex(await self._pool.fetchval("SELECT value FROM secrets WHERE name = $1", name))

    async def forget_secret(self, name: str) -> None:
        await self._pool.execute("DELETE FROM secrets WHERE name = $1", name)

    async def reserve_shared(self, reservation: Reservation, limits: Sequence[int | None]) -> tuple[int, int, int] | None:
        """Reserve from all of the reservation's budgets, or from none. limits: of its scopes, micro-dollars.

        Returns None if it was reserved; else which budget stood in the way, what it has spent, and what it has reserved.
        Raises Unavailable if the database cannot be asked.
        """
        with self._unavailable():
            refused = await self._pool.fetchval(
                "SELECT freehold_reserve($1, $2, $3, $4, $5, $6, $7)",
                reservation.id,
                self.writer,
                reservation.at,
                reservation.day,
                list(reservation.scopes),
                list(limits),
                reservation.amount,
            )
        return None if refused is None else (refused[0] - 1, refused[1], refused[2])
