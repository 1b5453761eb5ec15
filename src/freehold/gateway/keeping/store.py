"""The gateway's database: rows of calls that are never waited for, and everything else that outlives the process.

    store = open_store(settings)
    await store.start()
    store.append(row)             # hot path: into memory, on disk at most `flush_seconds` and one write later
    await store.record(...)       # everything else: waited for
    await store.stop()            # writes what is left

What is appended is written in batches, one transaction each. After kill -9 the database opens as it was at the last
batch: at most what was appended in the last 200 ms is gone, and budgets are those of the rows that are there, plus what
the calls that were running had reserved. `sqlite` is for one gateway (and commands beside it), `postgres`
for several that share keys, budgets and experiments; all that they share is here.
"""

from __future__ import annotations

import abc
import asyncio
import json
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec

from freehold.errors import ConfigError
from freehold.gateway.config import Settings
from freehold.gateway.keeping import transactions as to
from freehold.gateway.keeping.filters import Filter
from freehold.gateway.keeping.records import (
    DAY_SECONDS,
    Decided,
    Entry,
    KeyRecord,
    Released,
    Reservation,
    Text,
    Usage,
    day_of,
)
from freehold.gateway.keeping.schema import Dialect
from freehold.ledger import Note, Row

T = TypeVar("T")
Watcher: TypeAlias = Callable[[str], Awaitable[None]]
_log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.1
SECRET_BYTES = 32
WATCH_SECONDS = 1.0  # so late at most another process sees a new or a revoked key
STUCK_SECONDS = 5.0  # a batch that takes longer is trouble
PAGE = 2000  # rows read at once
SMALL_PAGE = 200  # while calls wait for the event loop
PRUNED_AT_ONCE = 500
PRUNE_EVERY_SECONDS = 3600.0
KEYS = "SELECT record, revoked_at FROM keys ORDER BY key_id"
_WATCHED = "SELECT name, number FROM counters WHERE name = 'keys'"
_GATHERING = 0.25  # of the promised time rows gather; the rest is for the write before theirs, and their own
_BOOLEANS = tuple(to.COLUMNS.index(name) for name in ("streamed", "warm_up"))


class Store(abc.ABC):
    """The database. Its methods run on one event loop; only `append`, `note`, `keep`, `reserve` and `release` are hot.

    flush_seconds: how long rows gather before they are written. retention_days: older rows are deleted; None: never.
    """

    dialect: Dialect

    def __init__(self, flush_seconds: float = FLUSH_SECONDS, retention_days: int | None = None) -> None:
        self.flush_seconds = flush_seconds
        self.writer = secrets.token_hex(8)
        self._retention_days = retention_days
        self.lost = 0  # items that the database refuses for what they are; the log names them
        self._appended: deque[to.AppendedItem] = deque()
        self._batch_number = 0
        self._failure = ""
        self._writing_since: float | None = None
        self._counters: dict[str, int] = {}
        self._watchers: list[Watcher] = []
        self._chores: set[asyncio.Task[None]] = set()

    # What a database has to do.

    @abc.abstractmethod
    async def start(self) -> None:
        """Connect, bring the schema up to date, begin to write; if it has not begun yet. Raises ConfigError."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Write what is left and disconnect."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """Return when all that was appended before is on disk."""

    @abc.abstractmethod
    async def run(self, transaction: to.Transaction[T]) -> T:
        """Run a transaction, after all that was appended before. Raises what it raises; then nothing was changed."""

    @abc.abstractmethod
    async def fetch(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Read, outside of any transaction. Sees what is on disk: `flush` before, if the last rows matter."""

    @abc.abstractmethod
    async def secret(self, name: str) -> bytes:
        """32 random bytes that belong to this database and all who share it; made when first asked for."""

    @abc.abstractmethod
    async def forget_secret(self, name: str) -> None:
        """Destroy a secret. What was hashed with it can be linked to nobody any more."""

    # The hot path.

    def append(self, row: Row) -> None:
        """Take a row. Never blocks; never fails: if the database cannot be written, `trouble` says so."""
        self._gather(row)

    def note(self, note: Note) -> None:
        """Take a late fact about a row."""
        self._gather(note)

    def keep(self, text: Text) -> None:
        """Take a call's text, redacted already."""
        self._gather(text)

    def reserve(self, reservation: Reservation) -> None:
        """Write down what a running call may cost, for whoever opens the database after a crash."""
        self._gather(reservation)

    def release(self, reservation_id: str) -> None:
        """The call ended, and its rows were appended before."""
        self._gather(Released(reservation_id))

    def _gather(self, item: to.AppendedItem) -> None:
        self._appended.append(item)

    @property
    def trouble(self) -> str:
        """Why rows do not reach the disk now, or ''. A gateway that cannot write down what is spent admits nothing."""
        if self._failure:
            return self._failure
        since = self._writing_since
        if since is not None and time.monotonic() - since > STUCK_SECONDS:
            return f"the database has been writing for {time.monotonic() - since:.0f} s"
        return ""

    @property
    def unwritten(self) -> int:
        """How many appended facts wait in memory."""
        return len(self._appended)

    def _take(self) -> to.Batch | None:
        """What was appended so far; None if nothing was. The event loop, and only it, may append meanwhile: that is the
        next batch."""
        count = len(self._appended)
        if not count:
            return None
        self._batch_number += 1
        return to.Batch([self._appended.popleft() for _ in range(count)], self.writer, self._batch_number)

    def _one_by_one(self, batch: to.Batch, fault: Exception) -> list[to.Batch]:
        """A batch that the database refuses for what is in it, as batches of one item: one must not block the others.

        Of one item: scrubbed of what a database may refuse; and if that was tried, none. The item is lost, and logged.
        Their numbers are higher than all others': they are to be written last, or they would pass for written.
        """
        if len(batch.items) > 1:
            rest = batch.items
        else:
            rest = [item for item in map(to.scrubbed, batch.items) if item != batch.items[0]]
            if not rest:
                self.lost += 1
                _log.error("the ledger refuses an item, which is lost: %s: %s", type(batch.items[0]).__name__, fault)
        batches = []
        for item in rest:
            self._batch_number += 1
            batches.append(to.Batch([item], self.writer, self._batch_number))
        return batches

    # Keys.

    async def keys(self) -> list[KeyRecord]:
        """All keys made by command, revoked ones too, oldest first."""
        return key_records(await self.fetch(KEYS))

    def keys_now(self) -> list[KeyRecord]:
        """The same at once, for the middle of a request: in microseconds, without waiting for anything. None where that
        cannot be: then watchers hear of them within `WATCH_SECONDS`."""
        return []

    async def add_key(self, record: KeyRecord, actor: str) -> None:
        """Raises InvalidRequest if the name was ever used."""
        await self.run(to.add_key(record, time.time(), actor))

    async def revoke_key(self, key_id: str, actor: str) -> None:
        """Raises NotFound if there is no such key. Running gateways know it within `WATCH_SECONDS`."""
        await self.run(to.revoke_key(key_id, time.time(), actor))

    # The audit log.

    async def record(self, kind: str, subject: str, detail: Mapping[str, Any], actor: str) -> Entry:
        """Add a line to the audit log. kind: "config", "key.new", "decision" ...; detail: plain JSON data."""
        return await self.run(to.add_entry(time.time(), actor, kind, subject, detail))

    async def audit(self, last: int | None = None) -> list[Entry]:
        """The audit log in order; only the last ones, if `last` is given."""
        names = ", ".join(Entry.__struct_fields__)
        sql, values = f"SELECT {names} FROM audit ORDER BY seq DESC", ()
        rows = await self.fetch(*((sql, values) if last is None else (f"{sql} LIMIT $1", (last,))))
        fields = Entry.__struct_fields__
        return [Entry(**{**dict(zip(fields, row, strict=True)), "detail": json.loads(row[5])}) for row in rows[::-1]]

    # Experiments.

    async def decisions(self, experiment: str, after: int = -1) -> list[Decided]:
        """The records of an experiment whose number is above `after`, by number."""
        rows = await self.fetch(
            "SELECT experiment, number, at, record FROM decisions WHERE experiment = $1 AND number > $2 "
            "ORDER BY number",
            (experiment, after),
        )
        return [Decided(name, number, at, json.loads(record)) for name, number, at, record in rows]

    async def add_decision(
        self, experiment: str, number: int, record: Mapping[str, Any], *, at: float, actor: str, audited: bool
    ) -> None:
        """Write down what happened to an experiment; audited: in the audit log too, in one transaction.

        record: plain JSON data. Raises Conflict if there is one of that number: another gateway was first.
        """
        await self.run(to.add_decision(experiment, number, record, at, actor, audited))

    async def experiment_rows(self, experiment: str, after: int) -> list[tuple[int, Row]]:
        """An experiment's next rows with a position above `after`, in the order in which they were committed."""
        rows = await self.fetch(
            f"SELECT position, {to.QUOTED} FROM calls WHERE experiment = $1 AND experiment <> '' AND position > $2 "
            f"ORDER BY position LIMIT {SMALL_PAGE}",
            (experiment, after),
        )
        return [(values[0], _row(values[1:])) for values in rows]

    async def experiment_notes(self, experiment: str, after: int) -> list[tuple[int, Note]]:
        """The next notes on an experiment's rows, in the same way. Whoever reads rows after it sees their rows."""
        names = ", ".join(f"notes.{name}" for name in ("position", *Note.__struct_fields__))
        rows = await self.fetch(
            f"SELECT {names} FROM notes JOIN calls ON calls.row_id = notes.row_id "
            f"WHERE calls.experiment = $1 AND notes.position > $2 ORDER BY notes.position LIMIT {PAGE}",
            (experiment, after),
        )
        return [(position, Note(**dict(zip(Note.__struct_fields__, row, strict=True)))) for position, *row in rows]

    async def conversations(self, experiment: str, since: float) -> list[tuple[str, str, float, float]]:
        """Arm, conversation, its first and its last call: of an experiment's rows since a time, by last call."""
        rows = await self.fetch(
            "SELECT arm, conversation, min(at), max(at) FROM calls "
            "WHERE experiment = $1 AND experiment <> '' AND at >= $2 "
            "AND conversation <> '' GROUP BY arm, conversation ORDER BY max(at)",
            (experiment, since),
        )
        return [(arm, conversation, first, last) for arm, conversation, first, last in rows]

    @abc.abstractmethod
    async def leads(self, name: str) -> bool:
        """Whether this gateway decides about something now and for the next seconds, and no other."""

    # The ledger.

    async def rows(self, which: Filter | None = None) -> AsyncIterator[Row]:
        """The rows, by time of arrival. Pages are read one by one: any number of rows takes little memory."""
        condition, values = (which or Filter()).sql()
        after: tuple[float, str] = (float("-inf"), "")
        while True:
            n = len(values)
            page = await self.fetch(
                f"SELECT {to.QUOTED} FROM calls WHERE {condition} AND (at, row_id) > (${n + 1}, ${n + 2}) "
                f"ORDER BY at, row_id LIMIT {PAGE}",
                (*values, *after),
            )
            for values_of_row in page:
                yield _row(values_of_row)
            if len(page) < PAGE:
                return
            after = (page[-1][to.COLUMNS.index("at")], page[-1][0])

    async def notes(self, which: Filter | None = None) -> list[Note]:
        """The notes on the rows that are asked for, oldest first."""
        condition, values = (which or Filter()).sql()
        names = ", ".join(f"notes.{name}" for name in Note.__struct_fields__)
        rows = await self.fetch(
            f"SELECT {names} FROM notes WHERE row_id IN (SELECT row_id FROM calls WHERE {condition}) "
            "ORDER BY notes.at, notes.row_id, notes.name",
            values,
        )
        return [Note(**dict(zip(Note.__struct_fields__, row, strict=True))) for row in rows]

    async def forget_user(self, user: str, actor: str) -> int:
        """Blank the pseudonyms of the person whose keyed hash is `user`. Returns how many rows had it."""
        count = await self.run(to.forget_user(user))
        if count:
            await self.record("forget.user", "", {"rows": count}, actor)
        return count

    async def prune(self, before: float) -> int:
        """Delete the rows from before a time, a few at a time, so that nobody waits long. Returns how many."""
        deleted = 0
        while count := await self.run(to.prune(before, PRUNED_AT_ONCE)):
            deleted += count
        return deleted

    # Budgets.

    async def usage(self, day: int) -> list[Usage]:
        """What every budget has spent and reserved on a UTC day, as far as it is on disk."""
        spent = dict(await self.fetch("SELECT scope, spent FROM spend WHERE day = $1", (day,)))
        rows = await self.fetch("SELECT scope, sum(amount) FROM reservations WHERE day = $1 GROUP BY scope", (day,))
        reserved = {scope: int(amount) for scope, amount in rows}
        return [Usage(scope, spent.get(scope, 0), reserved.get(scope, 0)) for scope in sorted({*spent, *reserved})]

    async def release_stranded(self, older_than: float, actor: str) -> int:
        """Give back what gateways that have written nothing since `older_than` (epoch) left reserved."""
        silent = await self.fetch(
            "SELECT DISTINCT writer FROM reservations WHERE writer NOT IN (SELECT writer FROM writers WHERE at >= $1) "
            "AND at < $1",
            (older_than,),
        )
        count = await self.run(to.release_stranded([writer for (writer,) in silent if writer != self.writer]))
        await self.record("budget.release", "", {"reservations": count}, actor)
        return count

    # Being told of others' changes.

    def watch(self, changed: Watcher) -> None:
        """Have `changed` awaited with "keys" soon after they changed, by this process or another."""
        self._watchers.append(changed)

    async def _begin_chores(self) -> None:
        self._counters = dict(await self.fetch(_WATCHED))
        for chore in (self._look_for_changes, self._clear_out):
            task = asyncio.create_task(_again_and_again(chore))
            self._chores.add(task)

    async def _end_chores(self) -> None:
        for task in self._chores:
            task.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        self._chores.clear()

    async def _look_for_changes(self) -> float:
        now = dict(await self.fetch(_WATCHED))
        for name, number in now.items():
            if self._counters.get(name) != number:
                for changed in self._watchers:
                    await changed(name)
        self._counters = now  # only now: what could not be told is told again
        return WATCH_SECONDS

    async def _clear_out(self) -> float:
        await self.run(to.drop_old_reservations(day_of(time.time())))
        await self.run(to.drop_old_pins(time.time() - DAY_SECONDS))
        if self._retention_days is not None:
            await self.prune(time.time() - self._retention_days * DAY_SECONDS)
        return PRUNE_EVERY_SECONDS


def key_records(found: Sequence[tuple[Any, ...]]) -> list[KeyRecord]:
    """Of the rows of `KEYS`, the oldest first."""
    records = [
        msgspec.structs.replace(msgspec.json.decode(text, type=KeyRecord), revoked_at=revoked)
        for text, revoked in found
    ]
    return sorted(records, key=lambda record: record.created_at)


async def _again_and_again(chore: Callable[[], Awaitable[float]]) -> None:
    """Do a chore again after the seconds it gives back; one that fails is logged and tried again."""
    while True:
        try:
            seconds = await chore()
        except Exception as error:
            _log.warning("the ledger: %s", error)
            seconds = STUCK_SECONDS
        await asyncio.sleep(seconds)


def _row(values: Sequence[Any]) -> Row:
    named = dict(zip(to.COLUMNS, values, strict=True))
    for place in _BOOLEANS:  # SQLite has integers for them
        named[to.COLUMNS[place]] = bool(values[place])
    return Row(**named)


def open_store(settings: Settings, *, serving: bool = False) -> Store:
    """The store that the settings ask for, not started yet. serving: for the gateway itself, not a command beside it.

    Raises ConfigError if the PostgreSQL address is not there; its driver is imported at `start`.
    """
    options = settings.store
    flush_seconds = _GATHERING * options.flush_ms / 1000
    retention = options.retention_days if serving else None
    if options.kind == "sqlite":
        from freehold.gateway.keeping.sqlite import SqliteStore

        return SqliteStore(settings.gateway.data_dir, flush_seconds, retention, serving=serving)
    from freehold.gateway.keeping.postgres import PostgresStore

    dsn = os.environ.get(options.dsn_env, "") if options.dsn_env else ""
    if not dsn:
        raise ConfigError(
            f"store.dsn_env: the environment variable {options.dsn_env!r} with the PostgreSQL address is not set"
            if options.dsn_env
            else "store.dsn_env: name the environment variable that has the PostgreSQL address"
        )
    return PostgresStore(dsn, flush_seconds, retention, serving=serving)
