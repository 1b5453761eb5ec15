"""The store on SQLite: one file, one writing thread, nothing to set up. For one gateway on one machine.

The database is in WAL mode: commands such as `freehold ledger` read, and make keys, while the gateway writes. Each
batch is one transaction, synced to disk. The folder has mode 0700 and its files 0600.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from freehold.errors import ConfigError, Unavailable
from freehold.gateway.keeping import schema
from freehold.gateway.keeping import transactions as to
from freehold.gateway.keeping.records import KeyRecord
from freehold.gateway.keeping.store import FLUSH_SECONDS, KEYS, SECRET_BYTES, Store, key_records

T = TypeVar("T")

FILE = "ledger.sqlite3"
BUSY_SECONDS = 5.0
RETRY_SECONDS = 0.5
READERS = 4  # connections that are kept for reading
# What SQLite and its driver say of values that they do not take. (A damaged file is a plain DatabaseError.)
REFUSED = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)


class SqliteStore(Store):
    """The database in a folder. serving: for the gateway; a second one on the same folder is refused."""

    dialect = "sqlite"

    def __init__(
        self,
        folder: Path,
        flush_seconds: float = FLUSH_SECONDS,
        retention_days: int | None = None,
        *,
        serving: bool = False,
    ) -> None:
        super().__init__(flush_seconds, retention_days)
        self.folder = folder
        self.path = folder / FILE
        self._serving = serving
        self._jobs: queue.SimpleQueue[Callable[[sqlite3.Connection], None]] = queue.SimpleQueue()
        self._wake = threading.Event()  # a job, or the end
        self._arrived = threading.Event()  # that, or something was appended to nothing
        self._ending = False
        self._thread: threading.Thread | None = None
        self._lock: int | None = None
        self._looking: sqlite3.Connection | None = None
        self._readers: deque[sqlite3.Connection] = deque()  # that nobody uses now

    async def start(self) -> None:
        """See `Store.start`. Raises ConfigError if another gateway has the folder, or the file is no such database."""
        if self._thread is not None:
            return
        try:
            connection = await asyncio.to_thread(self._open)
        except (OSError, sqlite3.Error, ValueError) as error:
            self._unlock()
            raise ConfigError(f"{self.path}: {error}") from None
        self._ending = False  # it may have been stopped before
        self._thread = threading.Thread(target=self._write, args=(connection,), name="freehold-ledger", daemon=True)
        self._thread.start()
        if self._serving:
            await self._begin_chores()

    async def stop(self) -> None:
        await self._end_chores()
        if self._looking is not None:
            self._looking.close()
            self._looking = None
        if self._thread is not None:
            self._ending = True
            self._wake_writer()
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        while self._readers:
            self._readers.pop().close()
        self._unlock()
        if self._failure:
            raise Unavailable(f"{self._failure}; the last calls are not in it")

    async def flush(self) -> None:
        await self._on_writer(lambda connection: None)

    async def run(self, transaction: to.Transaction[T]) -> T:
        return await self._on_writer(lambda connection: run(connection, transaction))

    async def fetch(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return await asyncio.to_thread(self._read, sql, values)

    def keys_now(self) -> list[KeyRecord]:
        """See `Store.keys_now`. A reader of a database in WAL mode waits for no writer; this one waits for nobody."""
        if self._thread is None:
            return []
        try:
            if self._looking is None:
                self._looking = self._reader(0.0)
            return key_records(self._looking.execute(KEYS).fetchall())
        except sqlite3.Error:  # the next request looks again, and so does the watch
            return []

    async def leads(self, name: str) -> bool:
        return True  # there is no other gateway on this folder

    async def secret(self, name: str) -> bytes:
        return await asyncio.to_thread(self._secret, name)

    async def forget_secret(self, name: str) -> None:
        path = self._secret_path(name)
        # The disk may keep what a file held: overwrite it where it stands before it goes.
        if path.exists():
            with path.open("r+b") as file:
                file.write(secrets.token_bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()

    def _secret_path(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def _secret(self, name: str) -> bytes:
        path = self._secret_path(name)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            value = path.read_bytes()
            if len(value) != SECRET_BYTES:
                raise ConfigError(f"{path}: {len(value)} bytes, not {SECRET_BYTES}; it is damaged") from None
            return value
        with os.fdopen(handle, "wb") as file:
            value = secrets.token_bytes(SECRET_BYTES)
            file.write(value)
            file.flush()
            os.fsync(file.fileno())
        return value

    def _open(self) -> sqlite3.Connection:
        if sqlite3.sqlite_version_info < (3, 35):
            raise ValueError(f"needs SQLite 3.35 or newer, and Python has {sqlite3.sqlite_version}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._serving:
            self._lock = os.open(self.folder / "gateway.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError("another gateway runs on this folder; give it another gateway.data_dir") from None
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        os.chmod(self.path, 0o600)  # SQLite makes its other files with the same mode
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            run(connection, migrate(schema.MIGRATIONS))
        except BaseException:
            connection.close()
            raise
        return connection

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """On a connection that is kept: to open one, SQLite reads the whole schema."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self._reader(BUSY_SECONDS)
        try:
            found = connection.execute(_numbered(sql), values).fetchall()
        except BaseException:
            connection.close()
            raise
        if self._ending or len(self._readers) >= READERS:
            connection.close()
        else:
            self._readers.append(connection)
        return found

    def _reader(self, timeout: float) -> sqlite3.Connection:
        address = f"{self.path.absolute().as_uri()}?mode=ro"
        return sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)

    async def _on_writer(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Do a job on the writer's thread, at once, but after what was appended before. Raises Unavailable if that
        cannot be written."""
        if self._thread is None:
            raise RuntimeError("the store is not started")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def answer(give: Callable[[], None]) -> None:
            if not future.done():  # nobody waits for one that was cancelled
                give()

        def work(connection: sqlite3.Connection) -> None:
            try:
                if self._failure:
                    raise Unavailable(self._failure, retry_after=RETRY_SECONDS)
                give = partial(future.set_result, job(connection))
            except Exception as error:
                give = partial(future.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(answer, give)

        self._jobs.put(work)
        self._wake_writer()
        return await future

    def _gather(self, item: to.AppendedItem) -> None:
        super()._gather(item)
        if len(self._appended) == 1:  # the writer may wait for it; of later ones it knows, as only one thread appends
            self._arrived.set()

    def _wake_writer(self) -> None:
        self._wake.set()
        self._arrived.set()

    # On the writer's thread.

    def _write(self, connection: sqlite3.Connection) -> None:
        """Batches as they gather, and jobs as they come; until `stop`, and then what is left."""
        batches: list[to.Batch] = []
        last_try = math.inf
        while True:
            if not (batches or self._appended):
                self._arrived.wait()
            self._arrived.clear()
            self._wake.wait(RETRY_SECONDS if batches else self.flush_seconds)
            self._wake.clear()
            if self._ending and last_try == math.inf:
                last_try = time.monotonic() + BUSY_SECONDS
            jobs = [self._jobs.get() for _ in range(self._jobs.qsize())]  # before taking: what came before them
            batches = self._write_all(connection, batches)
            if not batches and (taken := self._take()) is not None:
                batches = self._write_all(connection, [taken])
            for job in jobs:
                job(connection)
            if last_try < math.inf and (not (batches or self._appended) or time.monotonic() > last_try):
                break
        connection.close()

    def _write_all(self, connection: sqlite3.Connection, batches: list[to.Batch]) -> list[to.Batch]:
        """Write batches in their order; give back those to try again later, because the database cannot be written."""
        waiting = deque(batches)
        while waiting:
            batch = waiting.popleft()
            self._writing_since = time.monotonic()
            try:
                run(connection, to.write_batch(batch, time.time()))
            except (*REFUSED, ValueError, OverflowError) as error:
                waiting.extend(self._one_by_one(batch, error))
            except sqlite3.Error as error:  # locked, disk full, file damaged: not for what is in it
                self._failure = f"the ledger {self.path} cannot be written: {error}"
                return [batch, *waiting]
            finally:
                self._writing_since = None
        self._failure = ""
        return []


def run(connection: sqlite3.Connection, transaction: to.Transaction[T]) -> T:
    """Run a transaction to its end, and commit; roll back and raise if it, or a statement of it, raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        answer: list[tuple[Any, ...]] | None = None
        while True:
            try:
                # A generator is started by sending None.
                statement = next(transaction) if answer is None else transaction.send(answer)
            except StopIteration as end:
                connection.execute("COMMIT")
                return end.value  # type: ignore[no-any-return]
            if isinstance(statement, to.Do):
                answer = connection.execute(_numbered(statement.sql), statement.values).fetchall()
            else:
                answer = []
                if isinstance(statement, to.Many):
                    connection.executemany(_numbered(statement.sql), statement.rows)
    except BaseException:
        transaction.close()
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def migrate(migrations: Sequence[schema.Migration]) -> to.Transaction[None]:
    version = (yield to.Do("PRAGMA user_version"))[0][0]
    for migration in schema.missing(version, migrations):
        for statement in migration.statements("sqlite"):
            yield to.Do(statement)
    yield to.Do(f"PRAGMA user_version = {len(migrations)}")


def _numbered(sql: str) -> str:
    return sql.replace("$", "?")
