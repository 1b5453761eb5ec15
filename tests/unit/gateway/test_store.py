"""What both stores do alike: rows come back as they were, changes are whole or not at all, others hear of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import ConfigError, Conflict, InvalidRequest, NotFound
from freehold.gateway.keeping import postgres as store_postgres
from freehold.gateway.keeping import schema
from freehold.gateway.keeping import sqlite as store_sqlite
from freehold.gateway.keeping import store as store_module
from freehold.gateway.keeping import transactions as to
from freehold.gateway.keeping.filters import Filter
from freehold.gateway.keeping.records import KeyRecord, Reservation, Text, Usage, day_of
from freehold.gateway.keeping.store import Store
from freehold.ledger import Note, Row
from tests.unit.gateway.conftest import OpenStore
from tests.unit.gateway.ledger_rows import FULL, NOON, full_row, row

DAY = day_of(NOON)


async def rows_of(store: Store, **which: Any) -> list[Row]:
    await store.flush()
    return [each async for each in store.rows(Filter(**which))]


def test_a_full_row_has_no_default_left() -> None:
    given = {"row_id", "request_id", "at", "endpoint", "key_id", "alias"}
    assert given | FULL.keys() == set(Row.__struct_fields__)
    bare, full = row(), full_row()
    assert not [name for name in FULL if getattr(bare, name) == getattr(full, name)]


async def test_rows_come_back_as_they_were(store: Store) -> None:
    first, second = full_row(at=NOON + 1), row(at=NOON)
    store.append(first)
    store.append(second)
    assert await rows_of(store) == [second, first]


async def test_rows_are_read_in_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PAGE", 3)
    rows = [row(at=NOON + number // 2) for number in range(10)]  # some at the same time
    for each in rows:
        store.append(each)
    assert await rows_of(store) == sorted(rows, key=lambda each: (each.at, each.row_id))


async def test_rows_reach_the_database_by_themselves(store: Store) -> None:
    store.append(row())
    until = time.monotonic() + 5
    while not await store.fetch("SELECT 1 FROM calls") and time.monotonic() < until:
        await asyncio.sleep(0.02)
    assert len(await store.fetch("SELECT row_id FROM calls")) == 1


async def test_stop_writes_what_is_left(open_store: OpenStore) -> None:
    store = open_store(flush_seconds=10)
    await store.start()
    rows = [row(at=NOON + number) for number in range(50)]
    for each in rows:
        store.append(each)
    await store.stop()
    again = open_store()
    await again.start()
    assert await rows_of(again) == rows
    await again.stop()


@pytest.mark.parametrize(
    ("which", "found"),
    [
        ({"since": NOON + 1}, "bc"),
        ({"until": NOON + 1}, "a"),
        ({"since": NOON + 1, "until": NOON + 2}, "b"),
        ({"prompt_name": "summarise"}, "b"),
        ({"alias": "other"}, "c"),
        ({"shadows": False}, "ac"),
        ({"key_id": "nobody"}, ""),
        ({"experiment": "glm", "team": "search"}, "b"),
    ],
)
async def test_a_filter_finds_what_it_says(store: Store, which: dict[str, Any], found: str) -> None:
    for each in (
        row(request_id="a"),
        full_row(request_id="b", at=NOON + 1),
        row(request_id="c", at=NOON + 2, alias="other"),
    ):
        store.append(each)
    assert "".join(each.request_id for each in await rows_of(store, **which)) == found


async def test_notes_belong_to_their_rows(store: Store) -> None:
    one, other = full_row(), row()
    for each in (one, other):
        store.append(each)
    notes = [Note(row_id=one.row_id, at=NOON + n, name="feedback", value=n / 2, source="user") for n in (0, 1)]
    for note in notes:
        store.note(note)
    store.note(Note(row_id=other.row_id, at=NOON, name="judge.quality", value=1.0))
    await store.flush()
    assert await store.notes(Filter(prompt_name="summarise")) == notes
    assert len(await store.notes()) == 3


@pytest.mark.parametrize("table", ["calls", "notes", "decisions", "audit"])
async def test_what_is_written_cannot_be_changed(store: Store, table: str) -> None:
    store.append(full_row())
    store.note(Note(row_id="r", at=NOON, name="feedback", value=1.0))
    await store.add_decision("e", 0, {"to": "ramping"}, at=NOON, actor="me", audited=True)
    await store.flush()

    def change() -> to.Transaction[None]:
        yield to.Do(f"UPDATE {table} SET at = at + 1")

    with pytest.raises(Exception, match="never changed"):
        await store.run(change())


async def test_what_a_transaction_raises_undoes_it(store: Store) -> None:
    def half() -> to.Transaction[None]:
        yield to.Do("INSERT INTO writers (writer, batch, at) VALUES ('x', 1, 0)")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        await store.run(half())
    assert not await store.fetch("SELECT 1 FROM writers WHERE writer = 'x'")
    store.append(row())
    assert len(await rows_of(store)) == 1


async def test_a_batch_is_written_once_however_often_it_is_sent(store: Store) -> None:
    batch = to.Batch([row(cost=5)], "some-writer", 1)
    for _ in range(2):
        await store.run(to.write_batch(batch, NOON))
    assert len(await rows_of(store)) == 1
    assert await store.usage(DAY) == [Usage("key:k", 5, 0)]


async def test_one_item_that_the_database_refuses_does_not_block_the_others(store: Store) -> None:
    rows = [row(at=NOON + number) for number in range(5)]
    bad = row(at=NOON + 9, prompt_version="a\0b\ud800", output_tokens=2**70)
    for each in (*rows[:3], bad, *rows[3:]):
        store.append(each)
    found = await rows_of(store)
    assert found[:5] == rows
    assert found[5].row_id == bad.row_id
    assert found[5].output_tokens == 2**63 - 1 or found[5].output_tokens is None
    assert "\ud800" not in found[5].prompt_version
    assert not store.trouble
    assert not store.lost


async def test_an_item_that_cannot_be_written_at_all_is_counted(store: Store) -> None:
    store.append(row(duration=None))  # no database takes it
    store.append(row())
    assert len(await rows_of(store)) == 1
    assert store.lost == 1


async def test_keys_are_made_listed_and_revoked(store: Store) -> None:
    record = KeyRecord(key_id="search", digest="ab" * 32, team="t", scopes=("chat",), budget_per_day=5, created_at=NOON)
    await store.add_key(record, "me")
    assert await store.keys() == [record]
    with pytest.raises(InvalidRequest, match="not used twice"):
        await store.add_key(record, "me")
    await store.revoke_key("search", "me")
    assert (await store.keys())[0].revoked_at is not None
    with pytest.raises(NotFound):
        await store.revoke_key("search", "me")
    kinds = [(entry.kind, entry.subject) for entry in await store.audit()]
    assert kinds == [("key.new", "search"), ("key.revoke", "search")]
    assert "ab" * 32 not in str(await store.audit())


async def test_another_process_hears_of_changes(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WATCH_SECONDS", 0.02)
    gateway, command = open_store(serving=True), open_store()
    await gateway.start()
    heard: asyncio.Queue[str] = asyncio.Queue()
    gateway.watch(heard.put)
    await command.start()
    await command.add_key(KeyRecord(key_id="a", digest="cd" * 32), "me")
    assert await asyncio.wait_for(heard.get(), 5) == "keys"
    await command.revoke_key("a", "me")
    assert await asyncio.wait_for(heard.get(), 5) == "keys"
    await command.stop()
    await gateway.stop()


async def test_of_two_records_with_one_number_one_is_written(open_store: OpenStore) -> None:
    stores = [open_store(), open_store()]
    for store in stores:
        await store.start()
    answers = await asyncio.gather(
        *(store.add_decision("e", 0, {"by": n}, at=NOON, actor="me", audited=True) for n, store in enumerate(stores)),
        return_exceptions=True,
    )
    assert sorted(type(answer).__name__ for answer in answers) == ["Conflict", "NoneType"]
    with pytest.raises(Conflict):
        await stores[0].add_decision("e", 0, {}, at=NOON, actor="me", audited=True)
    await stores[0].add_decision("e", 1, {"share": 0.25}, at=NOON, actor="me", audited=False)
    await stores[0].add_decision("other", 0, {}, at=NOON, actor="me", audited=False)
    decisions = await stores[1].decisions("e")
    assert [each.number for each in decisions] == [0, 1]
    assert decisions[1].record == {"share": 0.25}
    assert [(each.kind, each.subject) for each in await stores[1].audit()] == [("decision", "e")]
    for store in stores:
        await store.stop()


async def test_an_experiment_is_read_in_the_order_of_commits(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SMALL_PAGE", 4)
    stores = [open_store(), open_store()]
    for store in stores:
        await store.start()
    written: list[str] = []
    for turn in range(5):
        store = stores[turn % 2]
        for n in range(3):
            each = row(row_id=f"{turn}{n}", at=NOON - turn, experiment="e" if n else "other")
            store.append(each)
            store.note(Note(row_id=each.row_id, at=NOON, name="feedback", value=1.0))
            written += [each.row_id] * (n > 0)
        await store.flush()
    rows: list[str] = []
    notes: list[str] = []
    position = note_position = 0
    while page := await stores[0].experiment_rows("e", position):
        assert len(page) <= 4
        rows += [each.row_id for _, each in page]
        assert position < page[0][0] < page[-1][0]
        position = page[-1][0]
    while notes_page := await stores[0].experiment_notes("e", note_position):
        notes += [each.row_id for _, each in notes_page]
        note_position = notes_page[-1][0]
    assert rows == notes == written
    assert await stores[1].experiment_rows("", 0) == []
    for store in stores:
        await store.stop()


async def test_one_gateway_leads_until_it_goes_silent(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_postgres, "LEASE_SECONDS", 0.4)
    one, other = store_postgres.PostgresStore(database), store_postgres.PostgresStore(database)
    await one.start()
    await other.start()
    assert await one.leads("e")
    assert not await other.leads("e")
    assert await other.leads("another")
    assert await one.leads("e")
    await asyncio.sleep(0.5)
    assert await other.leads("e")
    assert not await one.leads("e")
    await one.stop()
    await other.stop()


async def test_the_only_gateway_leads(tmp_path: Path) -> None:
    assert await store_sqlite.SqliteStore(tmp_path).leads("e")


async def test_spend_is_charged_with_its_rows_and_reservations_end(store: Store) -> None:
    store.reserve(Reservation("1", ("key:k", "team:t"), DAY, 100, NOON))
    store.reserve(Reservation("2", ("key:k",), DAY, 30, NOON))
    await store.flush()
    store.append(row(team="t", cost=40))
    store.append(row(team="t", cost=7, shadow_of="r1"))
    store.append(row(cost=None))
    store.release("1")
    await store.flush()
    assert await store.usage(DAY) == [Usage("key:k", 40, 30), Usage("team:t", 40, 0)]
    assert await store.usage(DAY + 1) == []
    # One that begins and ends between two batches is never written.
    store.reserve(Reservation("3", ("key:k",), DAY, 1, NOON))
    store.release("3")
    await store.flush()
    assert [each for (each,) in await store.fetch("SELECT id FROM reservations")] == ["2"]


async def test_reservations_of_killed_gateways_can_be_given_back(open_store: OpenStore) -> None:
    dead, alive = open_store(), open_store()
    await dead.start()
    dead.reserve(Reservation("1", ("key:k",), DAY, 100, NOON))
    await dead.stop()
    await alive.start()
    alive.reserve(Reservation("2", ("key:k",), DAY, 10, NOON))
    await alive.flush()
    assert await alive.release_stranded(time.time() - 60, "me") == 0  # it has written since then
    assert await alive.release_stranded(time.time() + 1, "me") == 1
    assert await alive.usage(DAY) == [Usage("key:k", 0, 10)]
    await alive.stop()


async def test_old_rows_go_with_their_notes_and_texts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PRUNED_AT_ONCE", 2)
    for number in range(5):
        each = row(row_id=f"r{number}", at=NOON + number)
        store.append(each)
        store.note(Note(row_id=each.row_id, at=NOON, name="feedback", value=1.0))
        store.keep(Text(each.row_id, NOON, "question", "answer"))
    assert await store.prune(NOON + 3) == 3
    assert [each.row_id for each in await rows_of(store)] == ["r3", "r4"]
    for table in ("notes", "texts"):
        assert await store.fetch(f"SELECT row_id FROM {table} ORDER BY row_id") == [("r3",), ("r4",)]


async def test_rows_of_an_experiment_stay_while_it_is_looked_at(store: Store) -> None:
    for name in ("over", "runs"):
        for number in range(2):
            store.append(row(row_id=f"{name}{number}", at=NOON, experiment=name))
            store.keep(Text(f"{name}{number}", NOON, "question", "answer"))
    await store.add_decision("over", 0, {}, at=NOON + 1, actor="a", audited=False)
    await store.add_decision("runs", 0, {}, at=NOON + 9, actor="a", audited=False)
    assert await store.prune(NOON + 5) == 2
    assert [each.row_id for each in await rows_of(store)] == ["runs0", "runs1"]
    assert not await store.fetch("SELECT row_id FROM texts"), "what was said is not kept any longer"


async def test_who_is_on_which_arm(store: Store) -> None:
    for number, (arm, conversation, at) in enumerate(
        (("a", "c", 1.0), ("a", "c", 5.0), ("b", "d", 3.0), ("a", "", 9.0))
    ):
        store.append(row(row_id=f"r{number}", at=NOON + at, experiment="e", arm=arm, conversation=conversation))
    await store.flush()
    assert await store.conversations("e", NOON) == [("b", "d", NOON + 3, NOON + 3), ("a", "c", NOON + 1, NOON + 5)]
    assert await store.conversations("e", NOON + 4) == [("a", "c", NOON + 5, NOON + 5)]
    assert await store.conversations("other", NOON) == []


async def test_a_change_that_could_not_be_told_is_told_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "STUCK_SECONDS", 0.05)
    heard = asyncio.Event()
    calls = 0

    async def changed(what: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("the database went away")
        heard.set()

    store.watch(changed)
    await store.add_key(KeyRecord(key_id="a", digest="d"), "me")
    await asyncio.wait_for(heard.wait(), 5)


async def test_retention_prunes_by_itself(open_store: OpenStore) -> None:
    store = open_store()
    await store.start()
    store.append(row(at=time.time() - 3 * 86_400))
    store.append(row(at=time.time()))
    await store.stop()
    serving = open_store(serving=True, retention_days=2)
    await serving.start()
    until = time.monotonic() + 5
    while len(await serving.fetch("SELECT row_id FROM calls")) > 1 and time.monotonic() < until:
        await asyncio.sleep(0.02)
    assert len(await rows_of(serving)) == 1
    await serving.stop()


async def test_a_person_is_forgotten(store: Store) -> None:
    mine, other = full_row(user="p1"), full_row(user="p2")
    for each in (mine, other):
        store.append(each)
        store.keep(Text(each.row_id, NOON, "q", "a"))
    assert await store.forget_user("p1", "me") == 1
    found = {each.row_id: each for each in await rows_of(store)}
    assert (found[mine.row_id].user, found[mine.row_id].unit, found[mine.row_id].conversation) == ("", "", "")
    assert found[mine.row_id].cost == mine.cost
    assert found[other.row_id] == other
    assert await store.fetch("SELECT row_id FROM texts") == [(other.row_id,)]
    assert "p1" not in str(await store.audit())


async def test_a_secret_is_made_once_and_can_be_destroyed(open_store: OpenStore) -> None:
    one, other = open_store(), open_store()
    await one.start()
    await other.start()
    secret = await one.secret("identity")
    assert len(secret) == 32
    assert await other.secret("identity") == secret
    await one.forget_secret("identity")
    assert await other.secret("identity") != secret
    await one.stop()
    await other.stop()


def test_the_table_has_the_fields_of_a_row() -> None:
    types = schema.column_types()
    assert list(types) == list(Row.__struct_fields__)
    assert set(types.values()) == {"text", "bigint", "double precision", "boolean"}


Migrate = Callable[[tuple[schema.Migration, ...]], to.Transaction[None]]


def migrations_of(store: Store) -> Migrate:
    return store_sqlite.migrate if store.dialect == "sqlite" else store_postgres.migrate


async def test_an_older_database_becomes_a_current_one(open_store: OpenStore) -> None:
    store = open_store()
    await store.start()
    store.append(row(row_id="old"))
    newer = (
        *schema.MIGRATIONS,
        schema.Migration(("ALTER TABLE calls ADD COLUMN colour text NOT NULL DEFAULT 'grey'",)),
    )
    for _ in range(2):  # the second time there is nothing to do
        await store.run(migrations_of(store)(newer))
    assert await store.fetch("SELECT row_id, colour FROM calls") == [("old", "grey")]
    await store.stop()
    with pytest.raises(ConfigError, match="newer"):
        await open_store().start()


async def test_a_migration_that_fails_leaves_the_database_as_it_was(store: Store) -> None:
    broken = (*schema.MIGRATIONS, schema.Migration(("CREATE TABLE extra (a bigint)", "CREATE TABLE extra (a bigint)")))
    with pytest.raises(Exception, match="extra"):
        await store.run(migrations_of(store)(broken))
    await store.run(migrations_of(store)(schema.MIGRATIONS))
    with pytest.raises(Exception, match="extra"):
        await store.fetch("SELECT * FROM extra")
