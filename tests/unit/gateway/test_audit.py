"""The chain of the audit log shows whatever was done to it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest

from freehold.gateway.keeping.audit import SettingsLog, changes, entry_after, fault_of
from freehold.gateway.keeping.records import Entry
from freehold.gateway.keeping.sqlite import FILE, SqliteStore
from freehold.gateway.keeping.store import Store
from tests.unit.gateway.conftest import OpenStore
from tests.unit.gateway.settings_text import settings


def chain(length: int) -> list[Entry]:
    entries: list[Entry] = []
    for number in range(length):
        last = (entries[-1].seq, entries[-1].hash) if entries else None
        entries.append(
            entry_after(last, at=number + 0.1, actor="me", kind="config", subject="s", detail={"n": (number, None)})
        )
    return entries


def test_a_whole_chain_has_no_fault() -> None:
    entries = chain(5)
    assert fault_of(entries) == fault_of([]) == ""
    assert fault_of(entries, head=entries[2].hash) == ""
    assert fault_of([msgspec.json.decode(msgspec.json.encode(each), type=Entry) for each in entries]) == ""


@pytest.mark.parametrize(
    "change", [{"at": 9.0}, {"actor": "x"}, {"kind": "x"}, {"subject": "x"}, {"detail": {"n": 1}}, {"hash": "0" * 64}]
)
def test_a_changed_entry_shows(change: dict[str, Any]) -> None:
    entries = chain(4)
    entries[1] = msgspec.structs.replace(entries[1], **change)
    assert "entry 2 is not what was written" in fault_of(entries)


def test_a_removed_an_added_and_a_rewritten_entry_show() -> None:
    entries = chain(4)
    assert fault_of(entries[1:]) == "entry 1 is missing: the next one there is 2"
    assert "entry 3 is missing" in fault_of([*entries[:2], *entries[3:]])
    other = entry_after((1, entries[0].hash), at=5.0, actor="x", kind="x", subject="", detail={})
    assert fault_of([entries[0], other, *entries[2:]]) == "entry 3 does not follow the one before it"


def test_a_cut_end_shows_against_a_kept_hash() -> None:
    entries = chain(4)
    assert fault_of(entries[:3]) == ""
    assert "ends at entry 3" in fault_of(entries[:3], head=entries[3].hash)


async def test_several_gateways_write_one_chain(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(3)]
    for store in stores:
        await store.start()
    await asyncio.gather(
        *(store.record("config", f"s{n}", {"n": n, "ö": [1.5]}, "me") for n in range(5) for store in stores)
    )
    entries = await stores[0].audit()
    assert [each.seq for each in entries] == list(range(1, 16))
    assert fault_of(entries) == ""
    assert await stores[1].audit(last=2) == entries[-2:]
    for store in stores:
        await store.stop()


async def test_an_entry_changed_in_the_file_shows(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.start()
    for number in range(3):
        await store.record("key.new", "k", {"budget": number}, "me")
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("DROP TRIGGER audit_no_update")
        connection.execute("UPDATE audit SET detail = ? WHERE seq = 2", (json.dumps({"budget": 99}),))
    connection.close()
    assert "entry 2" in fault_of(await store.audit())
    await store.stop()


async def test_settings_are_logged_by_what_changed(store: Store) -> None:
    log = SettingsLog(store)
    log.configure(settings())
    log.configure(settings())  # the same again: no change
    log.configure(settings("[gateway]\nair_gapped = true\n[teams.new]\n"))
    await log.finish()
    entries = await store.audit()
    assert [(each.kind, each.detail["changed"]) for each in entries] == [
        ("config.start", []),
        ("config.change", ["gateway.air_gapped", "teams.new"]),
    ]
    assert entries[0].detail["sha256"] != entries[1].detail["sha256"]
    assert "127.0.0.1" not in str(entries)


def test_what_differs_between_settings() -> None:
    route = '[[routes]]\nname = "r"\neffort = "none"\n'
    assert changes(settings(), settings()) == []
    assert changes(settings(route), settings()) == ["routes"]
    assert changes(settings(), settings("[teams.a]\n[teams.b]\n")) == ["teams.a", "teams.b"]
