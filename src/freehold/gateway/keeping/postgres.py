"""The store on PostgreSQL, for several gateways that share keys, budgets and experiments.

Each gateway writes its own batches, in order, one transaction at a time. A batch whose commit was in doubt (the
connection broke) is sent again and recognised by its number. Needs the extra `postgres`.
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from freehold.errors import ConfigError, Unavailable
from freehold.gateway.keeping import schema
from freehold.gateway.keeping import transactions as to
from freehold.gateway.keeping.records import Reservation
from freehold.gateway.keeping.store import FLUSH_SECONDS, SECRET_BYTES, STUCK_SECONDS, Store

T = TypeVar("T")

LOCKS = 0x66726565  # the class of our advisory locks, so that another program's do not meet them
CONNECTIONS = 8
LEASE_SECONDS = 20.0
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
        self._leads_until: dict[str, float] = {}
        self._batches: list[to.Batch] = []
        self._writer_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `Store.start`. Raises MissingExtra's cause if asyncpg is not installed."""
        if self._pool is not None:
            return
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
            await self._transact(migrate(schema.MIGRATIONS))
        except (OSError, ValueError, self._pg.PostgresError, self._pg.InterfaceError) as error:
            if self._pool is not None:
                await self._pool.close()
                self._pool = None
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
                if self._serving:  # the others need not wait until they take this one for dead
                    await self._pool.execute("DELETE FROM leases WHERE holder = $1", self.writer)
                    await self._pool.execute("DELETE FROM followers WHERE writer = $1", self.writer)
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

    async def statement(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement as a transaction of its own, which does not wait for what was appended before."""
        return await self.fetch(sql, values)

    async def leads(self, name: str) -> bool:
        """Holds the lease, or takes it when its holder has not asked for `LEASE_SECONDS`: asked about once a second."""
        now = time.monotonic()
        if now < self._leads_until.get(name, 0.0):
            return True
        with self._unavailable():
            held = await self._transact(to.lead(name, self.writer, LEASE_SECONDS))
        # Asked anew well before it ends: a slow turn must not outlive it.
        self._leads_until[name] = now + LEASE_SECONDS / 4 if held else 0.0
        return held

    async def secret(self, name: str) -> bytes:
        await self._pool.execute(
            "INSERT INTO secrets (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            name,
            secrets.token_hex(SECRET_BYTES),
        )
        return bytes.fromhex(await self._pool.fetchval("SELECT value FROM secrets WHERE name = $1", name))

    async def forget_secret(self, name: str) -> None:
        await self._pool.execute("DELETE FROM secrets WHERE name = $1", name)

    async def reserve_shared(
        self, reservation: Reservation, limits: Sequence[int | None]
    ) -> tuple[int, int, int] | None:
        """Reserve from all of the reservation's budgets, or from none. limits: of its scopes, micro-dollars.

        Returns None if it was reserved; else which budget stood in the way, what it has spent and what it has reserved.
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

    @contextmanager
    def _unavailable(self) -> Iterator[None]:
        """What the network or the server does wrong, as Unavailable."""
        try:
            yield
        except (
            OSError,
            TimeoutError,
            self._pg.InterfaceError,
            self._pg.PostgresConnectionError,
            self._pg.OperatorInterventionError,  # it is being shut down, or started
            self._pg.InsufficientResourcesError,  # no connections, no disk
            self._pg.ReadOnlySQLTransactionError,  # a standby
        ) as error:
            raise Unavailable(
                f"PostgreSQL does not answer: {error or type(error).__name__}", retry_after=RETRY_SECONDS
            ) from error

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS if self._failure else self.flush_seconds)
            async with self._writing:
                await self._write_all()

    async def _write_all(self) -> bool:
        """Write what waits, in order; False if the database cannot be written now. With the lock `_writing`."""
        if (taken := self._take()) is not None:
            self._batches.append(taken)
        self._writing_since = time.monotonic()
        try:
            while self._batches:
                try:
                    await self._transact(to.write_batch(self._batches[0], time.time()))
                except (self._pg.DataError, self._pg.IntegrityConstraintViolationError) as error:
                    self._batches += self._one_by_one(self._batches[0], error)
                del self._batches[0]
        except (OSError, TimeoutError, self._pg.PostgresError, self._pg.InterfaceError) as error:
            self._failure = f"the ledger cannot be written: PostgreSQL: {error or type(error).__name__}"
            return False
        finally:
            self._writing_since = None
        self._failure = ""
        return True

    async def _transact(self, transaction: to.Transaction[T]) -> T:
        """Run a transaction to its end, and commit; roll back and raise if it, or a statement of it, raises."""
        async with self._pool.acquire() as connection, connection.transaction():
            try:
                answer: list[tuple[Any, ...]] | None = None
                while True:
                    try:
                        # A generator is started by sending None.
                        statement = next(transaction) if answer is None else transaction.send(answer)
                    except StopIteration as end:
                        return end.value  # type: ignore[no-any-return]
                    answer = await _execute(connection, statement)
            finally:
                transaction.close()


async def _execute(connection: Any, statement: to.Statement) -> list[tuple[Any, ...]]:
    if isinstance(statement, to.Do):
        return [tuple(row) for row in await connection.fetch(statement.sql, *statement.values)]
    if isinstance(statement, to.Many):
        await connection.executemany(statement.sql, statement.rows)
    else:
        await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", LOCKS, statement.number)
    return []


def migrate(migrations: Sequence[schema.Migration]) -> to.Transaction[None]:
    yield to.Lock(to.MIGRATING)
    yield to.Do("CREATE TABLE IF NOT EXISTS schema_version (version bigint NOT NULL)")
    found = yield to.Do("SELECT version FROM schema_version")
    version = found[0][0] if found else 0
    for migration in schema.missing(version, migrations):
        for statement in migration.statements("postgres"):
            yield to.Do(statement)
    yield to.Do("DELETE FROM schema_version")
    yield to.Do("INSERT INTO schema_version (version) VALUES ($1)", (len(migrations),))
