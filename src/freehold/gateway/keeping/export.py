"""The ledger as a file: Parquet (needs the extra `parquet`) or JSON lines, by the file's name.

The file is written beside its place and moved there when it is whole. It holds pseudonyms of people: mode 0600.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from freehold.errors import InvalidRequest
from freehold.gateway.keeping.filters import Filter
from freehold.gateway.keeping.schema import column_types
from freehold.gateway.keeping.store import Store

_AT_ONCE = 1000


async def export(store: Store, path: Path, which: Filter) -> int:
    """Write the rows that are asked for; returns how many. Raises InvalidRequest if the name ends in neither
    .parquet nor .jsonl, and MissingExtra's cause if duckdb is not installed."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise InvalidRequest(f"{path}: name a file that ends in .parquet or .jsonl", param="file")
    duckdb: Any = importlib.import_module("duckdb") if path.suffix == ".parquet" else None  # an extra
    # In a folder that is closed to others, because duckdb gives a file the mode that it likes.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        lines, done = Path(folder) / "rows.jsonl", Path(folder) / "rows.parquet"
        count = await _write_lines(store, lines, which)
        if duckdb is not None:
            await asyncio.to_thread(_to_parquet, duckdb, lines, done)
        whole = lines if duckdb is None else done
        os.chmod(whole, 0o600)
        os.replace(whole, path)
    return count


async def _write_lines(store: Store, path: Path, which: Filter) -> int:
    encoder = msgspec.json.Encoder()
    count = 0
    waiting: list[bytes] = []
    with path.open("wb") as file:
        async for row in store.rows(which):
            # Every field, also those with their default: a reader need not know them.
            waiting.append(encoder.encode(msgspec.structs.asdict(row)))
            count += 1
            if len(waiting) == _AT_ONCE:
                file.write(b"\n".join((*waiting, b"")))
                waiting.clear()
        file.write(b"\n".join((*waiting, b"")) if waiting else b"")
    return count


def _to_parquet(duckdb: Any, lines: Path, path: Path) -> None:
    columns = {name: kind.upper() for name, kind in column_types().items()}
    connection = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"})
    try:
        source = connection.read_json(str(lines), columns=columns, format="newline_delimited")
        source.write_parquet(str(path), compression="zstd")
    finally:
        connection.close()
