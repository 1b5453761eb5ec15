"""What is SQLite's own: files, locks, a disk that fails, and a process that is killed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _starved import Attention

from freehold.errors import ConfigError, Unavailable
from freehold.gateway.keeping import sqlite as store_sqlite
from freehold.gateway.keeping.records import day_of
from freehold.gateway.keeping.sqlite import FILE, SqliteStore
from freehold.gateway.keeping.store import FLUSH_SECONDS, STUCK_SECONDS
from freehold.gateway.keeping.transactions import Batch
from tests.source_checks import ROOT
from tests.unit.gateway.ledger_rows import row

WINDOW = 0.2  # seconds: what was appended before that is on disk, whatever happens
TRIES = 6  # of a kill, where the machine keeps the victim from running
TRYING_SECONDS = 20.0  # for each kill on average: where victims hardly start, more tries tell no more

# Appends rows with a cost and a reservation each, some of which it settles, and says when it has appended which row.
VICTIM = """
import asyncio, sys, time
from pathlib import Path
from freehold.gateway.keeping.records import Reservation, day_of
from freehold.gateway.keeping.sqlite import SqliteStore
from tests.unit.gateway.ledger_rows import row

async def main():
    at = float(sys.argv[3])
    store = SqliteStore(Path(sys.argv[1]), float(sys.argv[4]), serving=True)
    await store.start()
    number = 0
    while True:
        for _ in range(20):
            name = f"{sys.argv[2]}-{number}"
            store.reserve(Reservation(name, ("key:k",), day_of(at), 1000, at))
            store.append(row(row_id=name, request_id=name, at=at, cost=7))
            if number % 10:
                store.release(name)
            number += 1
        sys.stdout.write(f"{time.monotonic()} {number}\\n")
        sys.stdout.flush()
        await asyncio.sleep(0.002)

asyncio.run(main())
"""


async def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "data"
    store = SqliteStore(folder, serving=True)
    await store.start()
    store.append(row())
    await store.flush()
    await store.secret("identity")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(files) == {FILE, f"{FILE}-wal", f"{FILE}-shm", "gateway.lock", "identity.key"}
    assert set(files.values()) == {0o600}
    await store.stop()


async def test_a_database_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / FILE).touch(0o644)
    store = SqliteStore(tmp_path)
    await store.start()
    await store.stop()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


async def test_two_gateways_cannot_have_one_folder_but_commands_can(tmp_path: Path) -> None:
    gateway = SqliteStore(tmp_path, serving=True)
    await gateway.start()
    with pytest.raises(ConfigError, match="another gateway"):
        await SqliteStore(tmp_path, serving=True).start()
    command = SqliteStore(tmp_path)
    await command.start()
    await command.record("config", "s", {}, "me")
    await command.stop()
    await gateway.stop()
    again = SqliteStore(tmp_path, serving=True)
    await again.start()
    await again.stop()


async def test_what_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("This is no database. " * 100)
    with pytest.raises(ConfigError, match=FILE):
        await SqliteStore(tmp_path).start()
    (tmp_path / "identity.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged"):
        await SqliteStore(tmp_path).secret("identity")


async def test_a_locked_database_is_trouble_until_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_sqlite, "BUSY_SECONDS", 0.01)
    monkeypatch.setattr(store_sqlite, "RETRY_SECONDS", 0.01)
    store = SqliteStore(tmp_path, flush_seconds=0.01)
    await store.start()
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.append(row(row_id="1"))
    with pytest.raises(Unavailable, match="locked"):
        await store.flush()
    assert "locked" in store.trouble
    store.append(row(row_id="2"))
    other.execute("ROLLBACK")
    other.close()
    until = time.monotonic() + 5
    while store.trouble and time.monotonic() < until:
        await asyncio.sleep(0.01)
    await store.flush()
    assert [each.row_id async for each in store.rows()] == ["1", "2"]
    await store.stop()


async def test_a_damaged_file_is_trouble_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store_sqlite.run

    def damaged(*_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(store_sqlite, "RETRY_SECONDS", 0.01)
    store = SqliteStore(tmp_path, flush_seconds=0.01)
    await store.start()
    monkeypatch.setattr(store_sqlite, "run", damaged)
    store.append(row(row_id="1"))
    with pytest.raises(Unavailable, match="malformed"):
        await store.flush()
    assert store.trouble
    monkeypatch.setattr(store_sqlite, "run", run)
    await asyncio.sleep(0.1)
    assert [each.row_id async for each in store.rows()] == ["1"]
    assert store.lost == 0
    await store.stop()


async def test_stopping_over_a_database_that_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_sqlite, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(store_sqlite, "RETRY_SECONDS", 0.01)
    store = SqliteStore(tmp_path, flush_seconds=0.01)
    await store.start()
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.append(row())
    with pytest.raises(Unavailable, match="last calls are not in it"):
        await store.stop()
    other.close()


async def test_a_write_that_hangs_is_trouble(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    store._writing_since = time.monotonic() - STUCK_SECONDS - 1
    assert "writing for 6 s" in store.trouble
    store._writing_since = time.monotonic()
    assert store.trouble == ""


def rows_on_disk(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / FILE)) as other:
        return int(other.execute("SELECT count(*) FROM calls").fetchone()[0])


async def test_what_is_appended_to_an_idle_store_is_on_disk_without_being_asked_for(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, flush_seconds=0.01)
    await store.start()
    for number in range(5):
        await asyncio.sleep(0.05)  # the writer has nothing to do
        store.append(row(row_id=f"{number}"))
        async with asyncio.timeout(10.0):
            while rows_on_disk(tmp_path) <= number:
                await asyncio.sleep(0.005)
    await store.stop()


async def test_the_writer_of_an_idle_store_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, turns = SqliteStore(tmp_path, flush_seconds=0.005), list[int]()
    take = store._take

    def counted() -> Batch | None:
        turns.append(len(turns))
        return take()

    monkeypatch.setattr(store, "_take", counted)
    await store.start()
    await asyncio.sleep(0.2)
    assert not turns
    store.append(row())
    await store.flush()
    await asyncio.sleep(0.1)
    before = len(turns)
    assert before >= 1
    await asyncio.sleep(0.2)
    assert len(turns) == before
    await store.stop()


async def test_reads_share_a_connection_that_stop_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, opened = SqliteStore(tmp_path), list[sqlite3.Connection]()
    reader = store._reader

    def counted(timeout: float) -> sqlite3.Connection:
        opened.append(reader(timeout))
        return opened[-1]

    monkeypatch.setattr(store, "_reader", counted)
    await store.start()
    for _ in range(2):
        assert await store.fetch("SELECT 7") == [(7,)]
    assert len(opened) == 1
    await store.stop()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 7")


async def test_a_store_that_was_stopped_starts_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, flush_seconds=0.01, serving=True)
    for number in range(2):
        await store.start()
        await asyncio.sleep(0.05)
        store.append(row(row_id=f"{number}"))
        async with asyncio.timeout(10.0):
            await store.flush()
        assert rows_on_disk(tmp_path) == number + 1
        assert await store.fetch("SELECT count(*) FROM calls") == [(number + 1,)]
        assert len(store._readers) == 1  # kept again too
        await store.stop()


def killed_once(folder: Path, run: int, at: float, rng: random.Random, flush: float) -> tuple[int, bool]:
    """Start the victim, kill it at a random moment, and return how many rows were appended `WINDOW` before, and
    whether it, or we, were kept from running meanwhile: then it had no chance to write them."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", VICTIM, str(folder), f"run{run}", str(at), str(flush)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True) as victim:
        assert victim.stdout is not None
        first = victim.stdout.readline()
        assert first, "the victim did not start"
        attention = Attention(victim.pid)
        attention.sleep(rng.uniform(0.0, 0.6))
        killed = time.monotonic()  # not after it: it may take us long to get there
        victim.kill()
        said = [line.split() for line in (first, *victim.stdout) if line.endswith("\n") and line.count(" ") == 1]
    owed = max((int(number) for at, number in said if float(at) < killed - WINDOW), default=0)
    return owed, attention.starved


async def look_after_a_kill(folder: Path, run: int, at: float, owed: int) -> tuple[int, int]:
    """Check that money adds up. Returns how many rows there are, and how many of those owed are not."""
    with sqlite3.connect(folder / FILE) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    store = SqliteStore(folder)
    await store.start()
    rows = [each async for each in store.rows()]
    mine = {each.row_id for each in rows if each.row_id.startswith(f"run{run}-")}
    missing = sum(f"run{run}-{number}" not in mine for number in range(owed))
    (usage,) = await store.usage(day_of(at))
    held = {name for (name,) in await store.fetch("SELECT id FROM reservations")}
    assert usage.spent == sum(each.cost or 0 for each in rows)
    assert usage.reserved == 1000 * len(held)
    # What was settled before the kill holds nothing; what was not still does.
    for each in rows:
        if int(each.row_id.partition("-")[2]) % 10 == 0:
            assert each.row_id in held
    # A row and its release may fall into two batches: only the last row may be in both.
    settled = {name for name in held if int(name.partition("-")[2]) % 10} & {each.row_id for each in rows}
    assert len(settled) <= run + 1
    await store.stop()
    return len(rows), missing


def kill_again_and_again(folder: Path, times: int, flush: float = FLUSH_SECONDS) -> list[int]:
    """How many rows that were owed were lost, by kill. A kill of a starved victim counts only if it lost nothing; in
    all else (the database opens, money adds up, no row of before goes) every kill counts."""
    rng = random.Random(7)
    rows, at = 0, time.time()
    lost: list[int] = []
    until = time.monotonic() + times * TRYING_SECONDS
    for run in range(times * TRIES):
        if time.monotonic() > until:
            break
        owed, starved = killed_once(folder, run, at, rng, flush)
        rows_now, missing = asyncio.run(look_after_a_kill(folder, run, at, owed))
        assert rows_now >= rows + owed - missing
        rows = rows_now
        if not (starved and missing):
            lost.append(missing)
        if len(lost) == times:
            assert rows > 0
            return lost
    pytest.skip(f"the machine kept victims from running: {len(lost)} of {times} kills say something")


def test_killed_at_any_moment_it_loses_no_more_than_its_window(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path, 5) == [0] * 5


def test_a_window_that_is_too_long_is_found_out(tmp_path: Path) -> None:
    assert max(kill_again_and_again(tmp_path, 5, flush=1.0)) > 0, "nobody would see that rows are lost"


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only this tells who waits for a core")
def test_a_process_that_may_not_run_is_seen_to_starve() -> None:
    """Two that want the one core that they have, at the lowest priority, beside one that is not so modest."""
    core = {min(os.sched_getaffinity(0))}
    busy = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.nice(int(sys.argv[2]))\nwhile True: pass"

    def start(nice: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", busy, str(*core), str(nice)])

    with start(19) as modest, start(0) as other:
        try:
            attention = Attention(modest.pid)
            until = time.monotonic() + 20
            while not attention.starved and time.monotonic() < until:
                attention.sleep(0.3)
            assert attention.starved
        finally:
            modest.kill()
            other.kill()


@pytest.mark.nightly
def test_killed_fifty_times_it_loses_no_more_than_its_window(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path, 50) == [0] * 50
