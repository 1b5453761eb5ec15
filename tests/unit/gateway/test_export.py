"""An exported file holds the rows, all of them and nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from freehold.errors import InvalidRequest
from freehold.gateway.keeping.export import export
from freehold.gateway.keeping.filters import Filter
from freehold.gateway.keeping.sqlite import SqliteStore
from freehold.ledger import Row
from tests.unit.gateway.ledger_rows import NOON, full_row, row


@pytest.fixture
async def filled(tmp_path: Path) -> Any:
    store = SqliteStore(tmp_path / "data")
    await store.start()
    rows = [full_row(prompt_version='a "quoted"\nline, é'), *(row(at=NOON + n, cost=n) for n in range(2500))]
    for each in rows:
        store.append(each)
    await store.flush()
    yield store, sorted(rows, key=lambda each: (each.at, each.row_id))
    await store.stop()


async def test_json_lines(filled: tuple[SqliteStore, list[Row]], tmp_path: Path) -> None:
    store, rows = filled
    path = tmp_path / "rows.jsonl"
    assert await export(store, path, Filter()) == len(rows)
    assert [msgspec.json.decode(line, type=Row) for line in path.read_bytes().splitlines()] == rows
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await export(store, path, Filter(since=NOON + 2499)) == 1
    assert set(os.listdir(tmp_path)) == {"data", "rows.jsonl"}


async def test_parquet(filled: tuple[SqliteStore, list[Row]], tmp_path: Path) -> None:
    duckdb: Any = pytest.importorskip("duckdb", reason="needs duckdb, the extra `parquet`")
    store, rows = filled
    path = tmp_path / "it's rows.parquet"
    assert await export(store, path, Filter()) == len(rows)
    found = duckdb.from_parquet(str(path)).order('"at", row_id').fetchall()
    assert [Row(**dict(zip(Row.__struct_fields__, each, strict=True))) for each in found] == rows
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await export(store, path, Filter(alias="none")) == 0
    assert duckdb.from_parquet(str(path)).fetchall() == []


async def test_another_name_is_refused(filled: tuple[SqliteStore, list[Row]], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"\.parquet"):
        await export(filled[0], tmp_path / "rows.csv", Filter())
